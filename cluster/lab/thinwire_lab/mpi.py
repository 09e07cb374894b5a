"""How Open MPI's mpirun starts one process on every host of a lab.

mpirun runs on host 0 and reaches the others through an agent, in the place of ssh: a script that
enters the host's namespace. Real hosts have a /tmp each, and Open MPI's daemons must not share one
here: they make folders of the same name in it at the same moment, and now and then one of them
fails. In a user namespace they even take themselves for root, whose folders they cannot use. So
every host gets a folder of its own; the agent puts its name into the daemon's command line.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence

from thinwire_lab import namespaces
from thinwire_lab import state as states
from thinwire_lab.errors import LabError
from thinwire_lab.state import State

# Inside a user namespace everybody is root too.
ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def mpirun(state: State, argv: Sequence[str], *, prefix: bool) -> list[str]:
    """argv on every host, rank i on host i, its traffic on the lab's links; to be run on host 0."""
    program = shutil.which("mpirun")
    if program is None:
        raise LabError("mpirun is not installed", "apt-get install openmpi-bin")
    folder = states.private_folder(namespaces.mpi_folder(state.name))
    agent = folder / "agent"
    agent.write_text(_agent(state, str(folder)))
    settings = {
        "plm_rsh_agent": f"sh {agent}",
        "orte_tmpdir_base": f"{folder}/0",
        "btl": "tcp,self",
        "btl_tcp_if_include": state.network,
        "oob_tcp_if_include": state.network,
    }
    flags = [word for key, value in settings.items() for word in ("--mca", key, value)]
    flags += ["--tag-output"] if prefix else []
    hosts = ["--host", ",".join(state.addresses), "-np", str(state.hosts), "--map-by", "node"]
    return [program, *flags, "--bind-to", "none", *hosts, *argv]


def _agent(state: State, folder: str) -> str:
    """The script that mpirun calls as `agent ADDRESS COMMAND...`."""
    lines = ["address=$1", "shift", 'case "$address" in']
    for rank, address in enumerate(state.addresses):
        enter = shlex.join(namespaces.enter(state, rank + 1, from_inside=True))
        lines.append(f'{address}) export RANK={rank}; enter="{enter}" ;;')
    lines += [
        '*) echo "no host $address in this lab" >&2; exit 2 ;;',
        "esac",
        f'command=$(printf "%s" "$*" | sed "s|{folder}/[0-9][0-9]*|{folder}/$RANK|g")',
        'exec $enter sh -c "$command"',
    ]
    return "\n".join(lines) + "\n"
