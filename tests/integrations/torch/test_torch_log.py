"""The run log of real jobs: from compress() on, from `thinwire run --stats`, and from Reducer.log.
Each test is one job of several ranks."""

import copy
import gc
import itertools
import json
import pathlib

import pytest
import thinwire
import thinwire.torch as tw
import torch
import torch.distributed as dist
from test_cli import TRAIN, torchrun
from test_cli import thinwire as command
from thinwire import _run_log
from thinwire.report.runs import Run, gather
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch_models import Mlp, batch, loss_of, seeded
from torch_ranks import run_ranks

STEPS = 7


def steps_of(model: DDP, reducer: tw.Reducer, rank: int, count: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for n in range(count):
        optimizer.zero_grad()
        loss = loss_of(model, batch(rank, n))
        loss.backward()
        optimizer.step()
        reducer.log(loss=loss, accuracy=n / count)


def norms_of_state(reducer: tw.Reducer) -> list[float]:
    """From state_dict(), whose keys are ROLE/NAME/BEGIN:END."""
    squares: dict[str, float] = {}
    for key, residual in reducer.state_dict()["residuals"].items():
        role, _, rest = key.partition("/")
        if role == "worker":
            name = rest.rpartition("/")[0]
            squares[name] = squares.get(name, 0.0) + float(residual.double().square().sum())
    return [squares.get(layer["name"], 0.0) ** 0.5 for layer in reducer.stats()["layers"]]


def job_logs(rank: int, size: int, file: str) -> None:
    """compress(log=): every rank's lines in one file, residual norms as in its state."""
    for views in (False, True):
        model = DDP(seeded(Mlp), gradient_as_bucket_view=views)
        reducer = tw.compress(model, "topk:0.05", log=file, log_layers_every=3)
        steps_of(model, reducer, rank, STEPS)
        lines = [json.loads(line) for line in pathlib.Path(file).read_text().splitlines()]
        norms = [line for line in lines if line["kind"] == "layers" and line["rank"] == rank]
        assert norms[-1]["step"] == STEPS
        assert norms[-1]["residual_norm"] == pytest.approx(norms_of_state(reducer), rel=1e-5)
        assert (max(norms[-1]["residual_norm"]) > 0) == (size > 1)
        other = copy.deepcopy(model)
        assert len(other._forward_hooks) == len(other._forward_pre_hooks) == 0
        del model
        gc.collect()  # its last line is written when the model ends


def job_resumes(rank: int, size: int, file: str) -> None:
    """A loaded state says where the steps go on."""
    states = []
    for _ in range(2):
        _run_log._models.clear()  # as in a process of its own
        model = DDP(seeded(Mlp))
        reducer = tw.compress(model, "topk:0.05", log=file)
        if states:
            reducer.load_state_dict(states.pop())
        steps_of(model, reducer, rank, 3)
        states.append(reducer.state_dict())


def job_refuses(rank: int, size: int, folder: str) -> None:
    model = DDP(seeded(Mlp))
    for options in ({"log": f"{folder}/missing/run.jsonl"}, {"log_layers_every": 0}):
        with pytest.raises(thinwire.InvalidArgument, match=r"hint:"):
            tw.compress(model, "q8", **options)
    assert not hasattr(model, "_thinwire_reducer")
    evens = dist.new_group([0, 2]) if size > 2 else None
    if evens is not None and rank in (0, 2):
        part = DDP(seeded(Mlp), process_group=evens)
        reducer = tw.compress(part, "q8", log=f"{folder}/part.jsonl")
        steps_of(part, reducer, rank, 2)


def jobs(rank: int, size: int, folder: str) -> None:
    job_logs(rank, size, f"{folder}/logs.jsonl")
    job_resumes(rank, size, f"{folder}/resumes.jsonl")
    job_refuses(rank, size, folder)


def logged(run: Run) -> list[int]:
    """The steps of log(); the counts of each second, made on slow machines, have no values."""
    return [point.step for point in run.points if point.values]


@pytest.mark.parametrize("size", [1, 3])
def test_logs_of_ranks(tmp_path: pathlib.Path, size: int) -> None:
    run_ranks(__file__, "jobs", size, str(tmp_path))
    runs, left_out = gather([tmp_path / "logs.jsonl"])
    assert left_out == []
    assert [run.model for run in runs] == ["0", "1"]
    for run in runs:
        assert run.world_size == size
        assert run.steps == STEPS
        assert run.ended
        assert [rank.rank for rank in run.ranks] == list(range(size))
        assert logged(run) == list(range(1, STEPS + 1))
        assert run.metrics == ["loss", "accuracy"]
        assert (run.ratio_fp32 or 0) > 1 or size == 1
    (resumed,), _ = gather([tmp_path / "resumes.jsonl"])
    assert resumed.attempts == 2
    assert logged(resumed) == [1, 2, 3, 4, 5, 6]
    if size > 2:
        (part,), _ = gather([tmp_path / "part.jsonl"])
        assert part.model == "0 on ranks 0,2"
        assert [rank.rank for rank in part.ranks] == [0, 2]
        assert part.world_size == 2


def test_an_unchanged_script(tmp_path: pathlib.Path) -> None:
    """start and end of each rank, and rank 0's counts once a second."""
    path, file = tmp_path / "train.py", tmp_path / "run.jsonl"
    path.write_text(
        TRAIN.format(backend="gloo", ending="").replace("model.zero_grad()", "time.sleep(0.6)")
        .replace("import sys", "import sys\nimport time")
    )  # fmt: skip
    done = command("run", "--stats", str(file), "--", *torchrun(2), str(path))
    assert done.returncode == 0, done.stderr
    assert f"the run log goes to {file}; thinwire report {file} reads it" in done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = sorted((line["kind"], line["rank"]) for line in lines)
    ends, starts = [("end", 0), ("end", 1)], [("start", 0), ("start", 1)]
    counts = [line for line in lines if line["kind"] == "metrics"]
    assert counts  # more of them where the machine is slow
    assert kinds == ends + [("metrics", 0)] * len(counts) + starts
    times = [0.0, *(line["seconds"] for line in counts)]
    assert all(line["values"] == {} for line in counts)
    assert all(after - before > 0.9 for before, after in itertools.pairwise(times))
    shown = command("report", str(file), "--out", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert "run: no metrics; reducer.log(loss=loss.item())" in shown.stdout


def test_a_process_that_sets_the_environment(tmp_path: pathlib.Path) -> None:
    """THINWIRE_STATS alone is enough for compress()."""
    file = tmp_path / "run.jsonl"
    run_ranks(__file__, "job_environment", 1, THINWIRE_STATS=str(file))
    assert gather([file])[0][0].last("loss") is not None


def job_environment(rank: int, size: int) -> None:
    model = DDP(seeded(Mlp))
    reducer = tw.compress(model, "q8")
    steps_of(model, reducer, rank, 2)
