"""Step time of real training jobs over emulated links, as a multiple of the bound step.

    PYTHONPATH=.:cluster/lab:integrations/torch python tests/bench/step_time.py --rate 1gbit

The bound step is the same job whose only communication is one 4-byte allreduce. A bound segment
and a method's segment alternate in the same processes, so that both see the same machine; each
such pair gives one ratio, and the table shows their median and range. Data goes to stdout,
progress to stderr. Exit code: 0; 1 when a method failed, replicas differ, or a --limit is
exceeded; 2 when nothing can be measured here.

    --accuracy [STEPS]
                 plain DDP against topk:0.01,values=q8 on the MNIST MLP, if no others are named:
                 STEPS (300) steps from 3 seeds, the timed ones being the training; prints what is
                 reached, too
    --plot FILE  step time against link bandwidth, with the crossing of plain and compressed
    --from FILE  plots or prints what --json wrote earlier, without measuring
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich import box
from rich.console import Console
from rich.table import Table

from examples.demo.environment import (
    CannotRunError,
    console,
    header,
    header_lines,
    open_hosts,
    say,
)
from examples.demo.hosts import LOOPBACK, Hosts
from examples.demo.methods import BOUND, FEEDBACK, FLOOR, check_spec, label
from examples.demo.pool import WorkerError, WorkerPool
from examples.demo.records import MB, Measured, RatePoint, groups, link_text
from examples.demo.report import ratio_text
from examples.demo.tasks import TASKS, USUAL_TASKS, Shard

NO_TRAINING = (FLOOR, FEEDBACK)
METHODS = [
    FLOOR,
    "none",
    "fp16",
    "powersgd:1",
    "thinwire:topk:0.01,values=q8",
    "thinwire:topk:0.001,values=q8",
    "thinwire:auto",
]
FIRST_WARM_STEPS = 3
"""DDP rebuilds its buckets after its first step; the PowerSGD hook sends its first two dense."""
AUTO_WARM_STEPS = 100
"""The policy auto tries plans in windows of five steps, uncompressed gradients among them."""
ACCURACY_METHODS = ["none", "thinwire:topk:0.01,values=q8"]
ACCURACY_STEPS, ACCURACY_SEEDS = 300, 3
ACCURACY_POINTS, PERPLEXITY_SHARE = 1.0, 0.02


@dataclass
class Pair:
    """One bound segment and one of a method, side by side in time."""

    bound_ms: float
    ms: float
    steps: int
    megabytes: float
    """Sent by a host in one step."""

    @property
    def ratio(self) -> float:
        return self.ms / self.bound_ms


@dataclass
class Result(Measured):
    """Pairs of one (task, link, method)."""

    pairs: list[Pair] = field(default_factory=list)
    replicas_identical: bool = True
    metric: str = ""
    values: list[float] = field(default_factory=list)
    """The metric at the end, one a seed."""
    trained_steps: int = 0
    failed: str = ""

    @property
    def where(self) -> str:
        """What was measured: task, link and method."""
        return f"{super().where}, {self.label}"

    @property
    def ratio(self) -> float:
        """Median over the pairs of step ÷ bound."""
        return statistics.median(pair.ratio for pair in self.pairs)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio."""
        ratios = [pair.ratio for pair in self.pairs]
        return min(ratios), max(ratios)

    @property
    def step_ms(self) -> float:
        return statistics.median(pair.ms for pair in self.pairs)

    @property
    def bound_ms(self) -> float:
        return statistics.median(pair.bound_ms for pair in self.pairs)

    @property
    def wire_mb_step(self) -> float:
        steps = sum(pair.steps for pair in self.pairs)
        return sum(pair.megabytes * pair.steps for pair in self.pairs) / steps

    def rate_point(self) -> RatePoint:
        """For the picture; the range is that of the ratios, in ms of the median bound step."""
        low, high = (ratio * self.bound_ms for ratio in self.spread)
        return RatePoint(
            self.task_title,
            self.workload,
            self.link,
            self.method,
            self.label,
            self.step_ms,
            min(low, self.step_ms),
            max(high, self.step_ms),
            self.bound_ms,
        )

    def as_json(self) -> dict[str, Any]:
        """Fields and derived figures."""
        derived: dict[str, Any] = {}
        if self.pairs:
            names = ["ratio", "spread", "step_ms", "bound_ms"]
            names += ["wire_mb_step", "ratio_fp32", "ratio_bf16"]
            derived = {name: getattr(self, name) for name in names}
        return {**asdict(self), **derived}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Result:
        """The inverse of as_json; derived figures are worked out anew."""
        names = cls.__dataclass_fields__
        kept = {key: value for key, value in values.items() if key in names}
        kept["pairs"] = [Pair(**pair) for pair in kept["pairs"]]
        return cls(**kept)


