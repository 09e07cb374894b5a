"""The benchmarks: `python -m tests.bench [NAME [OPTION...]]`, also as `thinwire bench`.

    codecs   encode and sum of every codec on one core, beside a probe of the memory
    topk     torch.topk on the same tensors
    steps    step times of training jobs over emulated links; --accuracy: what they learn meanwhile

Without a name: all of them, with results as JSON in out/bench.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "codecs": [str(ROOT / "build/release/bench/codecs_bench")],
    "topk": [sys.executable, str(ROOT / "tests/bench/torch_topk.py")],
    "steps": [sys.executable, str(ROOT / "tests/bench/step_time.py")],
}


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
    results = ROOT / "out" / "bench"
    results.mkdir(parents=True, exist_ok=True)
    benches = [(name, name, []) for name in COMMANDS] + [("accuracy", "steps", ["--accuracy"])]
    return max(
        run(name, [*options, "--json", str(results / f"{label}.json")])
        for label, name, options in benches
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
