"""`thinwire plan` and `thinwire doctor`: what they say, and what they refuse."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import struct
import subprocess
import sys

import pytest
import torch
from test_cli import thinwire
from thinwire import _codec, _link
from thinwire._doctor import Check, _try
from thinwire._forecast import Situation, forecast, parse_rate, parse_time, save_policy, verdict
from thinwire._link import PairLink
from thinwire._model_file import ModelLayer, read_gradients, read_layers
from thinwire.errors import InvalidArgument, PolicyError

MLP = {"0.weight": [512, 784], "0.bias": [512], "2.weight": [10, 512]}
LAYERS = [ModelLayer(name, tuple(shape), 0) for name, shape in MLP.items()]


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "mlp.json"
    path.write_text(json.dumps(MLP))
    return path


def place(rate: str, step: str = "60ms") -> Situation:
    return Situation(4, parse_rate(rate), 25e-6, parse_time("--step", step))


def test_slow_networks_are_where_it_helps() -> None:
    slow = forecast(LAYERS, ["none", "auto"], place("10mbit"))
    assert slow[1]["step_seconds"] < slow[0]["step_seconds"] / 5
    assert slow[1]["sent_bytes"] < slow[0]["sent_bytes"] / 50
    assert "times as fast" in verdict(slow, place("10mbit"))
    fast = forecast(LAYERS, ["none", "auto"], place("100gbit", "10s"))
    assert "will not help here" in verdict(fast, place("100gbit", "10s"))


def test_none_sends_what_a_ring_sends() -> None:
    (plain,) = forecast(LAYERS, ["none"], place("1gbit"))
    elements = sum(layer["elements"] for layer in plain["layers"])
    assert plain["sent_bytes"] == pytest.approx(2 * 3 / 4 * 4 * elements)
    wire = plain["sent_bytes"] / parse_rate("1gbit")
    assert wire <= plain["exposed_seconds"] + 60e-3
    assert [layer["codec"] for layer in plain["layers"]] == ["none"] * 3


def test_a_saved_plan_is_a_policy(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "plan.toml"
    (chosen,) = forecast(LAYERS, ["auto"], place("10mbit"))
    save_policy(file, chosen["layers"])
    (pinned,) = forecast(LAYERS, [f"@{file}"], place("10mbit"))
    assert [layer["codec"] for layer in pinned["layers"]] == [
        layer["codec"] for layer in chosen["layers"]
    ]
    assert pinned["sent_bytes"] == chosen["sent_bytes"]
    other = [ModelLayer("encoder.weight", (512, 512), 0)]
    with pytest.raises(PolicyError, match=r"0\.weight(.|\n)*encoder\.weight"):
        forecast(other, [f"@{file}"], place("10mbit"))


def test_models_come_from_files_and_functions(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, model: pathlib.Path
) -> None:
    assert read_layers(str(model)) == LAYERS
    checkpoint = tmp_path / "model.pt"
    state = {name: torch.zeros(shape) for name, shape in MLP.items()}
    state["steps"] = torch.zeros(1, dtype=torch.long)
    torch.save({"state_dict": state}, checkpoint)
    assert read_layers(str(checkpoint)) == LAYERS
    header = json.dumps(
        {
            "__metadata__": {},
            "w": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]},
            "i": {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]},
        }
    ).encode()
    tensors = tmp_path / "model.safetensors"
    tensors.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    assert read_layers(str(tensors)) == [ModelLayer("w", (4, 2), 1)]
    (tmp_path / "made_up_model.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(784, 512)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert [layer.shape for layer in read_layers("made_up_model:make")] == [(512, 784), (512,)]


def test_gradients_decide(
    tmp_path: pathlib.Path, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of rank 1 is PowerSGD's, one with few large values top-k's."""
    generator = torch.Generator().manual_seed(1)
    column, row = (torch.randn(n, 1, generator=generator) for n in (512, 784))
    low_rank = column @ row.T
    few = torch.zeros(512, 784)
    few.view(-1)[torch.randperm(few.numel(), generator=generator)[:300]] = 1.0
    chosen = {}
    for name, gradient in (("lowrank", low_rank), ("few", few)):
        file = tmp_path / f"{name}.pt"
        torch.save({"0.weight": gradient}, file)
        known = read_gradients(str(file), LAYERS)
        (plan,) = forecast(LAYERS, ["auto,error=0.1"], place("10mbit"), known)
        chosen[name] = plan["layers"][0]
    assert chosen["lowrank"]["codec"].startswith("powersgd:1")
    assert chosen["few"]["codec"].startswith("topk:0.001")
    assert "of its norm" in chosen["few"]["reason"]
    file = tmp_path / "few.pt"
    monkeypatch.setenv("COLUMNS", "120")  # the reason in one line
    done = thinwire("plan", str(model), "--gradients", str(file), "--policy", "auto,error=0.1")
    assert done.returncode == 0, done.stderr
    assert "of its norm" in " ".join(done.stdout.split())