@dataclass(frozen=True)
class Limit:
    """`METHOD@LINK<=RATIO` or `TASK/METHOD@LINK<=RATIO`."""

    task: str
    method: str
    link: str
    ratio: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        name, _, ratio = text.partition("<=")
        method, _, link = name.rpartition("@")
        task, slash, rest = method.partition("/")
        if not (method and link and ratio):
            raise argparse.ArgumentTypeError(
                f"'{text}': expected [TASK/]METHOD@LINK<=RATIO, such as "
                "'mnist/thinwire:topk:0.01,values=q8@1gbit<=1.30'"
            )
        try:
            return cls(task if slash else "", rest if slash else method, link, float(ratio))
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{ratio}' in '{text}' is not a number") from None

    def covers(self, result: Result) -> bool:
        same = (result.method, result.link) == (self.method, self.link)
        return same and self.task in ("", result.task)


class Measurement:
    """All pairs of one task on one link."""

    def __init__(self, hosts: Hosts, logs: Path, arguments: argparse.Namespace) -> None:
        self._hosts, self._logs, self._arguments = hosts, logs, arguments
        self._pool: WorkerPool | None = None
        self._stderr = console(stderr=True)

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def measure(self, task: str, link: str, methods: list[str]) -> list[Result]:
        """A result a method, in order. A method that fails is reported; the others start anew."""
        kind = TASKS[task]
        results = {
            m: Result(
                task,
                kind.title,
                kind.workload,
                link,
                m,
                label(m),
                self._hosts.count,
                metric=kind.metric.name,
            )
            for m in methods
        }
        self._hosts.set_rate(link)
        for seed in range(1, self._arguments.seeds + 1):
            while alive := [r for r in results.values() if not r.failed]:
                kept = [(len(r.pairs), len(r.values)) for r in alive]
                current = [alive[0]]
                try:
                    self._one_seed(task, seed, alive, current)
                    break
                except WorkerError as error:
                    current[0].failed = str(error)
                    say(self._stderr, f"{current[0].label} failed: {error}")
                    self.close()
                    for result, (pairs, values) in zip(alive, kept, strict=True):
                        del result.pairs[pairs:], result.values[values:]
        return list(results.values())

    def _one_seed(self, task: str, seed: int, results: list[Result], current: list[Result]) -> None:
        """`current[0]` is kept at the result that is being worked on."""
        if self._pool is None:
            self._pool = WorkerPool(self._hosts, self._logs)
        pool, rounds = self._pool, self._arguments.rounds
        pool.call("open", job=BOUND, task=task, method=BOUND, seed=seed)
        for result in results:
            current[0] = result
            opened = pool.call(
                "open", job=result.method, task=task, method=result.method, seed=seed
            )
            result.parameters = opened[0]["parameters"]
        for number in range(rounds):
            order = results if number % 2 == 0 else results[::-1]
            for result in order:
                current[0] = result
                result.pairs.append(self._pair(pool, result.method, number))
            ratios = ", ".join(f"{r.label} {r.pairs[-1].ratio:.2f}" for r in results)
            where = f"{results[0].task_title} at {link_text(results[0].link)}, seed {seed}"
            say(self._stderr, f"{where}, round {number + 1}/{rounds}: {ratios}")
        for result in results:
            current[0] = result
            self._finish(pool, result)
        pool.call("close", job=BOUND)

    def _pair(self, pool: WorkerPool, method: str, number: int) -> Pair:
        """The first pair gives up to half of its timed steps to the warm-up, and more to that of
        auto, unless methods are to train as many steps; every other is bound first or method first
        by turns."""
        settles = method.startswith("thinwire:auto") and not self._arguments.accuracy
        first = AUTO_WARM_STEPS if settles else FIRST_WARM_STEPS
        extra = max(0, first - self._arguments.warm) if number == 0 else 0
        limits = {
            "steps": max((self._arguments.steps + 1) // 2, self._arguments.steps - extra),
            "warm_steps": self._arguments.warm + extra,
            "seconds": self._arguments.segment_seconds,
        }
        bound = pool.run(BOUND, **limits) if number % 2 == 0 else None
        own = pool.run(method, **limits)
        bound = bound or pool.run(BOUND, **limits)
        return Pair(bound.step_ms, own.step_ms, own.steps, own.bytes / own.steps / MB)

    def _finish(self, pool: WorkerPool, result: Result) -> None:
        ends = pool.call("result", job=result.method)
        pool.call("close", job=result.method)
        if result.method not in NO_TRAINING:
            result.replicas_identical &= len({end["hash"] for end in ends}) == 1
        result.trained_steps = ends[0]["steps"]
        shards = [Shard(*end["shard"]) for end in ends]
        result.values.append(TASKS[result.task].score(shards))


COLUMNS = ["method", "pairs", "step\nms", "bound\nms", "÷\nbound", "range", "MB a\nstep"]
COLUMNS += ["vs\nfp32", "vs\nbf16", "replicas\nequal"]


def cells(result: Result) -> list[str]:
    """One row, in the order of COLUMNS."""
    if result.failed:
        return [result.label, "failed"] + ["-"] * (len(COLUMNS) - 2)
    low, high = result.spread
    return [
        result.label,
        str(len(result.pairs)),
        f"{result.step_ms:.1f}",
        f"{result.bound_ms:.1f}",
        f"{result.ratio:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{result.wire_mb_step:.3g}",
        ratio_text(result.ratio_fp32),
        ratio_text(result.ratio_bf16),
        "–" if result.method in NO_TRAINING else "yes" if result.replicas_identical else "NO",
    ]


def show(out: Console, results: list[Result], accuracy: bool) -> None:
    """A table a task and link, then sentences."""
    for group in groups(results, "task", "link"):
        first = group[0]
        table = Table(
            title=f"{first.workload}; {first.hosts} hosts, {link_text(first.link)}",
            box=box.SIMPLE_HEAD,
            title_justify="left",
            pad_edge=False,
            padding=0,
        )
        table.add_column(COLUMNS[0], overflow="fold")
        for name in COLUMNS[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for result in group:
            table.add_row(*cells(result), style="red" if result.failed else None)
        out.print(table)
        for result in group:
            if result.failed:
                say(out, f"  failed: {result.label}: {result.failed}")
            elif accuracy:
                say(out, f"  {final_text(result)}")
        say(out, verdict(group))
        out.print()


def final_text(result: Result) -> str:
    """The metric of every seed at the end of training."""
    values = "/".join(f"{value:.1f}" for value in result.values)
    mean = statistics.fmean(result.values)
    steps = f"after {result.trained_steps} steps"
    return f"{result.label}: {result.metric} {steps} {values}, mean {mean:.2f}"


def verdict(group: list[Result]) -> str:
    """Who was fastest and by how much, whoever it is."""
    ran = sorted((r for r in group if not r.failed), key=lambda r: r.ratio)
    if not ran:
        return "nothing was measured"
    best = ran[0]
    low, high = best.spread
    text = f"fastest: {best.label}, {best.ratio:.2f} times the bound step ({low:.2f}-{high:.2f})"
    if len(ran) > 1:
        other = ran[1]
        text += f"; next: {other.label}, {other.ratio / best.ratio:.2f} times as long"
    return text


def judge_accuracy(results: list[Result]) -> list[str]:
    """Complaints where a method ends worse than plain DDP on the same link by more than
    ACCURACY_POINTS of a percentage, or PERPLEXITY_SHARE of a perplexity."""
    complaints = []
    for group in groups(results, "task", "link"):
        plain = next((r for r in group if r.method == "none" and r.values), None)
        for result in group:
            if plain is None or result is plain or not result.values:
                continue
            metric, reached = TASKS[result.task].metric, statistics.fmean(plain.values)
            short = reached - statistics.fmean(result.values)
            allowed = ACCURACY_POINTS if metric.unit == "%" else PERPLEXITY_SHARE * reached
            if not metric.higher_is_better:
                short = -short
            if short > allowed:
                complaints.append(
                    f"{result.where}: {metric.name} {short:.2f} worse than plain DDP's; "
                    f"allowed: {allowed:.2g}"
                )
    return complaints


def complaints_of(results: list[Result], limits: list[Limit]) -> list[str]:
    """Everything that makes the exit code 1."""
    found = [f"{r.where} failed: {r.failed}" for r in results if r.failed]
    found += [
        f"{r.where}: replicas differ" for r in results if not (r.failed or r.replicas_identical)
    ]
    for limit in limits:
        covered = [r for r in results if limit.covers(r) and not r.failed]
        if not covered:
            found.append(f"--limit {limit.method}@{limit.link}: nothing measured that it covers")
        found += [
            f"{r.where}: {r.ratio:.2f} times the bound step; limit: {limit.ratio:.2f}"
            for r in covered
            if r.ratio > limit.ratio
        ]
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="step_time.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--task",
        action="append",
        choices=sorted(TASKS),
        help=f"repeatable; default: {' '.join(USUAL_TASKS)}",
    )
    add(
        "--rate",
        action="append",
        help="link speed, repeatable; default: 1gbit 100mbit (with --accuracy: 1gbit)",
    )
    add("--method", action="append", help=f"repeatable; default: {' '.join(METHODS)}")
    add("--hosts", type=int, default=4)
    add("--rounds", type=int, default=5, help="pairs a method")
    add("--steps", type=int, default=20, help="timed steps of a segment")
    add("--warm", type=int, default=2, help="untimed steps before each segment")
    add("--segment-seconds", type=float, default=20.0, help="a segment may end earlier after this")
    add("--seeds", type=int, default=1)
    add("--loopback", action="store_true", help="plain processes instead of lab hosts")
    add("--accuracy", type=int, nargs="?", const=ACCURACY_STEPS, metavar="STEPS")
    add("--limit", action="append", type=Limit.parse, default=[], metavar="METHOD@LINK<=RATIO")
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE")
    add("--from", type=Path, metavar="FILE", dest="source")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error("--rounds takes 1 or more")
    judged = arguments.accuracy is not None
    if judged:
        arguments.seeds = ACCURACY_SEEDS
        arguments.steps = arguments.accuracy // arguments.rounds - arguments.warm
        arguments.segment_seconds = 1e9
        if arguments.steps < 1 or arguments.accuracy % arguments.rounds:
            parser.error(
                f"--accuracy: --rounds must divide {arguments.accuracy} and leave timed steps"
            )
    arguments.methods = arguments.method or (ACCURACY_METHODS if judged else METHODS)
    arguments.tasks = arguments.task or (["mnist"] if judged else list(USUAL_TASKS))
    rates = ["1gbit"] if judged else ["1gbit", "100mbit"]
    arguments.links = [LOOPBACK] if arguments.loopback else arguments.rate or rates
    try:
        for method in arguments.methods:
            check_spec(method)
    except ValueError as error:
        parser.error(str(error))
    if BOUND in arguments.methods:
        parser.error("the bound is measured anyway, beside every method")
    if arguments.loopback and arguments.rate:
        parser.error("--loopback has no link speed, so --rate cannot be given with it")
    if arguments.hosts < 2 or arguments.steps < 1 or arguments.warm < 0:
        parser.error("--hosts takes 2 or more, --steps 1 or more, --warm 0 or more")
    return arguments


def measure_all(arguments: argparse.Namespace, head_out: dict[str, Any]) -> list[Result]:
    """Measure every task on every link; fills the header."""
    results: list[Result] = []
    hosts = open_hosts(arguments.hosts, arguments.links, arguments.tasks)
    measurement = Measurement(hosts, Path("out/bench/logs"), arguments)
    try:
        head_out |= header(hosts, ["python", "tests/bench/step_time.py", *sys.argv[1:]])
        for task in arguments.tasks:
            for link in arguments.links:
                results += measurement.measure(task, link, arguments.methods)
    except KeyboardInterrupt:
        say(console(stderr=True), "interrupted: what is complete is shown")
    finally:
        measurement.close()
        hosts.close()
    return results


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    stdout, stderr = console(), console(stderr=True)
    head: dict[str, Any] = {}
    if arguments.source is not None:
        saved = json.loads(arguments.source.read_text(encoding="utf-8"))
        head, results = saved["header"], [Result.from_json(r) for r in saved["results"]]
    else:
        try:
            results = measure_all(arguments, head)
        except CannotRunError as error:
            say(stderr, f"error: {error}")
            return 2
    for line in header_lines(head):
        say(stdout, line)
    stdout.print()
    show(stdout, results, bool(arguments.accuracy))
    if arguments.json is not None:
        saved = {"header": head, "results": [result.as_json() for result in results]}
        arguments.json.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
        say(
            stdout,
            f"wrote {arguments.json}; next: step_time.py --from {arguments.json} --plot FILE",
        )
    if arguments.plot is not None:
        from examples.demo.plots import bandwidth

        bandwidth([r.rate_point() for r in results if not r.failed], arguments.plot)
        say(stdout, f"wrote {arguments.plot}")
    complaints = complaints_of(results, arguments.limit)
    if arguments.accuracy:
        complaints += judge_accuracy(results)
    for complaint in complaints:
        say(stderr, f"not met: {complaint}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
