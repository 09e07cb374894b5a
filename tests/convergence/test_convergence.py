"""The harness on two ranks and a few steps: killed, resumed, tabulated; its rules on made-up
runs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples.pytorch import minilm
from tests.convergence import runs, table
from tests.convergence.__main__ import main
from tests.convergence.methods import (
    METHODS,
    MORE_SEEDS,
    ROWS,
    baseline_of,
    methods_of,
    settings_of,
)
from tests.convergence.runs import Choice, store, training_run, training_runs
from tests.convergence.settings import RECIPES, rate_factor
from tests.convergence.tasks import TASKS

# Cosines of sentences that transformers 5.23.0 gives with the same files.
NEAR, FAR = 0.755337, -0.109705
ROOT = Path(__file__).resolve().parents[2]
SOURCES = [str(ROOT), str(ROOT / "cluster" / "lab"), str(ROOT / "integrations" / "torch")]
TINY = ["--task", "cnn", "--ranks", "2", "--steps", "4", "--seeds", "1"]


def test_killed_then_resumed_then_tabulated(tmp_path, monkeypatch, capfd):
    path = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("NO_COLOR", "1")
    tiny = [*TINY, "--method", "none", "--method", "q4", "--out", str(tmp_path)]
    file = tmp_path / "cnn.jsonl"
    killed = subprocess.Popen([sys.executable, "-m", "tests.convergence", *tiny], cwd=ROOT)
    while not file.exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (first,) = file.read_text().splitlines()

    assert main(tiny) == 0
    assert "2 runs, 1 of them finished before" in capfd.readouterr().err
    again, line = file.read_text().splitlines()
    assert again == first
    record = json.loads(line)
    assert [point["step"] for point in record["curve"]] == [0, 1, 2, 3, 4]
    assert 0 < record["wire_bytes"] < json.loads(first)["wire_bytes"] / 4
    assert record["hash"] != json.loads(first)["hash"]

    docs = tmp_path / "docs"
    docs.mkdir()
    assert main(["table", *tiny, "--docs", str(docs)]) == 0
    text = (docs / "convergence.md").read_text()
    assert f"| thinwire q4 | {record['final']:.2f} ± - (1 of 1) | - | - |" in text
    assert "| thinwire bf16 | - | - | - |" in text
    assert (docs / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_what_thinwire_lacks_is_said(tmp_path, monkeypatch):
    from examples.demo.hosts import LoopbackHosts
    from tests.convergence import methods, runner

    def lacking(name):
        raise methods.NotAvailableError(name)

    monkeypatch.setattr(methods, "_ours", lacking)
    said = []
    choice = Choice(("cnn",), ("dgc",), seeds=1, steps=4, ranks=2)
    done = runner.make_all(
        training_runs(choice), tmp_path, lambda _: LoopbackHosts(2), None, said.append
    )
    assert not done
    assert any("not available" in line for line in said)
    row = rows_of(tmp_path, choice)["dgc"]
    assert table.cells(row, row, [])[1] == "not available"


def record(out, choice, method, seed, curve):
    points = [
        {"step": step, "loss": 1.0, "metric": metric, "wire_bytes": 1e6 * step}
        for step, metric in curve
    ]
    ended = {
        "curve": points,
        "final": curve[-1][1],
        "wire_bytes": points[-1]["wire_bytes"],
        "seconds": 1.0,
        "versions": {"machine": "m", "torch": "t"},
    }
    store(training_run(choice, "cnn", method, seed), out, ended)


def rows_of(out, choice):
    return {row.method.name: row for row in table.read(choice, out, ["1gbit"])["cnn"]}


def test_verdicts(tmp_path):
    choice = Choice(("cnn",), seeds=2)
    for seed, end in ((1, 97.0), (2, 99.0)):  # mean 98, sd 1.41
        record(tmp_path, choice, "none", seed, [(10, 90.0), (20, end)])
        record(tmp_path, choice, "q4", seed, [(10, 98.0), (20, end - 0.5)])
        record(tmp_path, choice, "q2", seed, [(10, 90.0), (20, end - 2)])
        record(tmp_path, choice, "onebit", seed, [(10, 90.0), (20, None if seed == 1 else 97.0)])
    rows = rows_of(tmp_path, choice)
    base = rows["none"]
    assert table.gap(rows["q4"], base) == pytest.approx(-0.5 / 2**0.5)
    assert table.verdict(rows["q4"], base) == "yes"
    assert table.verdict(rows["q2"], base) == "no, gap 2.00"
    assert table.verdict(rows["onebit"], base) == "no, 1 of 2 diverged"
    assert table.verdict(rows["bf16"], base) == "-"
    more = rows_of(tmp_path, dataclasses.replace(choice, seeds=3))
    assert table.verdict(more["q4"], more["none"]) == "-"
    assert table.cells(rows["q4"], base, [])[5:] == ["10", "10"]
    assert table.cells(rows["q2"], base, [])[5:] == ["never", "never"]


def test_time_to_target_counts_dense_steps_as_the_baselines(tmp_path):
    choice = Choice(("cnn",), seeds=1)
    dense = METHODS["dgc"].dense_steps(RECIPES["cnn"])
    curve = [(dense, 90.0), (2 * dense, 98.0)]
    for method in ("none", "q4", "dgc"):
        record(tmp_path, choice, method, 1, curve)
    rows = rows_of(tmp_path, choice)
    assert table.seconds_to_target(rows["q4"], rows["none"], "1gbit") is None
    for row, seconds in ((rows["none"], 1.0), (rows["q4"], 0.5), (rows["dgc"], 0.1)):
        row.step_s["1gbit"] = seconds
    assert table.seconds_to_target(rows["q4"], rows["none"], "1gbit") == pytest.approx(dense)
    assert table.seconds_to_target(rows["dgc"], rows["none"], "1gbit") == pytest.approx(1.1 * dense)


def test_other_settings_are_another_run(tmp_path):
    choice = Choice(("cnn",), seeds=1)
    record(tmp_path, choice, "none", 1, [(10, 98.0)])
    run = training_run(choice, "cnn", "none", 1)
    assert runs.finished(run, tmp_path) is not None
    other = training_run(dataclasses.replace(choice, steps=5), "cnn", "none", 1)
    assert runs.finished(other, tmp_path) is None
    store(run, tmp_path, {"error": "boom"})
    assert runs.finished(run, tmp_path) is None
    assert runs.stored(run, tmp_path)["error"] == "boom"


def test_every_method_has_its_own_settings_and_a_baseline():
    for task, recipe in RECIPES.items():
        rows = methods_of(task)
        settings = [settings_of(task, row, recipe, 3) for row in rows]
        decided = {json.dumps({**s, "method": ""}, sort_keys=True) for s in settings}
        assert len(decided) == len(rows)
        for row in rows:
            assert baseline_of(task, row) in {r.name for r in rows}
        assert training_runs(Choice(tasks=(task,)))[0].method == "none"


def test_every_method_is_a_row_of_some_task():
    assert {method.name for task in RECIPES for method in methods_of(task)} == set(METHODS)


def test_dgc_clips_each_ranks_gradient_and_others_the_reduced_one():
    recipe = RECIPES["lstm"]
    dgc, topk = (settings_of("lstm", METHODS[name], recipe, 3) for name in ("dgc", "topk"))
    assert (dgc["clip"], dgc["optimizer"]["clip"]) == (None, recipe.clip)
    assert topk["clip"] == recipe.clip
    assert "clip" not in topk["optimizer"]


def test_baselines_of_small_tasks_come_first_and_every_method_once_before_other_seeds():
    order = training_runs(Choice())
    baselines = [run for run in order if run.task in runs.SMALL and run.method == "none"]
    assert order[: len(baselines)] == baselines
    first = [i for i, run in enumerate(order) if run.seed == 1]
    later = [i for i, run in enumerate(order) if run.seed > 1 and run.method != "none"]
    assert max(first) < min(later)
    assert len({(run.file(Path()), run.place) for run in order}) == len(order)


def test_rows_with_more_seeds_have_baselines_with_as_many():
    for (task, method), seeds in MORE_SEEDS.items():
        assert method in ROWS[task]
        assert seeds > RECIPES[task].seeds
        assert MORE_SEEDS[task, baseline_of(task, METHODS[method])] == seeds
        assert Choice().seeds_of(task, method) == seeds
        assert Choice(seeds=2).seeds_of(task, method) == 2
    assert Choice().seeds_of("cnn", "none") == RECIPES["cnn"].seeds


def test_learning_rate_rises_and_falls():
    factors = [rate_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1.0
    assert factors[-1] < 0.001


@pytest.mark.parametrize("name", list(TASKS))
def test_tasks_depend_on_their_seed_alone(name):
    task = TASKS[name]
    task.prepare()
    made = task()
    models = [made.model(seed).eval() for seed in (1, 1, 2)]
    (x, y), (again, _), (other, _) = (next(made.batches(rank, 4, 1)) for rank in (0, 0, 1))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    with torch.no_grad():
        losses = [float(made.loss(model, x, y)) for model in models]
    assert losses[0] == losses[1] != losses[2]


def test_minilm_gives_the_published_vectors():
    """Two sentences that mean nearly the same, one that does not."""
    minilm.prepare()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm._model_folder() / "tokenizer.json"))
    tokenizer.enable_padding(length=minilm.TOKENS)
    said = ["A man is eating food.", "A man is eating a piece of bread.", "The girl rides a horse."]
    tokens = torch.tensor([tokenizer.encode(text).ids[: minilm.TOKENS] for text in said])
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(minilm.pretrained().eval()(tokens))
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert (near, far) == pytest.approx((NEAR, FAR), abs=1e-5)


@pytest.mark.parametrize("task", [task for task in TASKS if "zeroone-adam" in ROWS[task]])
def test_zeroone_adam_ends_with_an_exchange(task: str) -> None:
    """Its ranks' weights differ between two."""
    settings = training_run(Choice(), task, "zeroone-adam", 1).settings
    optimizer = settings["optimizer"]
    step = frozen = optimizer["var_freeze_step"]
    while step < settings["steps"]:
        doublings = (step - frozen) // optimizer["local_step_scaler"]
        step += min(2**doublings, optimizer["local_step_clipper"])
    assert step == settings["steps"]
