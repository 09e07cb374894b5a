"""The run log: what is written for whom, and what a reader makes of broken files."""

import json
import math
import multiprocessing
import pathlib
import threading
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thinwire import _run_log
from thinwire._run_log import RunLog, model_label
from thinwire.errors import InvalidArgument
from thinwire.report.run_log import read
from thinwire.torch import Reducer


class Native:
    """In the place of the extension module's reducer."""

    def __init__(self, layers: int = 2) -> None:
        self.norms = [float(i) for i in range(layers)]
        self.calls = 0
        self.figures: dict[str, Any] = {
            "steps": 0, "skipped_steps": 0, "wire_bytes": 0, "dense_wire_bytes": 0, "ratio": 1.0,
            "ratio_bf16": 0.5, "memory_bytes": 8, "buffer_bytes": 16, "encode_seconds": 0.25,
            "decode_seconds": 0.125, "wait_seconds": 0.5,
            "layers": [
                {"name": f"{i}.weight", "elements": 4096, "codec": "q8", "reason": "default",
                 "slot_bytes": 1024, "ratio": 4.0, "nonfinite_steps": 0}
                for i in range(layers)
            ],
        }  # fmt: skip

    def step(self, steps: int = 1) -> None:
        self.figures["steps"] += steps
        self.figures["wire_bytes"] += 100 * steps
        self.figures["dense_wire_bytes"] += 1000 * steps

    def stats(self) -> dict[str, Any]:
        self.calls += 1
        return dict(self.figures)

    def residual_norms(self) -> list[float]:
        return list(self.norms)

    def restore(self, state: dict[str, Any]) -> None:
        pass


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "run.jsonl"


def opened(file: pathlib.Path, native: Native, rank: int = 0, every: int = 10) -> RunLog:
    log = RunLog(file, native, rank, "0", every)
    log.start(2, "q8", "2.13.0")
    return log


def reducer_of(native: Native, log: RunLog | None = None) -> Reducer:
    return Reducer(native, "q8", [], None, lambda callback: None, run_log=log)


def lines_of(file: pathlib.Path, *kinds: str) -> list[dict[str, Any]]:
    # A start beside another rank's writing may take that for a torn line, and leave an empty one.
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    return [line for line in lines if not kinds or line["kind"] in kinds]


def test_every_kind_of_line(file: pathlib.Path) -> None:
    native = Native()
    reducer = reducer_of(native, log := opened(file, native, every=2))
    for loss in (3.0, 2.0, 1.0):
        native.step()
        reducer.log(loss=loss)
    log.end()
    kinds = [line["kind"] for line in lines_of(file)]
    assert kinds == ["start", "metrics", "layers", "metrics", "metrics", "layers", "end"]
    start, first, layers, *_, end = lines_of(file)
    assert all((line["rank"], line["model"]) == (0, "0") for line in lines_of(file))
    assert (start["format"], start["world_size"], start["policy"]) == (1, 2, "q8")
    assert start["layers"][1] == {
        "name": "1.weight", "elements": 4096, "codec": "q8", "reason": "default",
        "slot_bytes": 1024, "ratio": 4.0,
    }  # fmt: skip
    assert (first["step"], first["wire_bytes"], first["dense_wire_bytes"]) == (1, 100, 1000)
    assert (first["encode_seconds"], first["wait_seconds"]) == (0.25, 0.5)
    assert first["values"] == {"loss": 3.0}
    assert first["seconds"] >= 0
    assert layers["residual_norm"] == [0.0, 1.0]
    assert layers["ratio"] == [4.0, 4.0]
    assert layers["slot_bytes"] == [1024, 1024]
    # What --stats has written from the first version on.
    assert {key: end[key] for key in native.figures} == native.figures
    assert end["policy"] == "q8"


def test_nothing_is_done_without_a_log() -> None:
    native = Native()
    reducer_of(native).log(loss="no number, and nobody looks")
    assert native.calls == 0


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2.0)]
)
def test_numbers_of_all_kinds(file: pathlib.Path, value: Any) -> None:
    opened(file, Native()).log(None, {"loss": value})
    assert lines_of(file, "metrics")[0]["values"] == {"loss": 2}


@pytest.mark.parametrize(
    "value", ["2", None, True, [2.0], 2j, torch.ones(2), np.ones(2), torch.tensor(True)]
)
def test_what_is_no_number(file: pathlib.Path, value: Any) -> None:
    log = opened(file, Native())
    with pytest.raises(InvalidArgument, match=r"loss: expected a number, got[\s\S]*hint:"):
        log.log(None, {"loss": value})
    assert lines_of(file, "metrics") == []


