"""`thinwire report`: figures, tables and pictures, from run logs that the writer itself made."""

import io
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from test_run_log import Native
from thinwire import _run_log
from thinwire._run_log import RunLog
from thinwire.errors import InvalidArgument
from thinwire.report import plots, tables
from thinwire.report.command import report
from thinwire.report.runs import By, Run, gather, reached_by_all, straggler, target_of
from torch_ranks import environment

PNG = b"\x89PNG"


class Job:
    """Writes one rank's log on a clock of its own: a step takes `step_s` and sends 100 kB."""

    def __init__(
        self, file: pathlib.Path, monkeypatch: pytest.MonkeyPatch, step_s: float = 0.5, **who: Any
    ) -> None:
        self.now = 0.0
        monkeypatch.setattr(_run_log.time, "monotonic", lambda: self.now)
        self.native = Native()
        self.native.figures["layers"][1] |= {"name": "1.bias", "codec": "none", "ratio": 1.0}
        self.step_s = step_s
        self.policy = who.pop("policy", "q8")
        self.log = RunLog(file, self.native, who.get("rank", 0), who.get("model", "0"), 1)
        self.log.start(2, self.policy, "2.13.0")

    def train(self, steps: int, values: Callable[[int], dict[str, float]] | None = None) -> "Job":
        for _ in range(steps):
            self.now += self.step_s
            self.native.step(1)
            self.native.figures["wire_bytes"] += 99_900
            self.native.figures["dense_wire_bytes"] += 999_000
            if values is not None:
                self.log.log(None, values(self.native.figures["steps"]))
        return self

    def end(self) -> "Job":
        self.log.end()
        return self


