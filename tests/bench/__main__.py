"""The benchmarks: `python -m tests.bench [NAME [OPTION...]]`, also as `thinwire bench`.

    codecs    encode and sum of every codec on one core, beside a probe of the memory
    curves    what judging one layer for the policy auto costs
    gradient  codecs on the gradient of a model in training; lossless, unless told otherwise
    peers     the same compression by torch, numpy and zstd, beside the same probe
    fedzip    how much of a trained VGG-16's update fedzip leaves, by its density
    layerwise bytes of a plan by layers beside the best codec for all, at the same error
    planner   how long the planner takes, by layers and objective
    optim     the optimizers' step() beside torch's, fused and foreach
    steps     step times of training jobs over emulated links; --accuracy: what they learn meanwhile
    table     all but step times as Markdown, from the results in out/bench

Without a name: all of them, with results as JSON in out/bench, and the table in table.md.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "out" / "bench"
COMMANDS = {
    "codecs": [str(ROOT / "build/release/bench/codecs_bench")],
    "curves": [str(ROOT / "build/release/bench/error_curves_bench")],
    "gradient": [sys.executable, str(ROOT / "tests/bench/gradient.py")],
    "peers": [sys.executable, str(ROOT / "tests/bench/codec_peers.py")],
    "fedzip": [sys.executable, str(ROOT / "tests/bench/fedzip_vgg.py")],
    "layerwise": [sys.executable, str(ROOT / "tests/bench/layerwise.py")],
    "planner": [str(ROOT / "build/release/bench/planner_bench")],
    "optim": [sys.executable, str(ROOT / "tests/bench/optim.py")],
    "steps": [sys.executable, str(ROOT / "tests/bench/step_time.py")],
    "table": [sys.executable, str(ROOT / "tests/bench/table.py")],
}
COMPUTE_BOUND = ["powersgd:4", "galore:4", "dctcols:32", "dct:32", "lossless", "fedzip:0.1,k=6"]
# What runs without a name: (name of the result, benchmark, its options).
ALL = [
    ("codecs", "codecs", []),
    ("codecs-bf16", "codecs", ["--dtype", "bf16", "bf16", "lossless", "q8", "topk:0.01,values=q8"]),
    ("codecs-lstm-bf16", "gradient", []),
    ("threads", "codecs", ["--threads", "2", "--elements", "25000000", *COMPUTE_BOUND]),
    ("peers", "peers", []),
    ("fedzip", "fedzip", []),
    ("layerwise", "layerwise", []),
    ("planner", "planner", []),
    ("optim", "optim", []),
    ("steps", "steps", []),
    ("accuracy", "steps", ["--accuracy"]),
]


def run(name: str, options: list[str]) -> int:
    command = COMMANDS[name]
    if not Path(command[-1]).exists():
        print(f"bench: {command[-1]} is not built\nhint: make release", file=sys.stderr)
        return 2
    return subprocess.run([*command, *options], check=False).returncode


def main(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if words and words[0] not in COMMANDS:
        print(f"bench: no benchmark {words[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if words:
        return run(words[0], words[1:])
    RESULTS.mkdir(parents=True, exist_ok=True)
    codes = [
        run(name, [*options, "--json", str(RESULTS / f"{label}.json")])
        for label, name, options in ALL
    ]
    return max(*codes, run("table", ["--markdown", str(RESULTS / "table.md")]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
