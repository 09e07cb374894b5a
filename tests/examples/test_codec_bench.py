"""The benchmarks beside codecs_bench: peers lose nothing, and results become tables."""

import json

import numpy as np
import pytest
import torch

from tests.bench import codec_peers, fedzip_vgg, table


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("kind", codec_peers.PEERS)
def test_what_a_peer_sends_plus_its_residual_is_what_came_in(kind):
    shape = (70, 40) if kind.shapes else (2560,)
    torch.manual_seed(2)
    grad = torch.randn(shape).to(kind.dtype)
    residual = 0.01 * torch.randn(shape)
    peer = kind(grad, residual.clone(), torch.full(shape, torch.nan))
    peer.encode()
    peer.decode()
    assert 0 < peer.bytes() < grad.nbytes
    if isinstance(peer, codec_peers.Zstd):
        assert torch.equal(peer.restored, grad)
        return
    torch.testing.assert_close(peer.out + peer.residual, grad + residual, rtol=1e-5, atol=1e-5)


def test_rows_of_a_peer(tmp_path, capsys):
    file = tmp_path / "peers.json"
    words = ["--elements", "512", "--layer", "256", "--rounds", "2", "--json", str(file)]
    assert codec_peers.main([*words, "torch.topk:0.001"]) == 0
    rows = table.read(file)
    assert [row["elements"] for row in rows] == [512, 256]
    assert {"spec", "beside", "bytes", "probe_us", "encode_us", "decode_us"} <= set(rows[0])
    assert "torch.topk:0.001" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        codec_peers.main(["torch.topq"])


def test_largest_density_is_just_above_the_factor():
    values = np.random.default_rng(1).standard_t(4, 100_000).astype(np.float32)
    update = {"weight": values.reshape(100, 1000)}
    best = fedzip_vgg.largest_density("student", update, 300)
    assert best is not None
    assert best.factor > 300
    assert fedzip_vgg.encode("student", update, 1.05 * best.density).factor < 300


def test_tables(tmp_path, capsys):
    codec = {"spec": "q8", "elements": 1000, "bytes": 1020, "share": [0.5, 0.4, 0.6]}
    times = {"probe_us": [2.0, 1, 3], "encode_us": [4.0, 3, 5]}
    times |= {"decode_us": [8.0, 7, 9], "sum_us": [16.0, 15, 17]}
    peer = {"spec": "torch.int8", "beside": "q8", "dtype": "fp32", "elements": 1000}
    peer |= {"bytes": 1004, "share": [0.05, 0.04, 0.06], **times}
    linear = {"spec": "powersgd:4", "elements": 64, "bytes": 64, "share": [0.5, 0.4, 0.6], **times}
    kth_value = {**linear, "spec": "kth-value:0.01", "bytes": 0}
    for row in (linear, kth_value):
        row |= {"decode_us": [0, 0, 0], "sum_us": [0, 0, 0]}
    shares = ("share_one", "share_all", "gain", "cpu_gain")
    threads = {"spec": "dct:32", "elements": 64} | {key: [1.5, 1.4, 1.6] for key in shares}
    zip_row = fedzip_vgg.Row("trained", 10**6, 0.002, 4000, 1000.0, 0.25)
    for file, rows in (
        ("codecs", [codec | times, linear, kth_value]),
        ("codecs-bf16", [codec | times]),
        ("codecs-lstm-bf16", [codec | times]),
        ("threads", [threads]),
        ("peers", [peer]),
        ("fedzip", [vars(zip_row)]),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{file}.json").write_text(lines)
    assert table.main(["--results", str(tmp_path), "--markdown", str(tmp_path / "t.md")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "t.md").read_text() == text
    beside = "`torch.int8` 0.050 [0.040–0.060]"
    figures = "| 1,000 | 0.50 [0.40–0.60] | 0.25 / 0.50 | 1,020 (8.16 bits a value) |"
    assert f"| `q8` {figures} {beside} |" in text
    assert f"| `q8` of bf16 {figures} – |" in text
    assert f"| `q8` of bf16, a char LSTM's {figures} – |" in text
    assert "| `dct:32` | 64 | " + " | ".join(["1.50 [1.40–1.60]"] * 4) in text
    assert "| `powersgd:4` | 64 | 0.50 [0.40–0.60] | – / – |" in text
    assert "| `kth-value:0.01` | 64 | 0.50 [0.40–0.60] | – / – | – | – |" in text
    assert "| trained | 1,000,000 | 0.002 | 4,000 | 1,000 | 0.250 |" in text
    assert table.main(["--results", str(tmp_path / "none")]) == 2
    assert "make bench" in capsys.readouterr().err