@pytest.fixture
def job(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    def make(name: str = "run", **options: Any) -> Job:
        return Job(tmp_path / f"{name}.jsonl", monkeypatch, **options)

    return make


@pytest.fixture
def runs_of(tmp_path: pathlib.Path) -> Callable[..., list[Run]]:
    def gathered(*names: str) -> list[Run]:
        runs, left_out = gather([tmp_path / f"{name}.jsonl" for name in names or ("run",)])
        assert left_out == []
        return runs

    return gathered


def falling(step: int) -> dict[str, float]:
    return {"loss": 10.0 / step}


def printed(runs: list[Run], width: int = 100, **options: Any) -> str:
    out = io.StringIO()
    tables.show(Console(file=out, width=width), runs, options.get("target"), options.get("by"))
    return out.getvalue()


def test_figures_of_a_run(job: Any, runs_of: Any) -> None:
    job().train(8, falling).end()
    (run,) = runs_of()
    assert (run.name, run.policy, run.world_size, run.rank) == ("run", "q8", 2, 0)
    assert (run.steps, run.seconds, run.ended, run.attempts) == (8, 4.0, True, 1)
    assert run.megabytes == pytest.approx(0.8)
    assert run.ratio_fp32 == pytest.approx(10.0)
    assert run.ratio_bf16 == pytest.approx(5.0)
    assert run.metrics == ["loss"]
    assert [point.step for point in run.points] == list(range(1, 9))
    assert run.points[3].seconds == 2.0
    assert run.points[3].megabytes == pytest.approx(0.4)
    assert run.last("loss") == 1.25
    assert run.last("loss", By.SECONDS, 2.2) == 2.5
    assert run.last("loss", By.BYTES, 0.05) is None
    weight, bias = run.layers
    assert (weight.codec, weight.ratio, weight.slot_bytes) == ("q8", 4.0, 1024)
    assert bias.dense
    assert weight.steps == list(range(1, 9))


def test_a_run_that_was_killed_has_the_totals_of_its_last_line(job: Any, runs_of: Any) -> None:
    job().train(4, falling)
    (run,) = runs_of()
    assert (run.steps, run.seconds, run.ended) == (4, 2.0, False)
    assert run.layers[0].ratio == 4.0
    assert "rank 0 has no end line" in printed([run])
    assert run.ranks[0].wait_seconds is None


def test_a_resumed_run_goes_on_where_its_state_was_saved(job: Any, runs_of: Any) -> None:
    """The first attempt dies at step 10, the second starts from the state of step 6."""
    job().train(10, lambda step: {"loss": 100.0 - step})
    second = job()
    second.log.resume(6)
    second.train(3, lambda n: {"loss": 50.0 - n}).end()
    (run,) = runs_of()
    assert run.attempts == 2
    assert [point.step for point in run.points] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert run.last("loss") == 47.0
    # What was lost has cost time and bytes all the same.
    assert run.points[6].seconds == 5.5
    assert run.points[6].megabytes == pytest.approx(1.1)
    assert (run.steps, run.seconds) == (13, 6.5)
    assert run.layers[0].steps == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_an_ended_run_has_the_codecs_it_ended_with(job: Any, runs_of: Any) -> None:
    """A plan on trial has no line `plan` when its turn comes again."""
    written = job().train(4, falling)
    written.native.figures["layers"][0] |= {"codec": "topk:0.01", "ratio": 99.0}
    written.end()
    (run,) = runs_of()
    assert (run.layers[0].codec, run.layers[0].ratio) == ("topk:0.01", 99.0)


@pytest.mark.parametrize("begins", ["q8", "q4"])
def test_a_resumed_run_goes_on_by_the_policy_it_ended_with(
    job: Any, runs_of: Any, begins: str
) -> None:
    """The second attempt begins with that policy, or changes to it before it loads the state."""
    first = job().train(4, falling)
    first.native.figures["layers"][0] |= {"codec": "q4", "ratio": 8.0}
    first.log.plan("q4")
    first.train(2, falling)
    second = job(policy=begins)
    second.native.figures["layers"][0] |= {"codec": "q4", "ratio": 8.0}
    if begins != "q4":
        second.log.plan("q4")
    second.log.resume(6)
    second.train(2, falling).end()
    (run,) = runs_of()
    assert (run.attempts, run.steps) == (2, 8)
    assert run.layers[0].ratio == 8.0
    assert run.policy == ("q4" if begins == "q4" else "q8, from step 0 q4")


def test_norms_before_a_change_of_policy_are_left_out(job: Any, runs_of: Any) -> None:
    changed = job().train(4, falling)
    changed.log.plan("q4")
    changed.train(3, falling).end()
    (run,) = runs_of()
    assert run.policy == "q8, from step 4 q4"
    assert run.layers[0].steps == [5, 6, 7]


def test_a_run_that_starts_anew_in_the_same_file_is_another_run(job: Any, runs_of: Any) -> None:
    for _ in range(2):
        job().train(3, falling).end()
    runs = runs_of()
    assert [run.name for run in runs] == ["run #1", "run #2"]
    assert [run.steps for run in runs] == [3, 3]
    other = job(policy="q4")
    other.log.resume(3)
    other.train(1, falling).end()
    assert [run.name for run in runs_of()] == ["run #1", "run #2", "run #3"]


def test_a_step_that_goes_back_within_a_log_replaces(job: Any, runs_of: Any) -> None:
    written = job()
    written.train(5, falling)
    written.log.resume(2)
    written.train(1, lambda _: {"loss": 7.0}).end()
    (run,) = runs_of()
    assert [point.step for point in run.points] == [1, 2, 3]
    assert run.last("loss") == 7.0
    assert run.steps == 6


def test_ranks_and_models(job: Any, runs_of: Any) -> None:
    for model in ("0", "1"):
        for rank in (1, 0):
            job(rank=rank, model=model).train(2 + rank, falling if rank == 1 else None).end()
    runs = runs_of()
    assert [run.name for run in runs] == ["run model 0", "run model 1"]
    for run in runs:
        assert [(rank.rank, rank.steps) for rank in run.ranks] == [(0, 2), (1, 3)]
        assert run.rank == 1, "the lowest rank that logged a metric"
        assert run.steps == 3


def test_names(job: Any, runs_of: Any) -> None:
    job("a", policy="q8").train(1, falling)
    job("b", policy="q4").train(1, falling)
    job("c", policy="q4").train(1, falling)
    assert [run.name for run in runs_of("a")] == ["a"]
    assert [run.name for run in runs_of("a", "b")] == ["q8", "q4"]
    assert [run.name for run in runs_of("a", "b", "c")] == ["a", "b", "c"]


def test_files_of_one_stem(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / folder / "run.jsonl" for folder in ("x", "y")]
    for file in files:
        file.parent.mkdir()
        Job(file, monkeypatch).train(1, falling)
    assert [run.name for run in gather(files)[0]] == [str(file) for file in files]


def test_time_and_bytes_to_a_target(job: Any, runs_of: Any) -> None:
    job("fast", step_s=0.1).train(4, falling).end()
    job("slow", step_s=1.0).train(20, falling).end()
    runs = runs_of("fast", "slow")
    target = target_of("loss=2.5", runs)
    assert str(target) == "loss ≤ 2.5"
    reached = runs[1].first_at(target)
    assert (reached.step, reached.seconds, reached.megabytes) == (4, 4.0, pytest.approx(0.4))
    text = printed(runs, target=target)
    assert "first reached by fast, after 0.4 s; with the fewest bytes by fast, 0.4 MB" in text
    assert runs[0].first_at(target_of("loss=1", runs)) is None
    assert "first reached by slow, after 10.0 s" in printed(runs, target=target_of("loss=1", runs))
    assert "no run reached it" in printed(runs, target=target_of("loss=0.1", runs))


@pytest.mark.parametrize(
    ("metric", "values", "lower"),
    [
        ("loss", (1, 2), True),
        ("val_perplexity", (3, 3), True),
        ("accuracy", (0.1, 0.9), False),
        ("wer", (0.9, 0.1), True),
        ("bleu", (10, 30), False),
    ],
)
def test_which_way_is_better(
    job: Any, runs_of: Any, metric: str, values: tuple[float, float], lower: bool
) -> None:
    job().train(2, lambda step: {metric: values[step - 1]})
    assert target_of(f"{metric}=1", runs_of()).lower_is_better is lower


def test_targets_that_cannot_be(job: Any, runs_of: Any) -> None:
    job().train(2, falling)
    for text in ("loss", "loss=low", "=", ""):
        with pytest.raises(InvalidArgument, match=r"--target: expected[\s\S]*hint:"):
            target_of(text, runs_of())
    with pytest.raises(InvalidArgument, match=r"that was logged \(loss\), got 'accuracy'"):
        target_of("accuracy=1", runs_of())


def test_runs_are_compared_where_all_of_them_came(job: Any, runs_of: Any) -> None:
    job("short", step_s=2.0).train(5, falling).end()
    job("long", step_s=1.0).train(40, falling).end()
    job("silent").train(1).end()
    runs = runs_of("short", "long", "silent")
    assert [reached_by_all(runs, by) for by in By] == [5, 10.0, pytest.approx(0.5)]
    text = printed(runs, by=By.SECONDS)
    assert "metrics at 10.0 s, which all runs reached" in " ".join(text.split())
    table = text[text.index("Runs") : text.index("MB: sent")].splitlines()
    rows = {name: cells[0] for name, *cells in map(str.split, filter(str.strip, table[5:]))}
    assert rows == {"short": "2", "long": "1", "silent": "-"}


def test_a_residual_that_keeps_growing_is_named(job: Any, runs_of: Any) -> None:
    shapes: dict[str, Callable[[int], float]] = {
        "linear": lambda n: float(n),
        "root": lambda n: n**0.5,
        "settled": lambda n: 1 - 0.5**n,
        "noise": lambda n: 1.0 + n % 2,
        "zero": lambda n: 0.0,
        "hump": lambda n: n if n < 30 else 60.0 - n,
    }
    grows = {}
    for name, norm in shapes.items():
        written = job(name)
        for n in range(1, 41):
            written.native.norms = [norm(n), 0.0]
            written.train(1, falling)
        (run,) = runs_of(name)
        grows[name] = run.layers[0].growth is not None
        said = "the residual of 0.weight keeps growing" in printed([run])
        assert said == grows[name]
    assert grows == {
        "linear": True, "root": True, "settled": False, "noise": False, "zero": False,
        "hump": False,
    }  # fmt: skip


def test_few_samples_say_nothing_of_growth(job: Any, runs_of: Any) -> None:
    written = job()
    for n in range(7):
        written.native.norms = [float(n), 0.0]
        written.train(1, falling)
    assert runs_of()[0].layers[0].growth is None


def test_the_rank_that_the_others_wait_for(job: Any, runs_of: Any) -> None:
    for rank, wait in enumerate((4.0, 0.5, 5.0)):
        written = job(rank=rank)
        written.native.figures["wait_seconds"] = wait
        written.train(20).end()
    (run,) = runs_of()
    slow = straggler(run)
    assert slow is not None
    assert slow.rank == 1
    assert "rank 1 waited 0.5 s, less than half of what the others did" in printed([run])
    even = [replace(rank, wait_seconds=4.0) for rank in run.ranks]
    run.ranks = even
    assert straggler(run) is None
    run.ranks = [*even[:2], replace(even[2], wait_seconds=None)]
    assert straggler(run) is None
    run.ranks = [replace(even[0], wait_seconds=0.01), *(replace(r, wait_seconds=0.1) for r in even)]
    assert straggler(run) is None, "nobody waits for long"


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_figure_is_cut_on_a_narrow_terminal(job: Any, runs_of: Any, width: int) -> None:
    for n, policy in enumerate(("topk:0.001,values=q8,select=carried", "powersgd:4")):
        written = job(f"{n}", policy=policy, step_s=100.0)
        written.native.figures["layers"][0] |= {
            "name": "decoder.layers.11.self_attn.out_proj.weight",
            "codec": policy,
            "elements": 100_000_000,
            "slot_bytes": 123_456_789,
        }
        written.native.norms = [1234.5, 0.0]
        written.train(12, lambda step: {"loss": 1 / step, "accuracy": 0.1234567 * step}).end()
    text = printed(runs_of("0", "1"), width, target=target_of("loss=0.5", runs_of("0", "1")))
    assert "…" not in text
    tables_only = [line for line in text.splitlines() if not line.startswith("#")]
    for figure in ("123,456,789", "1,234", "200.0"):
        assert any(figure in line for line in tables_only), figure


def test_names_are_no_markup(job: Any, runs_of: Any) -> None:
    written = job("[red]run", policy="[bold]q8[/bold]")
    written.native.figures["layers"][0]["name"] = "[link=x]w"
    written.train(1, lambda _: {"[/]": 1.0}).end()
    text = printed(runs_of("[red]run"))
    for name in ("[red]run", "[bold]q8[/bold]", "[/]"):
        assert name in text
    assert "\x1b[2J" not in text


def run_report(
    *arguments: Any, folder: pathlib.Path, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "thinwire.cli", "report", *map(str, arguments)],
        cwd=folder, env=environment(**env), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def without(module: str, folder: pathlib.Path) -> str:
    """A PYTHONPATH on which the module cannot be imported."""
    hidden = folder / f"no_{module}"
    hidden.mkdir()
    (hidden / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}')\n")
    return os.pathsep.join([str(hidden), environment()["PYTHONPATH"]])


def test_the_command_without_torch(job: Any, tmp_path: pathlib.Path) -> None:
    job("one").train(5, falling).end()
    job("two", policy="q4").train(5, falling).end()
    done = run_report(
        "one.jsonl", "two.jsonl", "--json", "all.json", "--target", "loss=5", "--by", "step",
        folder=tmp_path, PYTHONPATH=without("torch", tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        "# q8: one.jsonl, policy q8, 2 ranks, torch 2.13.0",
        "wrote out/report/metrics.png",
        "wrote out/report/layers.png",
        "wrote all.json",
        "open:  xdg-open out/report/metrics.png",
    ):
        assert words in done.stdout
    for name in ("metrics", "layers"):
        assert (tmp_path / "out" / "report" / f"{name}.png").read_bytes().startswith(PNG)
    runs = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["q8", "q4"]
    assert runs[0]["to_target"]["step"] == 2
    assert runs[0]["final"] == {"loss": 2.0}


def test_the_command_without_matplotlib(job: Any, tmp_path: pathlib.Path) -> None:
    job().train(5, falling).end()
    path = without("matplotlib", tmp_path)
    done = run_report("run.jsonl", folder=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "Layers of run" in done.stdout
    assert "no pictures (No module named matplotlib); pip install matplotlib" in done.stdout
    assert "wrote" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_command(job: Any, tmp_path: pathlib.Path) -> None:
    job().train(1, falling).end()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "runs.jsonl").write_text('{"kind": "header", "machine": "m"}\n{"kind": "run"}\n')
    for arguments, words in (
        (["missing.jsonl"], "missing.jsonl: cannot read it: No such file or directory"),
        (["run.jsonl", "empty.jsonl"], "empty.jsonl: expected a run log"),
        (
            ["runs.jsonl"],
            "line 1: expected kind start, resume, plan, metrics, layers, end, got 'header'",
        ),
        (["run.jsonl", "--target", "acc=1"], "that was logged (loss), got 'acc'"),
        (["run.jsonl", "--out", "run.jsonl/x"], "report: cannot write run.jsonl/x: Not a dir"),
        (["run.jsonl", "--json", "no/x.json"], "report: cannot write no/x.json: No such file"),
    ):
        done = run_report(*arguments, folder=tmp_path)
        assert done.returncode == 2, arguments
        assert words in done.stderr
        assert "hint: " in done.stderr
        assert "Traceback" not in done.stderr
    assert run_report(folder=tmp_path).returncode == 2
    assert run_report("run.jsonl", "--by", "hours", folder=tmp_path).returncode == 2


def test_what_there_is_of_a_job_that_has_just_started(
    job: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job()
    with open(tmp_path / "run.jsonl", "a") as file:
        file.write('{"kind": "metr')
    report([tmp_path / "run.jsonl"], tmp_path / "out", None, None, None)
    out, err = capsys.readouterr()
    assert "thinwire: warning: " in err
    assert "1 of 2 lines left out: line 2: not whole JSON, a torn line" in err
    assert "run: no metrics; reducer.log(loss=loss.item())" in out
    assert "rank 0 has no end line" in out
    assert "residual norms come with reducer.log()" in out
    assert not (tmp_path / "out" / "metrics.png").exists()
    assert (tmp_path / "out" / "layers.png").read_bytes().startswith(PNG)


def test_metrics_that_were_not_finite_are_counted(job: Any, runs_of: Any) -> None:
    job().train(6, lambda step: {"loss": float("nan") if step > 3 else 1.0}).end()
    (run,) = runs_of()
    assert run.not_finite == {"loss": 3}
    assert run.last("loss") == 1.0
    assert "loss was NaN or Inf in 3 lines" in printed([run])


def test_pictures_of_strange_names_and_many_layers(
    job: Any, runs_of: Any, tmp_path: pathlib.Path, recwarn: pytest.WarningsRecorder
) -> None:
    for n in range(9):
        written = job(f"_run{n}", policy=f"q{n}$_a$")
        layer = written.native.figures["layers"][0]
        written.native.figures["layers"] = [layer | {"name": f"_$x_{i}"} for i in range(40)]
        written.native.norms = [1.0] * 40
        written.log.start(2, written.policy, "2.13.0")
        written.train(3, lambda step: {f"m_{i}$": step for i in range(8)}).end()
    runs = [run for n in range(9) for run in runs_of(f"_run{n}")]
    assert plots.metrics(runs, None, tmp_path / "m.png")
    assert plots.layers(runs[1:3], tmp_path / "l.png")
    assert (tmp_path / "m.png").read_bytes().startswith(PNG)
    assert (tmp_path / "l.png").read_bytes().startswith(PNG)
    assert [str(warning.message) for warning in recwarn] == []
    text = printed(runs[1:2])
    assert "10 smaller compressed layers: --json" in text
    assert "more metrics in --json: m_4$" in " ".join(text.split())


def test_no_pictures_of_nothing(job: Any, runs_of: Any, tmp_path: pathlib.Path) -> None:
    written = job()
    for layer in written.native.figures["layers"]:
        layer["codec"] = "none"
    written.log.start(2, "none", "2.13.0")
    written.train(2).end()
    run = runs_of()[-1]
    assert not plots.metrics([run], None, tmp_path / "m.png")
    assert not plots.layers([run], tmp_path / "l.png")
    assert list(tmp_path.glob("*.png")) == []
    assert "none is compressed; 2 layers of 8,192 elements go dense" in printed([run])
