"""`thinwire top`: what it makes of a log's lines, however they come, and what keys do to it."""

import fcntl
import io
import itertools
import json
import os
import pathlib
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_cli import thinwire as command
from test_run_log import Native
from thinwire import _run_log
from thinwire._run_log import RunLog
from thinwire.errors import InvalidArgument
from thinwire.report.run_log import Follower
from thinwire.top.column import Column
from thinwire.top.command import watch
from thinwire.top.job import Job, Model, error_of, residual_of
from thinwire.top.screen import Screen, in_order
from torch_ranks import environment

STEP_SECONDS = 0.5


class Writer:
    """One rank's log on a clock of its own: a step takes half a second and sends 100 kB."""

    def __init__(
        self, file: pathlib.Path, monkeypatch: pytest.MonkeyPatch, rank: int = 0, size: int = 1
    ) -> None:
        self.now = 0.0
        monkeypatch.setattr(_run_log.time, "monotonic", lambda: self.now)
        self.native = Native()
        self.native.figures["layers"][1] |= {
            "name": "1.bias", "codec": "none", "ratio": 1.0, "elements": 64
        }  # fmt: skip
        self.log = RunLog(file, self.native, rank, "0", 1)
        self.log.start(size, "q8", "2.13.0")

    def train(self, steps: int) -> "Writer":
        figures = self.native.figures
        for _ in range(steps):
            self.now += STEP_SECONDS
            self.native.step()
            figures["wire_bytes"] += 99_900
            figures["dense_wire_bytes"] += 999_000
            figures["encode_seconds"] += 0.1 * STEP_SECONDS
            figures["decode_seconds"] += 0.05 * STEP_SECONDS
            figures["wait_seconds"] += 0.25 * STEP_SECONDS
            self.log.log(None, {"loss": 1 / figures["steps"]})
        return self


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "run.jsonl"


def job_of(file: pathlib.Path) -> Job:
    job = Job()
    for line in Follower(file).lines():
        job.take(line)
    return job


def model_of(file: pathlib.Path) -> Model:
    return job_of(file).models["0"]


def figures_of(file: pathlib.Path, age: float = 0.0) -> dict[str, Any]:
    job, screen = job_of(file), Screen("run.jsonl")
    model = screen.model(job)
    assert model is not None
    return screen.as_json(job, model, age)


