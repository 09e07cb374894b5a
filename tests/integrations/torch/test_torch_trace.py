"""The trace of real jobs: every rank and step, on lanes whose events nest; what is refused."""

import collections
import json
import pathlib
from typing import Any

import pytest
import thinwire
import thinwire.torch as tw
import torch
import torch.distributed as dist
from test_cli import TRAIN, torchrun
from test_cli import thinwire as command
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch_models import Mlp, batch, loss_of, seeded
from torch_ranks import run_ranks


def events_of(file: pathlib.Path) -> list[dict[str, Any]]:
    """What viewers read: they leave the last comma out and add the bracket."""
    text = file.read_text()
    assert text.endswith(",\n")
    return json.loads(text[:-2] + "]")


def assert_lanes(events: list[dict[str, Any]]) -> None:
    """On each lane an event is within another or beside it, never across."""
    lanes = collections.defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            begin, duration = round(1000 * event["ts"]), round(1000 * event["dur"])
            lanes[event["pid"], event["tid"]].append((begin, -(begin + duration), event["name"]))
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert lanes.keys() == named.keys()
    for lane, spans in lanes.items():
        open_ends: list[int] = []
        for begin, minus_end, name in sorted(spans):
            while open_ends and open_ends[-1] <= begin:
                open_ends.pop()
            if open_ends:
                assert named[lane].startswith("communication thread"), f"{named[lane]}: {name}"
                assert -minus_end <= open_ends[-1], f"{named[lane]}: {name}"
            open_ends.append(-minus_end)


def steps_of(events: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(rank, step), once for each event of a step."""
    return sorted((e["pid"], e["args"]["step"]) for e in events if e.get("cat") == "step")


def test_an_unchanged_script(tmp_path: pathlib.Path) -> None:
    path, file = tmp_path / "train.py", tmp_path / "trace.json"
    path.write_text(TRAIN.format(backend="gloo", ending=""))
    for _ in range(2):  # the second time in the place of the first trace
        done = command(
            "run", "--policy", "topk:0.05", "--trace", str(file), "--", *torchrun(2), str(path)
        )
        assert done.returncode == 0, done.stderr
        assert f"the trace goes to {file}; open it in https://ui.perfetto.dev" in done.stderr
        events = events_of(file)
        assert steps_of(events) == [(rank, step) for rank in range(2) for step in range(3)]
        assert_lanes(events)
    names = {event["name"] for event in events}
    assert any(name.startswith("encode topk:0.05") for name in names)
    assert {"allgather", "bucket 0", "end of the step"} < names
    layers = {name for e in events for name in e["args"].get("layers", ())}
    assert layers == {"0.weight", "0.bias", "2.weight", "2.bias"}


def job(rank: int, size: int, file: str) -> None:
    """Two models, the second one over some of the ranks, in one file."""
    evens = dist.new_group([0, 2])
    models = [DDP(seeded(Mlp))]
    if rank in (0, 2):
        models.append(DDP(seeded(Mlp), process_group=evens))
    for model in models:
        tw.compress(model, "q8", trace=file or None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step)).backward()
            optimizer.step()


def test_models_and_groups(tmp_path: pathlib.Path) -> None:
    argument, environment = tmp_path / "argument.json", tmp_path / "environment.json"
    run_ranks(__file__, "job", 3, str(argument), THINWIRE_TRACE=str(environment))
    assert not environment.exists()
    run_ranks(__file__, "job", 3, "", THINWIRE_TRACE=str(environment))
    for file in (argument, environment):
        events = events_of(file)
        assert steps_of(events) == [
            (0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 1), (2, 0), (2, 0), (2, 1), (2, 1)
        ]  # fmt: skip
        assert_lanes(events)
        lanes = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
        assert {"steps", "steps, model 1"} < lanes


def job_alone(rank: int, size: int, file: str) -> None:
    tw.compress(DDP(seeded(Mlp)), "q8", trace=file)


def job_refused(rank: int, size: int, file: str) -> None:
    with pytest.raises(thinwire.InvalidArgument, match=r"trace: cannot append to[\s\S]*hint:"):
        tw.compress(DDP(seeded(Mlp)), "q8", trace=file)


def test_what_cannot_be_traced(tmp_path: pathlib.Path) -> None:
    said = run_ranks(__file__, "job_alone", 1, str(tmp_path / "alone.json"))
    assert "trace: one rank alone exchanges nothing" in said
    assert not (tmp_path / "alone.json").exists()
    run_ranks(__file__, "job_refused", 2, str(tmp_path / "missing" / "trace.json"))
    other = tmp_path / "train.py"
    other.write_text("import torch\n")
    for file, reason in (
        (other, "expected a new file or a trace, got something else"),
        (tmp_path / "missing" / "trace.json", "cannot write to"),
        (tmp_path, "cannot write to"),
    ):
        done = command("run", "--trace", str(file), "--", "true")
        assert done.returncode == 2
        assert reason in done.stderr
        assert "hint:" in done.stderr
    assert other.read_text() == "import torch\n"