def test_nan_is_null_and_said_once(file: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    native = Native()
    native.norms = [math.inf, 1.0]
    log = opened(file, native)
    for value in (math.nan, -math.inf, 10**400):
        log.log(None, {"loss": value, "accuracy": 0.5})
    assert len(caplog.messages) == 1
    assert "loss is nan" in caplog.messages[0]
    assert "null" in caplog.messages[0]
    assert [line["values"]["loss"] for line in lines_of(file, "metrics")] == [None] * 3
    assert lines_of(file, "layers")[0]["residual_norm"] == [None, 1.0]


def test_steps_do_not_go_back(file: pathlib.Path) -> None:
    native = Native()
    log = opened(file, native)
    native.step(3)
    log.log(None, {})
    log.log(np.int64(7), {})
    log.log(7, {"accuracy": 1})
    log.log(None, {})  # the reducer counts 3: the last step that was said holds
    for wrong in (6, -1, 1.5, "8", True):
        with pytest.raises(InvalidArgument, match="step: expected a whole number, 7"):
            log.log(wrong, {})
    assert [line["step"] for line in lines_of(file, "metrics")] == [3, 7, 7, 7]


def test_a_loaded_state_says_where_the_run_goes_on(file: pathlib.Path) -> None:
    native = Native()
    reducer = reducer_of(native, opened(file, native))
    reducer.load_state_dict({"step": 500})
    native.step()
    reducer.log(loss=1)
    assert [line["step"] for line in lines_of(file, "resume", "metrics")] == [500, 501]


def test_a_line_a_second_without_log(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(_run_log.time, "monotonic", lambda: now)
    native = Native()
    log = opened(file, native)
    for tenth in range(35):
        now = tenth / 10
        native.step()
        log.tick()
    metrics = lines_of(file, "metrics")
    assert [line["seconds"] for line in metrics] == [1.0, 2.0, 3.0]
    assert [line["step"] for line in metrics] == [11, 21, 31]
    assert all(line["values"] == {} for line in metrics)
    assert native.calls == 1 + 3


def test_a_full_disk_ends_the_log_and_not_the_training(
    file: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = opened(file, Native())
    log._path = pathlib.Path("/dev/full")
    log.log(None, {"loss": 1})
    log.log(None, {"loss": 1})
    log.end()
    assert len(lines_of(file)) == 1
    assert len(caplog.messages) == 1
    assert "cannot write to /dev/full: No space left on device" in caplog.messages[0]


def test_a_file_that_cannot_be_appended_to(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "missing" / "run.jsonl", tmp_path):
        with pytest.raises(InvalidArgument, match=r"cannot append to[\s\S]*hint:"):
            _run_log.check_file(path)


def _append_many(file: str, rank: int) -> None:
    native = Native(layers=200)
    log = opened(pathlib.Path(file), native, rank, every=3)
    for n in range(300):
        native.step()
        log.log(None, {"loss": n})
    log.end()


def test_several_ranks_append_to_one_file(file: pathlib.Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_append_many, args=(str(file), rank)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(lines_of(file)) == 4 * (1 + 300 + 100 + 1)
    attempts, left_out = read(file)
    assert left_out == []
    assert sorted(attempt.rank for attempt in attempts) == [0, 1, 2, 3]
    for attempt in attempts:
        assert [line.values["loss"] for line in attempt.metrics] == list(range(300))
        assert attempt.end is not None


def test_threads_of_one_process_do_not_mix_lines(file: pathlib.Path) -> None:
    threads = [threading.Thread(target=_append_many, args=(str(file), n)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(file)[1] == []


def test_a_torn_last_line_costs_that_line_only(file: pathlib.Path) -> None:
    native = Native()
    log = opened(file, native)
    for _ in range(3):
        native.step()
        log.log(None, {"loss": 1})
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) - 1):
        file.write_bytes(whole[: len(whole) - 1 - cut])
        attempts, left_out = read(file)
        assert len(attempts[0].metrics) == 2
        assert len(left_out) == 1
        assert "line 5: not whole JSON, a torn line" in left_out[0]
    opened(file, Native())  # a job that is started again: its first line is not glued on
    attempts, left_out = read(file)
    assert len(attempts) == 2
    assert len(left_out) == 1


HOSTILE = {
    "": "an empty file",
    "\n\n": "an empty file",
    "thinwire: policy q8\n": "not whole JSON",
    '{"kind": "metri': "not whole JSON",
    "[1]\n": "expected an object",
    "[" * 100_000: "not whole JSON",
    "1" * 10_000: "not whole JSON",
    "\x00\x01\x1b[2J": "not whole JSON",
    '{"kind": "header", "date": "today"}\n': "got 'header'",
    '{"kind": ["start"]}\n': r"got \['start'\]",
    '{"rank": 0, "steps": 3}\n': "got None",
    '{"kind": "start"}\n': "format: expected a whole number, 0 or more, got nothing",
    '{"kind": "start", "format": 2}\n': "a newer version's",
    '{"kind": "start", "format": 1, "world_size": -1, "layers": []}': "world_size: expected",
    '{"kind": "start", "format": 1, "world_size": 1, "layers": [3]}': "a list of objects",
    '{"kind": "resume", "step": 1, "rank": 0, "model": "0"}': "no line of kind start before it",
}


@pytest.mark.parametrize(("text", "reason"), HOSTILE.items(), ids=range(len(HOSTILE)))
def test_files_that_are_no_run_log(file: pathlib.Path, text: str, reason: str) -> None:
    file.write_text(text)
    with pytest.raises(InvalidArgument, match=f"expected a run log[\\s\\S]*{reason}") as error:
        read(file)
    assert "hint: thinwire run --stats" in str(error.value)
    assert "\x1b" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(InvalidArgument, match="cannot read it"):
            read(path)


WRONG = {
    '"step": 1.5': "metrics: step: expected a whole number, 0 or more, got 1.5",
    '"step": true': "got True",
    f'"step": {2**70}': "metrics: step",
    '"steps": null': "metrics: steps: expected a whole number, 0 or more, got None",
    '"seconds": "soon"': "metrics: seconds: expected a number or null, got 'soon'",
    '"seconds": NaN': "metrics: seconds: expected a number, 0 or more",
    '"seconds": 1e999': "metrics: seconds: expected a number, 0 or more",
    '"wire_bytes": -5': "metrics: wire_bytes",
    '"encode_seconds": null': "metrics: encode_seconds: expected a number, 0 or more, got None",
    '"values": []': "metrics: values: expected an object",
    '"values": {"loss": "2"}': "metrics: loss: expected a number or null",
    '"rank": 1': "rank 1, model 0: no line of kind start before it",
    '"kind": "layers"': "layers: ratio: expected a list, got nothing",
    '"kind": "layers", "ratio": [1], "slot_bytes": [1], "residual_norm": []': "of one length",
    '"kind": "layers", "ratio": [1], "slot_bytes": [1], "residual_norm": [1]': "of 2 layers, got 1",
    '"kind": "end"': "end: layers: expected a list, got nothing",
    '"kind": "plan"': "plan: policy: expected text, got nothing",
    '"kind": "plan", "policy": "q8", "layers": []': "plan: expected 2 layers, got 0",
    '"kind": "new"': "got 'new'",
}


@pytest.mark.parametrize(("fields", "reason"), WRONG.items(), ids=range(len(WRONG)))
def test_a_wrong_line_is_left_out_with_its_reason(
    file: pathlib.Path, fields: str, reason: str
) -> None:
    log = opened(file, Native())
    log.log(None, {"loss": 1})
    good = lines_of(file, "metrics")[0]
    with open(file, "a") as more:
        # Of a name that comes twice the last one counts.
        more.write(json.dumps(good)[:-1] + f", {fields}}}\n")
    attempts, left_out = read(file)
    assert len(attempts[0].metrics) == 1
    assert reason in left_out[0]
    assert "line 4: " in left_out[0]


def test_numbers_that_are_too_large_are_as_null(file: pathlib.Path) -> None:
    opened(file, Native()).log(None, {"loss": 1})
    text = file.read_text()
    for value in ("NaN", "-Infinity", "1e999", "1" + 400 * "0", "null"):
        file.write_text(text.replace('{"loss": 1}', f'{{"loss": {value}}}'))
        attempts, left_out = read(file)
        assert attempts[0].metrics[0].values == {"loss": None}
        assert left_out == []


def test_many_reasons_are_counted(file: pathlib.Path) -> None:
    opened(file, Native())
    with open(file, "a") as more:
        more.write("torn\n" * 9)
    assert read(file)[1][0].startswith("9 of 10 lines left out: line 2: ")
    assert read(file)[1][0].endswith("and 6 more")


@given(st.binary(max_size=300))
def test_any_bytes_after_a_start(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("bytes") / "run.jsonl"
    opened(file, Native())
    with open(file, "ab") as more:
        more.write(data)
    assert len(read(file)[0]) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    ["kind", "rank", "model", "step", "steps", "seconds", "values", "layers", "ratio", "format"]
)


@given(st.integers(0, 3), FIELDS, JSON)
def test_any_value_of_any_field(
    tmp_path_factory: pytest.TempPathFactory, line: int, field: str, value: Any
) -> None:
    file = tmp_path_factory.mktemp("fields") / "run.jsonl"
    log = opened(file, Native())
    log.log(None, {"loss": 1})
    log.end()
    text = file.read_text().splitlines()
    text[line] = json.dumps({**json.loads(text[line]), field: value})
    file.write_text("\n".join(text))
    with nullcontext() if line else suppress(InvalidArgument):  # the only start may be refused
        assert len(read(file)[0]) == 1


def test_models_are_told_apart_by_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run_log, "_models", type(_run_log._models)())
    assert [model_label([0, 1, 2, 3], 4) for _ in range(2)] == ["0", "1"]
    assert [model_label([1, 3], 4) for _ in range(2)] == ["0 on ranks 1,3", "1 on ranks 1,3"]
    assert model_label([0, 2], 4) == "0 on ranks 0,2"