def test_figures_of_a_job(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Writer(file, monkeypatch, size=2).train(60)
    figures = figures_of(file)
    assert figures["policy"] == "q8"
    assert (figures["world_size"], figures["ranks"], figures["ended_ranks"]) == (2, [0], 0)
    assert (figures["step"], figures["skipped_steps"]) == (60, 0)
    assert figures["steps_per_second"] == pytest.approx(1 / STEP_SECONDS)
    assert figures["megabytes_per_second"] == pytest.approx(0.1 / STEP_SECONDS)
    assert figures["encode_share"] == pytest.approx(0.1)
    assert figures["decode_share"] == pytest.approx(0.05)
    assert figures["wait_share"] == pytest.approx(0.25)
    assert (figures["ratio"], figures["ratio_bf16"]) == (pytest.approx(10), pytest.approx(5))
    assert figures["metrics"] == {"loss": pytest.approx(1 / 60)}
    assert figures["layers"][0] == {
        "layer": "0.weight", "codec": "q8", "elements": 4096, "ratio": 4.0, "bytes": 1024,
        "residual": 0.0, "rms": 0.0,
    }  # fmt: skip
    assert figures["layers"][1]["rms"] == pytest.approx(1 / 8)


def test_rates_are_those_of_the_last_lines(
    file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(file, monkeypatch)
    writer.train(50)
    writer.now += 3600  # the job stood still
    writer.train(30)
    assert figures_of(file)["steps_per_second"] == pytest.approx(1 / STEP_SECONDS)


def test_a_log_without_metrics(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lines `start` and `plan` say of layers is shown where no others do."""
    writer = Writer(file, monkeypatch)
    assert figures_of(file)["layers"][0]["ratio"] == 4.0
    assert figures_of(file)["steps_per_second"] is None
    writer.native.figures["layers"][0] |= {"codec": "topk:0.01", "ratio": 99.0}
    writer.log.plan("auto", ["auto: tries 1 x topk:0.01", "auto: keeps it"])
    figures = figures_of(file)
    assert figures["policy"] == "auto"
    assert (figures["layers"][0]["codec"], figures["layers"][0]["ratio"]) == ("topk:0.01", 99.0)
    assert figures["layers"][0]["residual"] is None
    assert [d["text"] for d in figures["decisions"]][-1] == "auto: keeps it"


def test_an_ended_job_shows_the_codecs_it_ended_with(
    file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan on trial has no line `plan` when its turn comes again."""
    writer = Writer(file, monkeypatch)
    writer.log.plan("auto", ["auto: tries 1 x q8"])
    writer.train(20)
    writer.native.figures["layers"][0] |= {"codec": "topk:0.01", "ratio": 99.0}
    writer.log.end()
    layer = figures_of(file)["layers"][0]
    assert (layer["codec"], layer["ratio"]) == ("topk:0.01", 99.0)
    assert layer["residual"] is not None


def test_older_logs(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields that came later may be missing."""
    Writer(file, monkeypatch).train(3)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "start":
            for layer in line["layers"]:
                del layer["ratio"], layer["slot_bytes"]
        for name in ("encode_seconds", "decode_seconds", "wait_seconds"):
            line.pop(name, None)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = figures_of(file)
    assert figures["left_out"] == []
    assert figures["encode_share"] is None
    assert figures["steps_per_second"] == pytest.approx(1 / STEP_SECONDS)


def test_what_is_kept_does_not_grow(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(file, monkeypatch)
    writer.train(200)
    writer.log.plan("auto", [f"auto: {n}" for n in range(99)])
    writer.train(200)
    rank = model_of(file).shown
    assert len(rank.samples) <= 10 / STEP_SECONDS + 2
    assert len(rank.norms) == 64
    assert [text for _, text in rank.decisions] == [f"auto: {n}" for n in range(94, 99)]


def test_silent_alive_and_ended(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers = [Writer(file, monkeypatch, rank, 2) for rank in range(2)]
    for writer in writers:
        monkeypatch.setattr(_run_log.time, "monotonic", lambda w=writer: w.now)
        writer.train(5)
    assert not figures_of(file, age=4.9)["silent"]
    assert figures_of(file, age=5.1)["silent"]
    slow = writers[0]
    monkeypatch.setattr(_run_log.time, "monotonic", lambda: slow.now)
    slow.now += 20  # a job whose steps are long has more time
    slow.train(1)
    assert not figures_of(file, age=60)["silent"]
    assert figures_of(file, age=62)["silent"]
    job, screen = job_of(file), Screen("run.jsonl")
    assert "silent for 100 s" in "\n".join(screen.health(job, job.models["0"], 100))
    assert "alive, last line 1.0 s ago" in "\n".join(screen.health(job, job.models["0"], 1))
    writers[0].log.end()
    assert not job_of(file).ended
    assert figures_of(file)["ended_ranks"] == 1
    writers[1].log.end()
    assert job_of(file).ended
    assert not figures_of(file, age=1e6)["silent"]


def test_a_job_that_is_started_again(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same file: with fewer ranks, or more, whoever comes first."""

    def attempt(order: list[int]) -> None:
        for rank in order:
            Writer(file, monkeypatch, rank, len(order)).train(2).log.end()

    attempt([0, 1, 2, 3])
    assert job_of(file).ended
    Writer(file, monkeypatch, 1, 2).train(1)
    assert figures_of(file)["ranks"] == [1]
    assert not job_of(file).ended
    Writer(file, monkeypatch, 0, 2).train(1)
    assert figures_of(file)["ranks"] == [0, 1]
    attempt([4, 0, 2, 1, 3])
    assert figures_of(file)["ranks"] == [0, 1, 2, 3, 4]
    assert job_of(file).ended
    attempt([3, 2])  # a model over some of the ranks
    attempt([3, 2])
    assert figures_of(file)["ranks"] == [2, 3]
    assert job_of(file).ended


def test_a_follower_gives_each_whole_line_once(file: pathlib.Path) -> None:
    file.write_bytes(b"one\ntw")
    follower = Follower(file)
    assert list(follower.lines()) == ["one"]
    assert list(follower.lines()) == []
    with open(file, "ab") as more:
        more.write(b"o\n\nthree\n\xff\n")
    assert list(follower.lines()) == ["two", "three", "\N{REPLACEMENT CHARACTER}"]
    assert follower.modified == file.stat().st_mtime
    file.write_bytes(b"new\n")  # cut
    assert list(follower.lines()) == ["new"]
    other = file.with_suffix(".other")
    other.write_bytes(b"a longer file in its place\n")
    other.rename(file)
    assert list(follower.lines()) == ["a longer file in its place"]
    file.unlink()
    assert list(follower.lines()) == []
    with pytest.raises(InvalidArgument, match=r"cannot read it[\s\S]*hint: thinwire run --stats"):
        Follower(file)


@given(st.lists(st.integers(0, 4000), max_size=8))
def test_lines_may_come_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    whole, growing = folder / "whole.jsonl", folder / "growing.jsonl"
    with pytest.MonkeyPatch.context() as monkeypatch:
        Writer(whole, monkeypatch).train(4).log.end()
    data = whole.read_bytes()
    growing.touch()
    follower, job = Follower(growing), Job()
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for begin, end in itertools.pairwise(places):
        with open(growing, "ab") as more:
            more.write(data[begin:end])
        for line in follower.lines():
            job.take(line)
    screen = Screen("run.jsonl")
    assert screen.as_json(job, job.models["0"], 0) == figures_of(whole)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_reason_and_no_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.mktemp("bytes") / "run.jsonl"
    with pytest.MonkeyPatch.context() as monkeypatch:
        Writer(file, monkeypatch).train(2)
    with open(file, "ab") as more:
        more.write(data + b"\n")
    job = job_of(file)
    lines = [line for line in data.decode(errors="replace").split("\n") if line.strip()]
    assert bool(job.left_out) == bool(lines)
    assert figures_of(file)["steps"] == 2


def test_every_column_sorts_both_ways(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(file, monkeypatch)
    writer.native.figures["layers"] = [
        {**writer.native.figures["layers"][0], "name": f"{n}", "codec": f"q{8 - n}",
         "elements": 100 * n, "ratio": 1.0 + n, "slot_bytes": 7 * n}
        for n in range(2)
    ]  # fmt: skip
    writer.log.start(1, "q8", "2.13.0")
    writer.native.norms = [2.0, float("nan")]
    writer.train(1)
    layers = model_of(file).layers
    assert [residual_of(layer) for layer in layers] == [2.0, None]
    assert error_of(layers[0]) is None  # no element
    for column in Column:
        forward = [layer.name for layer in in_order(layers, column, False)]
        backward = [layer.name for layer in in_order(layers, column, True)]
        if column in (Column.RESIDUAL, Column.RMS):  # what has no value stays below
            assert forward == backward == ["0", "1"]
        else:
            assert forward == backward[::-1]
    assert [layer.name for layer in in_order(layers, Column.ELEMENTS, False)] == ["1", "0"]
    assert [layer.name for layer in in_order(layers, Column.LAYER, False)] == ["0", "1"]


class FakeKeys:
    """Each read gives the next key, after what the job does meanwhile."""

    def __init__(self, *steps: tuple[str, Callable[[], object]]) -> None:
        self.steps = list(steps)

    def read(self, seconds: float) -> str:
        assert seconds == 1.0
        key, meanwhile = self.steps.pop(0)
        meanwhile()
        return key


def nothing() -> None:
    pass


def watched(file: pathlib.Path, screen: Screen, *steps: tuple[str, Callable[[], object]]) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=30, color_system=None)
    keys = FakeKeys(*steps)
    watch(Follower(file), Job(), screen, console, keys, clock=lambda: file.stat().st_mtime + 2)
    assert keys.steps == []
    return out.getvalue()


def test_a_live_view_of_a_growing_file(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.touch()
    writers: list[Writer] = []

    def start() -> None:
        writers.append(Writer(file, monkeypatch))

    shown = watched(
        file,
        Screen("run.jsonl", rate=1e6),
        ("", start),
        ("", lambda: writers[0].train(4)),
        ("", lambda: writers[0].log.end()),
    )  # ends by itself when the job has
    first = shown.index("waits for the job's first line")
    second = shown.index("no rates yet")
    third = shown.index("step 4")
    assert first < second < third
    assert "2 steps/s, 500 ms a step; encode 10%; decode 5%; wait for the wire 25%" in shown
    assert "0.2 MB/s a rank, 0.1 MB a step, 20% of the link; 10.0x less than fp32" in shown
    assert "alive, last line 2.0 s ago; 0 steps skipped" in shown
    assert "loss 0.25" in shown
    assert shown.index("ended after 2.0 s") > third


def test_keys(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Writer(file, monkeypatch).train(2)
    screen = Screen("run.jsonl")
    keys = [("s", nothing), ("r", nothing), ("?", nothing), ("x", nothing), ("\x1b[A", nothing)]
    shown = watched(file, screen, *keys, ("q", nothing))
    assert "elements ↓" in shown
    assert "ratio ↓" in shown
    assert "ratio ↑" in shown
    assert "sort by the next column" in shown
    assert (screen.sort, screen.reverse, screen.help) == (Column.RATIO, True, True)
    for _ in Column:
        screen.press("s")
    assert screen.sort == Column.RATIO


def test_a_long_table_fits_the_terminal(
    file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(file, monkeypatch)
    layer = writer.native.figures["layers"][0]
    writer.native.figures["layers"] = [{**layer, "name": f"{n}.weight"} for n in range(500)]
    writer.log.start(1, "q8", "2.13.0")
    screen, console = Screen("run.jsonl", help=True), Console(file=io.StringIO(), width=100)
    for height in (24, 60):
        text = console.render_lines(screen.live(job_of(file), 0, height))
        assert len(text) <= height
        assert any("more layers" in "".join(s.text for s in line) for line in text)


def test_two_models(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Writer(file, monkeypatch).train(2)
    other = Writer(file, monkeypatch)
    other.log._who["model"] = "1"
    other.log.start(1, "topk:0.1", "2.13.0")
    job, screen = job_of(file), Screen("run.jsonl")
    shown = screen.model(job)
    assert shown is not None
    assert shown.label == "1"
    screen.press("m")
    shown = screen.model(job)
    assert shown is not None
    assert shown.label == "0"


def test_without_a_terminal(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Writer(file, monkeypatch).train(4)
    monkeypatch.undo()
    figures = file.with_suffix(".json")
    for arguments in ([], ["--once", "--sort", "layer", "--reverse", "--json", str(figures)]):
        done = command("top", str(file), *arguments)
        assert done.returncode == 0, done.stderr
        assert "2 steps/s, 500 ms a step" in done.stdout
        assert "0.weight" in done.stdout
        assert "\x1b" not in done.stdout
        assert done.stderr == ""
    assert [layer["layer"] for layer in json.loads(figures.read_text())["layers"]] == [
        "1.bias", "0.weight"
    ]  # fmt: skip


def test_mistakes(file: pathlib.Path) -> None:
    missing = command("top", str(file))
    assert missing.returncode == 2
    assert f"hint: thinwire run --stats {file} -- COMMAND makes a job write it" in missing.stderr
    file.write_text("no log\n")
    wrong = command("top", str(file))
    assert wrong.returncode == 2
    assert "expected a run log" in wrong.stderr
    rate = command("top", str(file), "--rate", "fast")
    assert rate.returncode == 2
    assert "1gbit" in rate.stderr


@pytest.mark.parametrize("ending", ["q", "\x03"])
def test_on_a_terminal(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """The whole command: it goes on until a key comes, and leaves the last figures."""
    Writer(file, monkeypatch).train(4)
    monkeypatch.undo()
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "thinwire.cli", "top", str(file)],
        env=environment(NO_COLOR="1", TERM="xterm", COLUMNS="100", LINES="30"),
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: _take_terminal(theirs),
    ) as process:  # fmt: skip
        os.close(theirs)
        text = _read_until(ours, "? help  q quit")
        assert process.poll() is None
        os.write(ours, b"s")
        text += _read_until(ours, "ratio ↓")
        os.write(ours, ending.encode())
        rest = _read_until(ours, None)
        assert process.wait(60) == 0
    os.close(ours)
    assert "2 steps/s" in rest  # again, on the screen that stays
    assert "\x1b[3" not in text + rest  # no colour


def _take_terminal(terminal: int) -> None:
    """Ctrl-C on it is this process's."""
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def _read_until(terminal: int, words: str | None) -> str:
    """What is shown up to these words, or to the end."""
    data = b""
    end = time.monotonic() + 60
    while words is None or words not in data.decode(errors="replace"):
        assert time.monotonic() < end, data
        try:
            more = os.read(terminal, 4096)
        except OSError:  # the other side is closed
            more = b""
        if not more:
            assert words is None, data
            break
        data += more
    return data.decode(errors="replace")