def test_gradients_may_be_parameters_or_sparse_but_not_infinite(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "g.pt"
    torch.save({"0.weight": torch.nn.Parameter(torch.ones(512, 784))}, file)
    assert read_gradients(str(file), LAYERS)["0.weight"].min() == 1
    torch.save({"0.weight": torch.ones(512, 784).to_sparse()}, file)
    assert read_gradients(str(file), LAYERS)["0.weight"].min() == 1
    bad = torch.ones(512, 784)
    bad[511, 783] = float("inf")
    torch.save({"0.weight": bad}, file)
    known = read_gradients(str(file), LAYERS)
    with pytest.raises(InvalidArgument, match=r"layer '0\.weight' holds NaN or Inf"):
        forecast(LAYERS, ["auto"], place("10mbit"), known)


def test_gradients_of_safetensors(tmp_path: pathlib.Path) -> None:
    values = torch.tensor([1.5, -2.0, 0.25, 3e5])
    layers = [ModelLayer(name, (2, 2), 0) for name in ("a", "b", "c")]
    header, data = {}, b""
    for name, dtype, word in (("a", torch.float32, "F32"), ("b", torch.bfloat16, "BF16")):
        part = values.to(dtype).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": word, "shape": [2, 2], "data_offsets": offsets}
        data += part
    file = tmp_path / "g.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    arrays = read_gradients(str(file), layers)
    assert set(arrays) == {"a", "b"}
    assert arrays["a"].tolist() == values.view(2, 2).tolist()
    assert arrays["b"].tolist() == values.bfloat16().float().view(2, 2).tolist()


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"0.wieght": torch.zeros(512, 784)}, r"0\.wieght(.|\n)*nearest layer is '0\.weight'"),
        ({"0.weight": torch.zeros(784, 512)}, r"\[784, 512\], expected \[512, 784\]"),
        ({"0.weight": torch.zeros(512, 784, dtype=torch.long)}, "holds no gradients"),
        ([torch.zeros(1)], "expected a state_dict"),
    ],
)
def test_gradients_that_do_not_fit(tmp_path: pathlib.Path, gradients: object, message: str) -> None:
    file = tmp_path / "g.pt"
    torch.save(gradients, file)
    with pytest.raises(InvalidArgument, match=message):
        read_gradients(str(file), LAYERS)
    for absent in ("absent.pt", "absent.safetensors", "g.txt"):
        with pytest.raises(InvalidArgument, match="plan: "):
            read_gradients(str(tmp_path / absent), LAYERS)


@pytest.mark.parametrize("text", ["", "not json", "[1]", "{}", '{"a": "b"}', '{"a": 1}'])
def test_broken_model_files(tmp_path: pathlib.Path, text: str) -> None:
    for name in ("m.json", "m.pt", "m.safetensors"):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(InvalidArgument, match=r"plan: .*m\."):
            read_layers(str(path))


