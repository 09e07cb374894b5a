"""The step-time benchmark: its figures and verdicts on made-up pairs, and its command line."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from examples.demo import plots
from examples.demo.records import crossing, link_bits, link_text
from tests.bench import step_time
from tests.bench.step_time import Limit, Pair, Result

TOPK = "thinwire:topk:0.01,values=q8"


def result(method="none", link="1gbit", ratios=(5.0, 6.0, 5.5), **values):
    pairs = [Pair(100.0, 100.0 * ratio, 20, 6.0) for ratio in ratios]
    base = {"parameters": 1_000_000, "pairs": pairs, "metric": "accuracy", "values": [93.0]}
    title = "MNIST MLP"
    return Result("mnist", title, "model", link, method, method, 4, **{**base, **values})


def test_figures_are_medians_over_the_pairs():
    one = result()
    assert one.ratio == 5.5
    assert one.spread == (5.0, 6.0)
    assert one.step_ms == pytest.approx(550.0)
    assert one.bound_ms == 100.0
    assert one.ratio_fp32 == pytest.approx(1.0)


def test_wire_bytes_weigh_segments_by_their_steps():
    pairs = [Pair(1.0, 1.0, 1, 10.0), Pair(1.0, 1.0, 3, 2.0)]
    assert result(pairs=pairs).wire_mb_step == pytest.approx(4.0)


def test_json_round_trip():
    one = result(TOPK, failed="", replicas_identical=False, trained_steps=300)
    saved = json.loads(json.dumps(one.as_json()))
    assert saved["ratio"] == 5.5
    assert saved["ratio_bf16"] == pytest.approx(0.5)
    assert Result.from_json(saved) == one
    assert Result.from_json(result(pairs=[], failed="no").as_json()).failed == "no"


def test_table_names_the_winner_and_the_failed():
    out = io.StringIO()
    results = [
        result(),
        result(TOPK, ratios=(1.1, 1.3, 1.2)),
        result("fp16", pairs=[], failed="boom"),
    ]
    step_time.show(Console(file=out, width=100), results, accuracy=False)
    text = out.getvalue()
    assert "1.20" in text
    assert "1.10-1.30" in text
    assert "failed: fp16: boom" in text
    assert f"fastest: {TOPK}, 1.20 times the bound step" in text
    assert "next: none, 4.58 times as long" in text


def test_limits_set_what_is_not_met():
    results = [result(), result(TOPK, ratios=(1.2,))]
    met = Limit.parse(f"mnist/{TOPK}@1gbit<=1.3")
    assert met == Limit("mnist", TOPK, "1gbit", 1.3)
    assert step_time.complaints_of(results, [met]) == []
    assert len(step_time.complaints_of(results, [Limit.parse("none@1gbit<=2")])) == 1
    assert len(step_time.complaints_of(results, [Limit.parse("none@100mbit<=9")])) == 1
    assert len(step_time.complaints_of(results, [Limit.parse("lstm/none@1gbit<=9")])) == 1
    differ = [result(replicas_identical=False), result(pairs=[], failed="boom")]
    assert len(step_time.complaints_of(differ, [])) == 2


def test_accuracy_is_judged_against_plain_ddp_on_the_same_link():
    plain = result(values=[94.0, 93.0])
    assert step_time.judge_accuracy([plain, result(TOPK, values=[92.0, 93.0])]) == []
    assert len(step_time.judge_accuracy([plain, result(TOPK, values=[92.0, 92.9])])) == 1
    assert step_time.judge_accuracy([plain, result(TOPK, "100mbit", values=[50.0])]) == []


def test_a_perplexity_is_better_where_it_is_less():
    def lstm(method, values):
        return dataclasses.replace(result(method), task="lstm", values=values)

    plain = lstm("none", [10.0])
    assert step_time.judge_accuracy([plain, lstm(TOPK, [5.0]), lstm("fp16", [10.1])]) == []
    assert len(step_time.judge_accuracy([plain, lstm(TOPK, [10.3])])) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "topk:0.01"], "unknown method 'topk:0.01'"),
        (["--method", "bound"], "measured anyway"),
        (["--limit", "none<=2"], "expected [TASK/]METHOD@LINK<=RATIO"),
        (["--limit", "none@1gbit<=x"], "is not a number"),
        (["--accuracy", "--rounds", "7"], "must divide 300"),
        (["--accuracy", "0"], "leave timed steps"),
        (["--rounds", "0"], "1 or more"),
        (["--accuracy", "--rounds", "0"], "1 or more"),
        (["--loopback", "--rate", "1gbit"], "--rate cannot be given"),
    ],
)
def test_bad_input_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        step_time.parse(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_accuracy_trains_exactly_the_stated_steps():
    arguments = step_time.parse(["--accuracy", "--rounds", "5"])
    assert arguments.rounds * (arguments.steps + arguments.warm) == 300
    assert arguments.seeds == 3
    arguments = step_time.parse(["--accuracy", "600"])
    assert arguments.rounds * (arguments.steps + arguments.warm) == 600


def test_links_as_numbers_and_words():
    assert link_bits("100mbit") == 1e8
    assert link_bits("2.5gbit") == 2.5e9
    assert link_bits("loopback") is None
    assert link_text("100mbit") == "100 Mbit/s"
    assert link_text("loopback") == "loopback"


def test_crossing_of_two_power_laws_is_found_exactly():
    xs = [1e7, 1e8, 1e9, 1e10]
    met = crossing(xs, [1e12 / x for x in xs], [math.sqrt(x) for x in xs])
    assert met is not None
    assert met[0] == pytest.approx(1e8)
    assert met[1] == pytest.approx(1e4)
    assert crossing(xs, [2.0] * 4, [1.0] * 4) is None
    assert crossing(xs, [1.0] * 4, [1.0] * 4) is None


def test_bandwidth_picture(tmp_path):
    links = ("10mbit", "100mbit", "1gbit", "10gbit")
    runs = [result("none", link, (r,)) for link, r in zip(links, (400, 40, 5, 1.1), strict=True)]
    runs += [result(TOPK, link, (r,)) for link, r in zip(links, (3, 1.6, 1.3, 1.2), strict=True)]
    file = tmp_path / "rates.png"
    plots.bandwidth([one.rate_point() for one in runs], file)
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no point has a link speed"):
        plots.bandwidth([result(link="loopback").rate_point()], file)
