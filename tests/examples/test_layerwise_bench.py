"""The benchmark of layerwise plans: never more bytes, nor more error, than one codec for all."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.bench import layerwise, table
from tests.bench.layerwise import ErrorFeedback, Job

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("TW_BUILD", ROOT / "build" / "dev"))


class Regression:
    """Three layers, of which one is too small for codecs, on random numbers."""

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(40, 200), nn.Tanh(), nn.Linear(200, 150), nn.Linear(150, 3))

    def batches(self, rank, world, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(8, 40, generator=generator), torch.randn(8, 3, generator=generator)

    def loss(self, model, inputs, targets):
        return nn.functional.mse_loss(model(inputs), targets)


@pytest.fixture(scope="module")
def rows():
    whole = layerwise.BENCH
    layerwise.BENCH = BUILD / "bench" / "layerwise_bench"
    job = Job(Regression(), 4, lambda model: torch.optim.SGD(model.parameters(), 0.1), lambda _: 0)
    yield list(layerwise.rows_of("regression", job, 4))
    layerwise.BENCH = whole


def test_a_row_for_each_recording_set_grid_and_measure(rows):
    sets = sum(len(sets) for sets in layerwise.REFERENCES.values())
    assert len(rows) == 3 * sets * 2 * 3
    keys = ("step", "reference", "set", "grid", "measure")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows)
    assert {row["step"] for row in rows} == {1, 2, 4}


def test_layerwise_sends_no_more_and_loses_no_more(rows):
    for row in rows:
        assert row["bytes"] <= row["uniform_bytes"]
        assert row["error"] <= row["uniform_error"]
        assert row["factor"] >= row["factor_all"] >= 1


def test_sums_are_those_of_the_layers(rows):
    for row in rows:
        layers = row["layers"]
        assert [layer["name"] for layer in layers] == ["0.weight", "2.weight"]
        assert row["dense_bytes"] == 4 * (200 + 150 + 450 + 3)
        power = 2 if row["measure"] == "squares" else 1
        for whose in ("", "uniform_"):
            assert sum(layer[f"{whose}bytes"] for layer in layers) == row[f"{whose}bytes"]
            total = sum(layer[f"{whose}error"] ** power for layer in layers)
            assert total == pytest.approx(row[f"{whose}error"])


def test_more_parameters_to_choose_from_send_no_more(rows):
    """At the same best uniform setting: the fine grid holds those of auto, but its densities are
    rounded otherwise, hence low ranks."""
    by_grid = {"auto": {}, "fine": {}}
    for row in rows:
        if row["set"] == "powersgd":
            key = (row["step"], row["reference"], row["measure"], row["uniform"])
            by_grid[row["grid"]][key] = row["bytes"]
    assert by_grid["fine"]
    for key, sent in by_grid["fine"].items():
        assert sent <= by_grid["auto"].get(key, np.inf) * 1.001


def test_the_table_has_a_line_for_each_set_and_reference(rows):
    for measure in table.LAYERWISE:
        lines = table.layerwise_table(rows, measure).splitlines()
        assert lines[0] == f"| {measure}: codecs, grid | error of | regression |"
        assert len(lines) == 2 + 2 * sum(len(sets) for sets in layerwise.REFERENCES.values())
    one = {"model": "cnn", "grid": "auto", "set": "topk", "measure": "norms", "reference": "topk:1"}
    three = [one | {"factor": 1.5 + i, "factor_all": 1.2 + i} for i in range(3)]
    text = table.layerwise_table(three, "norms")
    assert text.endswith("| topk, auto | `topk:1` | 2.50 [1.50–3.50] / 2.20 |\n")


def test_error_feedback_loses_nothing():
    memory = ErrorFeedback("topk:0.01")
    generator = np.random.default_rng(1)
    total = np.zeros((30, 50), np.float32)
    codec = layerwise.thinwire.codec("topk:0.01")
    sent = np.zeros_like(total)
    for step in range(3):
        gradients = {
            "w": generator.standard_normal((30, 50)).astype(np.float32),
            "bias": np.ones(50, np.float32),
        }
        total += gradients["w"]
        v = memory.add(gradients)
        assert np.array_equal(v["bias"], gradients["bias"])
        sent += codec.decode(codec.encode(v["w"], key="w", step=step))
        memory.end_step(gradients)
    zero = {"w": np.zeros((30, 50), np.float32), "bias": np.zeros(50, np.float32)}
    np.testing.assert_allclose(memory.add(zero)["w"] + sent, total, rtol=1e-5, atol=1e-5)


def test_what_is_no_recording_is_refused(tmp_path):
    (tmp_path / "layers").write_text("w 40 50\n")
    np.ones(1999, np.float32).tofile(tmp_path / "short")
    np.ones(2001, np.float32).tofile(tmp_path / "long")
    np.full(2000, np.nan, np.float32).tofile(tmp_path / "nan")
    np.ones(2000, np.float32).tofile(tmp_path / "good")
    bench = str(BUILD / "bench" / "layerwise_bench")

    def said(values, *words):
        command = [bench, str(tmp_path / "layers"), str(tmp_path / values), *words]
        return layerwise.subprocess.run(command, capture_output=True, text=True, check=False)

    assert "ends before w" in said("short", "topk:0.1", "topk").stderr
    assert "holds more than the layers" in said("long", "topk:0.1", "topk").stderr
    assert "w: not finite" in said("nan", "topk:0.1", "topk").stderr
    assert "expected powersgd, topk, topk-q or all" in said("good", "topk:0.1", "topq").stderr
    assert "expected LAYERS VALUES REFERENCE SET" in said("good", "topk:0.1").stderr
    done = said("good", "topk:0.1", "topk")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 6
