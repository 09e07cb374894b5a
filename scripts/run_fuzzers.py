"""scripts/run_fuzzers.py --seconds N: every program of build/fuzz/fuzzers, N seconds of one core in
all, shared alike; as many run side by side as there are cores.

Each starts from its corpus in tests/fuzz/corpus/NAME; what it finds beyond that goes to
.cache/fuzz/NAME, and an input that crashes it to out/fuzz.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def fuzz(program: pathlib.Path, seconds: int) -> bool:
    found = ROOT / ".cache" / "fuzz" / program.name
    crashes = ROOT / "out" / "fuzz"
    for folder in (found, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    corpus = ROOT / "tests" / "fuzz" / "corpus" / program.name
    command = [str(program), f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048"]
    command += ["-print_final_stats=1", f"-artifact_prefix={crashes}/{program.name}-", str(found)]
    command += [str(corpus)] if corpus.is_dir() else []
    # Allocators that return null instead of ending the process hide nothing here: decoders must not
    # ask for more than the expected element count needs.
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=0"}
    out = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    lines = out.stderr.splitlines()
    runs = next((line.split()[-1] for line in lines if "number_of_executed_units" in line), "0")
    if out.returncode == 0 and int(runs) > 0:
        print(f"fuzz    {program.name}: {runs} inputs in {seconds} s, none failed")
        return True
    print("\n".join(lines[-60:]), file=sys.stderr)
    print(f"fuzz    {program.name}: FAILED after {runs} inputs (exit status {out.returncode})")
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for all fuzzers together")
    options = parser.parse_args()
    folder = ROOT / "build" / "fuzz" / "fuzzers"
    programs = sorted(p for p in folder.glob("*") if p.is_file() and os.access(p, os.X_OK))
    if not programs:
        print(f"fuzz: no fuzzers in {folder}", file=sys.stderr)
        return 1
    seconds = max(1, options.seconds // len(programs))
    with concurrent.futures.ThreadPoolExecutor(
        int(os.environ.get("JOBS") or os.cpu_count() or 1)
    ) as pool:
        passed = sum(pool.map(lambda program: fuzz(program, seconds), programs))
    print(f"fuzz    {passed} passed, {len(programs) - passed} failed")
    return 0 if passed == len(programs) else 1


if __name__ == "__main__":
    sys.exit(main())
