"""Runs the demo: tasks x links x methods, each for the same wall time, and keeps a record of each
run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from examples.demo.hosts import Hosts
from examples.demo.live import Current, Screen
from examples.demo.methods import BOUND, label
from examples.demo.pool import Point, WorkerError, WorkerPool
from examples.demo.records import MB, CurvePoint, RunRecord
from examples.demo.tasks import TASKS, DemoTask, Shard

METHODS = [
    "none",
    "fp16",
    "powersgd:1",
    "thinwire:topk:0.01,values=q8",
    "thinwire:q4",
]
LINKS = ["1gbit", "100mbit"]
QUICK_TASKS, QUICK_LINKS = ["mnist"], ["100mbit"]
SECONDS, QUICK_SECONDS = 12.0, 8.0
QUICK_METHODS = ["none", "powersgd:1", "thinwire:topk:0.01,values=q8"]
WARM_STEPS = 3
"""Untimed steps of every method: DDP rebuilds its buckets, PowerSGD makes its two mandatory dense
steps."""
BOUND_SECONDS = 2.5
SEED = 1


@dataclass
class Options:
    """What to run."""

    tasks: list[str]
    links: list[str]
    methods: list[str]
    hosts: int
    seconds: float
    out: Path


@dataclass
class Demo:
    """One run of the demo: restarts the workers after a failure, and keeps the records of what
    ended."""

    options: Options
    hosts: Hosts
    screen: Screen
    records: list[RunRecord] = field(default_factory=list)
    _pool: WorkerPool | None = None
    _restarts: int = 0

    def run(self) -> None:
        """Fill `records`, task by task and link by link."""
        try:
            for task_name in self.options.tasks:
                task = TASKS[task_name]
                for link in self.options.links:
                    self.hosts.set_rate(link)
                    self._run_link(task, link)
        finally:
            if self._pool is not None:
                self._pool.close()

    def _run_link(self, task: type[DemoTask], link: str) -> None:
        before = self._bound(task, link)
        first = len(self.records)
        for method in self.options.methods:
            self._run_method(task, link, method, before)
        after = self._bound(task, link)
        measured = [bound for bound in (before, after) if bound]
        for record in self.records[first:]:
            record.bound_ms = sum(measured) / len(measured) if measured else 0.0

    def _workers(self) -> WorkerPool:
        if self._pool is None:
            self.screen.say("starting the workers (each imports torch)")
            logs = self.options.out / "logs" / str(self._restarts)
            self._pool = WorkerPool(self.hosts, logs)
        return self._pool

    def _fail(self, error: WorkerError) -> None:
        """After a failure workers may wait for each other: end them; the next run starts others."""
        if error.usable:
            return
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self._restarts += 1

    def _bound(self, task: type[DemoTask], link: str) -> float:
        """Step time in ms of the job without gradients on the wire; 0 when it failed."""
        self.screen.begin(Current(task.title, link, BOUND, BOUND_SECONDS))
        try:
            pool = self._workers()
            pool.call("open", job="bound", task=task.name, method=BOUND, seed=SEED)
            seconds = min(BOUND_SECONDS, self.options.seconds)
            result = pool.run("bound", seconds=seconds, warm_steps=WARM_STEPS)
            pool.call("close", job="bound")
            return result.step_ms
        except WorkerError as error:
            self.screen.say(f"bound step of {task.title} at {link} failed: {error}")
            self._fail(error)
            return 0.0
        finally:
            self.screen.end()

    def _run_method(self, task: type[DemoTask], link: str, method: str, bound_ms: float) -> None:
        """Measure one method; its record is kept unless the user interrupts."""
        metric = task.metric
        record = RunRecord(
            task=task.name,
            task_title=task.title,
            workload=task.workload,
            link=link,
            method=method,
            label=label(method),
            hosts=self.hosts.count,
            budget_s=self.options.seconds,
            warm_steps=WARM_STEPS,
            metric=metric.name,
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            target=metric.target,
            bound_ms=bound_ms,
        )
        self.screen.begin(Current(task.title, link, record.label, self.options.seconds))
        try:
            self._measure(task, method, record)
        except WorkerError as error:
            record.failed = str(error)
            self._fail(error)
        self.records.append(record)
        self.screen.end(record)

    def _measure(self, task: type[DemoTask], method: str, record: RunRecord) -> None:
        pool = self._workers()
        opened = pool.call("open", job="run", task=task.name, method=method, seed=SEED)
        if len({answer["hash"] for answer in opened}) != 1:
            raise WorkerError("the ranks did not build the same initial weights")
        record.parameters = opened[0]["parameters"]

        def on_point(point: Point) -> None:
            if point.shards:
                value = task.score([Shard(*shard) for shard in point.shards])
                at = CurvePoint(point.seconds, point.bytes / MB, point.step, value)
                record.curve.append(at)
                self.screen.evaluated(task.metric.text(value))

        result = pool.run(
            "run",
            seconds=self.options.seconds,
            warm_steps=WARM_STEPS,
            eval_every_s=task.eval_every_s,
            on_point=on_point,
            on_progress=self.screen.progress,
        )
        ends = pool.call("result", job="run")
        pool.call("close", job="run")
        record.seconds, record.steps, record.step_ms = result.seconds, result.steps, result.step_ms
        record.wire_mb_step = result.bytes / result.steps / MB
        record.replicas_identical = len({end["hash"] for end in ends}) == 1
        record.stats = ends[0]["stats"]
        record.value = task.score([Shard(*end["shard"]) for end in ends])
        record.curve.append(
            CurvePoint(result.seconds, result.bytes / MB, result.steps, record.value)
        )
