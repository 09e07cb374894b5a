"""What reducing a bucket of gradients takes at 8 to 1,024 ranks: `python -m cluster.scale`.

Simulated by SimGrid's SMPI, beside what comm/collective_cost.h predicts; tables of both are written
to docs/scale.md. Ends with status 1 where, at some number of ranks and speed behind one switch, the
collective with the least prediction is more than a tenth slower than the fastest simulated one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LATENCY_US = 25.0
TOLERANCE = 0.1
RANKS = [8, 16, 64, 256, 1024]
SPEEDS = [1, 10, 100]  # Gbit/s
# Every rank has a cable of one speed in each direction, to one switch that never blocks or to the
# lower switch of a tree.
PLATFORM = """<?xml version='1.0'?>
<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">
<platform version="4.1">
  <cluster id="hosts" prefix="host-" suffix="" radical="0-{last}" speed="1Gf"
           bw="{bytes_per_second}Bps" lat="{hop_us}us" {topology}/>
</platform>
"""
# Switches of 32 hosts and of 8 cables upwards, as fast as the hosts' own.
SWITCH_HOSTS = 32
TREE = 'topology="FAT_TREE" topo_parameters="2;{hosts},{switches};1,8;1,1"'
TREE_RANKS = [64, 256, 1024]
TREE_SPEED = 10
# The algorithms of comm/collective_cost.h; a message takes latency + bytes / speed, no more, and
# computing takes nothing.
SETTINGS = [
    "smpi/allreduce:lr",
    "smpi/allgather:NTSLR",
    "smpi/alltoall:ring",
    "smpi/bw-factor:0:1",
    "smpi/lat-factor:0:1",
    "network/crosstraffic:0",
    "smpi/simulate-computation:no",
    "smpi/display-timing:no",
]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method at one number of ranks and one speed."""

    method: str
    simulated: float  # seconds
    predicted: float
    sent_bytes: float  # by one rank


@dataclasses.dataclass(frozen=True)
class Run:
    ranks: int
    gbit: int
    whole: bool = False  # the exchanges themselves, not what one of them sends
    tree: bool = False


@dataclasses.dataclass(frozen=True)
class Point:
    run: Run
    cells: list[Cell]

    @property
    def picked(self) -> Cell:
        return min(self.cells, key=lambda cell: cell.predicted)

    @property
    def fastest(self) -> Cell:
        return min(self.cells, key=lambda cell: cell.simulated)

    def among(self, family: str) -> Point:
        """The same of the methods whose name begins so."""
        return dataclasses.replace(
            self, cells=[cell for cell in self.cells if cell.method.startswith(family)]
        )

    @property
    def good(self) -> bool:
        return self.picked.simulated <= (1 + TOLERANCE) * self.fastest.simulated


def simulate(program: pathlib.Path, run: Run) -> Point:
    speed = run.gbit * 1e9 / 8
    tree = TREE.format(hosts=SWITCH_HOSTS, switches=run.ranks // SWITCH_HOSTS) if run.tree else ""
    platform = PLATFORM.format(
        last=run.ranks - 1, bytes_per_second=speed, hop_us=LATENCY_US / 2, topology=tree
    )
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "platform.xml").write_text(platform)
        hosts = "".join(f"host-{rank}\n" for rank in range(run.ranks))
        pathlib.Path(folder, "hosts").write_text(hosts)
        command = ["smpirun", "-np", str(run.ranks), "-platform", "platform.xml"]
        command += ["-hostfile", "hosts", "-no-privatize", "--log=root.thresh:error"]
        command += [f"--cfg={setting}" for setting in SETTINGS]
        command += [str(program), "whole" if run.whole else "transfers"]
        command += [str(LATENCY_US), str(speed)]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    cells = []
    for line in done.stdout.splitlines():
        method, simulated, predicted, sent = line.split("\t")
        cells.append(Cell(method, float(simulated), float(predicted), float(sent)))
    return Point(run, cells)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def table(points: list[Point]) -> str:
    methods = [cell.method for cell in points[0].cells]
    lines = [
        "| ranks | Gbit/s | " + " | ".join(methods) + " | fastest | picked |",
        "| ---: | ---: |" + " ---: |" * len(methods) + " --- | --- |",
    ]
    for point in points:
        cells = [
            f"{milliseconds(cell.simulated)} ({milliseconds(cell.predicted)})"
            for cell in point.cells
        ]
        names = [point.fastest.method, point.picked.method]
        lines.append(
            f"| {point.run.ranks:,} | {point.run.gbit} | " + " | ".join([*cells, *names]) + " |"
        )
    return "\n".join(lines)