@pytest.mark.parametrize("source", ["nothing", "no_module:make", "json:no_function", "absent.pt"])
def test_what_is_no_model(source: str) -> None:
    with pytest.raises(InvalidArgument, match="hint"):
        read_layers(source)


def test_the_command(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    figures, plan = tmp_path / "f.json", tmp_path / "p.toml"
    done = thinwire(
        "plan", str(model), "--rate", "10mbit", "--policy", "q4", "--policy", "auto",
        "--json", str(figures), "--save", str(plan), XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout
    policies = [one["policy"] for one in json.loads(figures.read_text())["forecasts"]]
    assert policies == ["none", "q4", "auto"]
    assert _codec.check_policy(f"@{plan}")
    assert (tmp_path / "thinwire" / "codec-speeds").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "fast"], "1gbit"),
        (["--rate", "0gbit"], "1gbit"),
        (["--step", "60"], "60ms"),
        (["--latency", "-1us"], "25us"),
        (["--ranks", "1"], "2 or more"),
        (["--policy", "topq"], "topk"),
        (["--gradients", "absent.pt"], "cannot read absent.pt"),
        (["--save", "/no/such/folder/p.toml"], "cannot write"),
        (["--json", "/no/such/folder/f.json"], "cannot write"),
    ],
)
def test_mistakes(model: pathlib.Path, arguments: list[str], message: str) -> None:
    done = thinwire("plan", str(model), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor(tmp_path: pathlib.Path) -> None:
    done = thinwire("doctor", XDG_CACHE_HOME=str(tmp_path), THINWIRE_POLICY="q8")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("thinwire 0.1.0", "[x] C++ library", "[x] PyTorch", "THINWIRE_POLICY: q8",
                 "topk:0.001", "next: thinwire plan"):  # fmt: skip
        assert word in done.stdout


def launch_doctor(*arguments: str, ranks: int = 3) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command = [sys.executable, "-m", "thinwire.cli", "doctor", *arguments]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={ranks}", *command],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_doctor_measures_the_links_of_a_job(model: pathlib.Path) -> None:
    done = launch_doctor("--model", str(model), "--step", "10ms")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[x] C++ library") == 1  # one rank speaks
    assert re.search(r"3 pairs of ranks: [\d.–]+ Gbit/s, [\d–]+ us", done.stdout), done.stdout
    assert "3 ranks, " in done.stdout
    alone = thinwire("doctor", "--model", str(model))
    assert alone.returncode == 2
    assert "torchrun" in alone.stderr


@pytest.mark.parametrize("count", range(2, 9))
def test_each_pair_meets_once_and_nobody_twice_at_a_time(count: int) -> None:
    ranks = [3 * n for n in range(count)]
    rounds = _link._rounds(ranks)
    assert len(rounds) == count - 1 + count % 2
    for pairs in rounds:
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)
    met = sorted(pair for pairs in rounds for pair in pairs)
    assert met == list(itertools.combinations(ranks, 2))


def test_slow_links_are_named() -> None:
    def link(pair: tuple[int, int], rate: float = 1e9) -> PairLink:
        return PairLink(pair, 1e-5, rate)

    alike = [link((0, 1)), link((0, 2), 0.9e9), link((1, 2))]
    assert len(_link.describe(alike)) == 1
    assert _link.slowest(alike) == (1e-5, 0.9e9)
    slow = [link((0, 1)), link((0, 2)), link((0, 3), 1e7), link((1, 2)), link((1, 3), 2e7)]
    lines = _link.describe([*slow, link((2, 3))])
    assert "rank 0 – rank 3: 0.08 Gbit/s" in lines[2]
    assert "rank 1 – rank 3" in lines[3]
    assert len(lines) == 4


def test_doctor_survives_what_is_broken() -> None:
    def broken() -> str:
        raise OSError("libtorch_cpu.so: cannot open\nmore")

    check = _try("PyTorch", broken, "pip install torch", False)
    assert check == Check(
        "PyTorch", "NO: OSError: libtorch_cpu.so: cannot open", "pip install torch", False
    )
    assert not check.good
