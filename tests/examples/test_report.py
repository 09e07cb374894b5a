"""Tables, files, pictures and derived figures of the demo, on made-up records."""

import io
import json
import re

import pytest
from rich.console import Console

from examples.demo import plots, report
from examples.demo.records import (
    CurvePoint,
    RunRecord,
    dense_mb,
    groups,
    read_json_lines,
    write_json_lines,
)


def record(method="none", label="plain DDP (fp32)", link="1gbit", task="mnist", **values):
    base = {
        "task": task,
        "task_title": "MNIST MLP" if task == "mnist" else "char LSTM",
        "workload": "some model",
        "link": link,
        "method": method,
        "label": label,
        "hosts": 4,
        "parameters": 1_000_000,
        "budget_s": 12.0,
        "seconds": 11.5,
        "steps": 100,
        "step_ms": 120.0,
        "bound_ms": 60.0,
        "wire_mb_step": 6.0,
        "metric": "accuracy" if task == "mnist" else "perplexity",
        "unit": "%" if task == "mnist" else "",
        "higher_is_better": task == "mnist",
        "target": 90.0 if task == "mnist" else 20.0,
        "value": 93.0,
        "replicas_identical": True,
        "curve": [
            CurvePoint(0.0, 0.0, 0, 20.0),
            CurvePoint(4.0, 200.0, 33, 89.9),
            CurvePoint(8.0, 400.0, 66, 90.0),
            CurvePoint(12.0, 600.0, 100, 89.0),
        ],
    }
    return RunRecord(**{**base, **values})


def printed(records, width=100):
    out = io.StringIO()
    report.show(Console(file=out, width=width), records)
    return out.getvalue()


def test_time_to_target_is_the_first_evaluation_that_reached_it():
    assert record().time_to_target == 8.0
    assert record(target=95.0).time_to_target is None


def test_time_to_target_where_less_is_better():
    curve = [CurvePoint(t, t, 0, value) for t, value in ((0.0, 60.0), (2.0, 21.0), (4.0, 19.0))]
    assert record(task="lstm", curve=curve).time_to_target == 4.0
    assert record(task="lstm", curve=curve[:2]).time_to_target is None


def test_ratios_are_against_a_ring_allreduce():
    assert dense_mb(1_000_000, 4) == pytest.approx(6.0)
    assert record().ratio_fp32 == pytest.approx(1.0)
    assert record(wire_mb_step=0.06).ratio_fp32 == pytest.approx(100.0)
    assert record(wire_mb_step=0.06).ratio_bf16 == pytest.approx(50.0)


def test_table_shows_every_figure():
    row = report.cells(record(wire_mb_step=0.06))
    assert row == [
        "plain DDP (fp32)",
        "120",
        "2.00",
        "0.06",
        "100x",
        "50.0x",
        "93.0 %",
        "8.0 s",
        "yes",
    ]
    assert len(row) == len(report.COLUMNS)


def test_not_reached_and_differing_replicas_are_said():
    row = report.cells(record(target=99.0, replicas_identical=False))
    assert row[-2:] == ["not reached", "NO"]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_figure_is_cut_on_a_narrow_terminal(width):
    name = "thinwire topk:0.01,values=q8"
    runs = [record(), record("thinwire:x", name, target=98.0, wire_mb_step=0.0956, step_ms=3333.3)]
    text = printed(runs, width)
    assert "…" not in text
    assert text.count(" yes") == 2
    assert "not reached" in text
    assert all(len(line) <= width for line in text.splitlines())


def test_failed_run_has_its_reason_and_no_figures():
    failed = record("thinwire:q4", "thinwire q4", failed="rank 2 died of SIGABRT: boom")
    assert report.cells(failed)[1:] == ["failed"] + ["-"] * (len(report.COLUMNS) - 2)
    assert "rank 2 died of SIGABRT: boom" in printed([record(), failed])


def test_verdict_names_whoever_won():
    slow = record("thinwire:q4", "thinwire q4", step_ms=240.0, value=80.0)
    sentence = report.verdict([record(), slow])
    assert "best accuracy 93.0 % by plain DDP (fp32)" in sentence
    assert "shortest step 120 ms by plain DDP (fp32)" in sentence
    fast = record("thinwire:q4", "thinwire q4", step_ms=60.0, value=95.0)
    assert "2.0 times faster than plain DDP (fp32)" in report.verdict([record(), fast])
    assert report.verdict([record()]) == ""


def test_json_lines_round_trip(tmp_path):
    records = [record(), record("thinwire:q4", "thinwire q4", failed="no")]
    file = tmp_path / "runs.jsonl"
    write_json_lines(file, {"machine": "m"}, records)
    head, read = read_json_lines(file)
    assert head == {"machine": "m"}
    assert read == records
    line = json.loads(file.read_text().splitlines()[1])
    assert line["time_to_target"] == 8.0
    assert line["over_bound"] == 2.0


def test_groups_keep_the_order():
    records = [record(link="a"), record(link="b"), record(link="a", method="fp16")]
    assert [[r.link for r in g] for g in groups(records, "task", "link")] == [["a", "a"], ["b"]]


def test_a_method_has_one_colour_and_no_two_methods_share_one():
    names = ["none", "fp16", "powersgd:1", "thinwire:topk:0.01", "thinwire:q4", "thinwire:q8"]
    given = plots.colours(names)
    assert len(set(given.values())) == len(names)
    assert plots.colours(names[:4])["thinwire:topk:0.01"] == given["thinwire:topk:0.01"]


def test_pictures_and_page_hold_all_they_show(tmp_path):
    runs = [
        record(link=link, task=task, method=m, label=m)
        for task in ("mnist", "lstm")
        for link in ("1gbit", "100mbit")
        for m in ("none", "thinwire:q4")
    ]
    runs.append(record("fp16", "<fp16>", failed="died & gone", link="100mbit", task="lstm"))
    files = [tmp_path / "demo.png", tmp_path / "curves.png"]
    plots.overview(runs, files[0])
    plots.curves(runs, files[1])
    page = report.page({"command": "python -m examples.demo"}, runs, files)
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<table>") == 4
    assert "&lt;fp16&gt;" in page
    assert "died &amp; gone" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must fetch nothing"
