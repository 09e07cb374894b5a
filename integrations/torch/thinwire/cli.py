"""The command ``thinwire``. Each command is thin; what it does lives where it belongs."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from thinwire import _environment
from thinwire.errors import Error, InvalidArgument
from thinwire.report.runs import By
from thinwire.top.column import Column
from thinwire.version import __version__

_DEFAULT_POLICY = "q8"
_PACKAGE = Path(__file__).resolve().parent
_SOURCE_TREE = _PACKAGE.parents[2]
_PASS_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}

app = typer.Typer(
    help="Gradient compression between the training job and the wire.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _say(text: str) -> None:
    print(f"thinwire: {text}", file=sys.stderr, flush=True)


def _fail(cause: str, hint: str, code: int = 2) -> NoReturn:
    print(f"thinwire: {cause}\n\nhint: {hint}", file=sys.stderr, flush=True)
    raise typer.Exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"thinwire {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    """Gradient compression between the training job and the wire."""


@app.command(
    "run",
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False},
    options_metavar="[--policy P] [--stats FILE] [--trace FILE] -- COMMAND",
)
def _run(
    context: typer.Context,
    policy: Annotated[
        str | None,
        typer.Option(
            help="what to do to the gradients, e.g. topk:0.01,values=q8 or @policy.toml "
            f"({_environment.POLICY}; default: {_DEFAULT_POLICY})"
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            help="append the run log to this file, as JSON Lines for thinwire report "
            f"({_environment.STATS})"
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="write where each step's time goes to this file, anew, for ui.perfetto.dev or "
            f"chrome://tracing ({_environment.TRACE})"
        ),
    ] = None,
) -> None:
    """Run an unchanged PyTorch program with compressed gradients.

    Every DistributedDataParallel model of the command (torchrun ... train.py, python train.py) is
    compressed. The command takes this process's place: its output, signals and exit code are its
    own.
    """
    command = context.args
    if not command:
        _fail("run: no command", "thinwire run --policy q8 -- torchrun --nproc-per-node 4 train.py")
    chosen = _choose_policy(policy)
    if stats is not None:
        stats = stats.resolve()
        name = shlex.quote(str(stats))
        _say(
            f"the run log goes to {stats}; thinwire report {name} reads it, thinwire top {name} "
            "watches the job"
        )
    trace_file = trace or _environment.trace_file()
    begun = _begin_trace(trace_file) if trace_file else None
    path = [str(_PACKAGE / "_site")]
    if _PACKAGE.parent.name not in ("site-packages", "dist-packages"):
        path.append(str(_PACKAGE.parent))
    environment = _environment.for_child(
        path, chosen, str(stats) if stats else None, str(begun) if begun else None
    )
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        _fail(f"run: cannot start {command[0]}: {error.strerror}", "check the command's name", 127)


def _begin_trace(file: str | Path) -> Path:
    from thinwire import _trace

    try:
        begun = _trace.begin_file(file)
    except Error as error:
        print(f"thinwire: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    _say(f"the trace goes to {begun}; open it in https://ui.perfetto.dev or chrome://tracing")
    return begun


def _choose_policy(flag: str | None) -> str:
    """The policy that won, made absolute and checked; says which source it came from."""
    inherited = _environment.policy()
    if flag is not None:
        chosen, source = flag, "--policy"
        if inherited is not None and inherited != flag:
            source += f"; {_environment.POLICY}={shlex.quote(inherited)} is set aside"
    elif inherited is not None:
        chosen, source = inherited, _environment.POLICY
    else:
        chosen, source = _DEFAULT_POLICY, f"the default; set --policy or {_environment.POLICY}"
    if chosen.startswith("@"):
        chosen = "@" + str(Path(chosen[1:]).resolve())
    try:
        from thinwire import _codec  # type: ignore[attr-defined]

        _codec.check_policy(chosen)
    except Error as error:
        print(f"thinwire: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    _say(f"policy {chosen} ({source})")
    return chosen


@app.command(
    "report",
    options_metavar="[--out FOLDER] [--json FILE] [--target NAME=VALUE] [--by step|seconds|bytes]",
)
def _report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="run logs of thinwire run --stats; several compare"),
    ],
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("out/report"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write all figures to this file")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="say when a metric reached a value, e.g. loss=2.0")
    ] = None,
    by: Annotated[
        By | None,
        typer.Option(help="compare metrics where all runs came; default: each run's last ones"),
    ] = None,
) -> None:
    """Tables and pictures of finished or running jobs, from their run logs.

    Loss and other metrics against steps, time and bytes; ratio and residual norm by layer; each
    rank's waiting.
    """
    from thinwire.report.command import report

    try:
        report(files, out, json_file, target, by)
    except Error as error:
        print(f"thinwire: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command(
    "top",
    options_metavar="[--once] [--sort COLUMN] [--reverse] [--rate R] [--json FILE]",
)
def _top(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="run log that thinwire run --stats FILE writes")
    ],
    once: Annotated[bool, typer.Option("--once", help="print the figures once and end")] = False,
    sort: Annotated[Column, typer.Option(help="what layers are sorted by")] = Column.ELEMENTS,
    reverse: Annotated[bool, typer.Option("--reverse", help="in the other order")] = False,
    rate: Annotated[
        str | None,
        typer.Option(help="speed of a host's link, e.g. 1gbit: says which share of it is used"),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write all figures to this file, once")
    ] = None,
) -> None:
    """Watch a running job, from its run log: health, layers, what auto decided.

    On a terminal it follows the job until that ends; ? lists the keys. Elsewhere it prints the
    figures once.
    """
    from thinwire.top.command import top

    try:
        top(file, once, sort, reverse, rate, json_file)
    except Error as error:
        print(f"thinwire: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command("codecs")
def _codecs(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="as the page docs/codecs.md")
    ] = False,
) -> None:
    """List the codec families: parameters, traits, papers, and when to use which."""
    from thinwire import _families

    print(_families.as_markdown() if markdown else _families.as_text(), end="")


@app.command(
    "plan",
    options_metavar="[--ranks N] [--rate R] [--step T] [--policy P]... [--gradients FILE]",
)
def _plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="checkpoint (.pt, .pth, .bin), .safetensors, .json {name: shape}, or "
            "package.module:function that returns a model",
        ),
    ],
    ranks: Annotated[int, typer.Option(help="processes of the job")] = 4,
    rate: Annotated[str, typer.Option(help="speed of a host's link")] = "1gbit",
    latency: Annotated[str, typer.Option(help="of a message")] = "25us",
    step: Annotated[str, typer.Option(help="a step's time without communication")] = "100ms",
    gradients: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="a step's gradients by name (.pt, .safetensors); default: usual ones",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="repeatable; none is always there; default: bf16, auto")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="write the last policy's plan as a policy file, for @FILE")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write all figures to this file")
    ] = None,
) -> None:
    """Predict what policies would gain for a model on a network, without training.

    Codecs' speeds are measured on this machine.
    """
    from rich.console import Console

    try:
        from thinwire import _forecast
        from thinwire._model_file import read_gradients, read_layers

        where = _forecast.Situation(
            ranks,
            _forecast.parse_rate(rate),
            _forecast.parse_time("--latency", latency),
            _forecast.parse_time("--step", step),
        )
        policies = ["none", *[p for p in policy or ["bf16", "auto"] if p != "none"]]
        layers = read_layers(model)
        known = read_gradients(gradients, layers) if gradients else {}
        forecasts = _forecast.forecast(layers, policies, where, known)
        _forecast.show(forecasts, where, Console())
        print(_forecast.verdict(forecasts, where))
        if json_file is not None:
            json_file.write_text(json.dumps({"where": where.text(), "forecasts": forecasts}))
            _say(f"wrote {json_file}")
        if save is not None:
            _forecast.save_policy(save, forecasts[-1]["layers"])
            _say(f"wrote {save}; next: thinwire run --policy @{save} -- COMMAND")
    except Error as error:
        print(f"thinwire: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except OSError as error:
        _fail(f"plan: cannot write {error.filename}: {error.strerror}", "name another file")


@app.command("doctor", options_metavar="[--model MODEL [--step T]]")
def _doctor_command(
    model: Annotated[
        str | None,
        typer.Option(help="say what compression would gain for it here: as for thinwire plan"),
    ] = None,
    step: Annotated[str, typer.Option(help="a step's time without communication")] = "100ms",
) -> None:
    """What is built, found and working here, and what codecs cost on this machine.

    Under torchrun --no-python, on all hosts of a job: what links they have, too.
    """
    from rich.console import Console

    from thinwire import _doctor
    from thinwire._forecast import Situation, forecast, parse_time, verdict
    from thinwire._model_file import read_layers

    console = Console()
    launched = _doctor.started_by_a_launcher()
    try:
        if model is not None and not launched:
            raise InvalidArgument(
                "doctor: --model needs the links of the job's hosts\n"
                "hint: torchrun --no-python ... thinwire doctor --model MODEL on all of them, or "
                "thinwire plan MODEL --rate 1gbit"
            )
        layers = [] if model is None else read_layers(model)
        seconds = parse_time("--step", step)
        first = os.environ.get("RANK", "0") == "0"
        good = _doctor.show(console) if first else True
        if launched:
            latency, rate = _doctor.measure_links(console)
            if model is not None and first:
                where = Situation(int(os.environ["WORLD_SIZE"]), rate, latency, seconds)
                forecasts = forecast(layers, ["none", "bf16", "auto"], where)
                print(f"{where.text()}: {verdict(forecasts, where)}")
    except Error as error:
        print(f"thinwire: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if not good:
        raise typer.Exit(1)


@app.command("lab", context_settings=_PASS_ON)
def _lab(context: typer.Context) -> None:
    """Several hosts on this machine: up, run, rate, status, down."""
    from thinwire_lab.cli import main as lab

    raise typer.Exit(lab(context.args))


@app.command("demo", context_settings=_PASS_ON)
def _demo(context: typer.Context) -> None:
    """Train real models on four emulated hosts and compare methods (source tree only)."""
    _run_module("examples.demo", context.args)


@app.command("bench", context_settings=_PASS_ON)
def _bench(context: typer.Context) -> None:
    """The project's benchmarks (source tree only)."""
    _run_module("tests.bench", context.args)


def _run_module(name: str, arguments: list[str]) -> NoReturn:
    """Replace this process by ``python -m name`` in the source tree."""
    if not (_SOURCE_TREE / Path(*name.split(".")) / "__main__.py").exists():
        _fail(
            f"{name.rpartition('.')[2]}: {name} is not in {_SOURCE_TREE}",
            "run it from a clone of the repository",
        )
    environment = _environment.for_child(
        [str(_SOURCE_TREE), str(_PACKAGE.parent), str(_SOURCE_TREE / "cluster" / "lab")]
    )
    os.execve(sys.executable, [sys.executable, "-m", name, *arguments], environment)


def main() -> None:
    """Entry point of the command ``thinwire``."""
    app()


if __name__ == "__main__":
    main()