def sent_table(points: list[Point]) -> str:
    methods = [cell.method for cell in points[0].cells]
    lines = [
        "| ranks | " + " | ".join(methods) + " |",
        "| ---: |" + " ---: |" * len(methods),
    ]
    for ranks in sorted({point.run.ranks for point in points}):
        point = next(point for point in points if point.run.ranks == ranks)
        cells = [f"{cell.sent_bytes / 1e6:,.2f}" for cell in point.cells]
        lines.append(f"| {ranks:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(points: list[Point], trees: list[Point]) -> str:
    return f"""# At 1,024 ranks

What reducing one bucket of gradients takes, simulated with SimGrid's SMPI and, in parentheses, as
`comm/collective_cost.h` predicts it; milliseconds. The bucket is ResNet-50's last four weights,
6,504,448 elements or 24.8 MiB of fp32 ([cluster/scale](../cluster/scale/README.md)): of such
buckets a step of ResNet-50 has four, one of BERT-base 18. Transfers only: encoding, decoding and
the backward pass take no time here. `make scale` makes this page.

One switch that never blocks, 25 µs a message:

{table(points)}

*Fastest* is the least simulated time, *picked* the least predicted one. On this network the two
differ by a latency or two, since rings and partners in turn never share a cable.

Switches of {SWITCH_HOSTS} hosts with 8 cables upwards, over which a message takes 50 µs; the
prediction knows nothing of that:

{table(trees)}

A ring crosses from switch to switch once, an alltoall with nearly all that it carries: so
split-reduce and quantised exchanges lose most here. Where the two ways of a sparse codec are
predicted within a tenth of each other, the allgather is the better one, and `Plan::choose_routes`
keeps it.

Megabytes that a rank sends, headers of the transport aside:

{sent_table(points)}

A ring's latencies add up: at 1,024 ranks and 25 µs a ring allreduce spends 51 ms on them, an
allgather 26 ms, whatever the speed. Where a link is fast enough that these outweigh the bytes, no
compression helps, only fewer messages do: hierarchy, or trees.
"""


def check(points: list[Point]) -> list[str]:
    """The points at which a prediction picks what is too slow, of all methods or of one codec's."""
    wrong = []
    for point in points:
        for choice in (point, point.among("topk:0.01 "), point.among("topk:0.001 ")):
            if not choice.good:
                picked, fastest = choice.picked, choice.fastest
                wrong.append(
                    f"{point.run}: {picked.method} is picked and takes "
                    f"{milliseconds(picked.simulated)} ms, {fastest.method} "
                    f"{milliseconds(fastest.simulated)} ms"
                )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 and 16 ranks; writes no page")
    parser.add_argument("--build", default="release", help="preset that built it (release)")
    parser.add_argument("--jobs", type=int, default=2, help="simulations at a time (2)")
    options = parser.parse_args()
    program = ROOT / "build" / options.build / "cluster" / "scale_simulation.so"
    if shutil.which("smpirun") is None or not program.exists():
        raise SystemExit(
            f"scale: smpirun or {program.relative_to(ROOT)} is not there\n"
            "hint: install libsimgrid-dev (make system), then build (make release)"
        )
    if options.quick:
        runs = [Run(8, 10, whole=True), Run(8, 10), Run(16, 10)]
    else:
        runs = [Run(ranks, gbit) for ranks in RANKS for gbit in SPEEDS]
        runs += [Run(ranks, TREE_SPEED, tree=True) for ranks in TREE_RANKS]
    points = []
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for point in pool.map(lambda run: simulate(program, run), runs):
            points.append(point)
            print(f"{point.run}: {time.monotonic() - began:.0f} s", flush=True)
    flat = [point for point in points if not point.run.tree]
    print(table(points))
    if options.quick:
        for whole, replayed in zip(points[0].cells, points[1].cells, strict=True):
            if abs(whole.simulated - replayed.simulated) > 0.01 * whole.simulated:
                raise SystemExit(f"scale: {whole} is not what its transfers take: {replayed}")
    else:
        trees = [point for point in points if point.run.tree]
        (ROOT / "docs" / "scale.md").write_text(page(flat, trees))
    wrong = check(flat)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
