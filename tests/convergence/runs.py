"""What is to be run, in which order, and what a finished run leaves behind.

A run is decided by its settings alone. Its record, a line of a task's JSON Lines file, carries a
hash of them: a record with another hash is of other settings, is not used, and is replaced when the
run is made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.convergence.methods import METHODS, MORE_SEEDS, methods_of, settings_of
from tests.convergence.settings import RECIPES, WORLD
from tests.convergence.tasks import TASKS

SMALL = ("mlp", "cnn", "lstm", "lstm-once")
"""A run of these takes about a minute."""
FORMAT = 1
"""Of a record, and of whatever else decides a run and is no setting: a change makes all runs
anew."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which runs are asked for; `steps`, `ranks` and `seeds` other than the recipes' are for trying
    things out, and make runs of their own."""

    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int | None = None
    steps: int | None = None
    ranks: int = WORLD

    def recipe(self, task: str) -> Any:
        """The task's recipe with these steps."""
        recipe = RECIPES[task]
        if self.steps is None:
            return recipe
        return dataclasses.replace(
            recipe,
            steps=self.steps,
            warmup=min(recipe.warmup, self.steps // 5),
            eval_every=max(1, self.steps // 4),
        )

    def seeds_of(self, task: str, method: str) -> int:
        if self.seeds is not None:
            return self.seeds
        return MORE_SEEDS.get((task, method), RECIPES[task].seeds)


@dataclasses.dataclass(frozen=True)
class Run:
    """One (task, method, seed), or with a link the time of its steps."""

    task: str
    method: str
    settings: dict[str, Any]
    link: str | None = None

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    @property
    def key(self) -> str:
        """Hash of the settings."""
        text = json.dumps([FORMAT, self.settings, self.link], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def place(self) -> str:
        """The line that its record takes, whatever the other settings."""
        return f"{self.method} {self.link or self.seed}"

    def file(self, out: Path) -> Path:
        """The file its record stands in."""
        return out / f"{self.task}{'' if self.link is None else '-times'}.jsonl"

    @property
    def title(self) -> str:
        where = f"seed {self.seed}" if self.link is None else f"at {self.link}"
        return f"{self.task} {self.method} {where}"


def training_run(choice: Choice, task: str, method: str, seed: int) -> Run:
    recipe = choice.recipe(task)
    settings = {
        **settings_of(task, METHODS[method], recipe, METHODS[method].dense_steps(recipe)),
        "workload": TASKS[task].workload,
        "steps": recipe.steps,
        "warmup": recipe.warmup,
        "eval_every": recipe.eval_every,
        "ranks": choice.ranks,
        "seed": seed,
        "measure": False,
    }
    return Run(task, method, settings)


def timing_run(choice: Choice, task: str, method: str, link: str) -> Run:
    """Its dense steps are as few as can be, and passed over."""
    recipe, dense_steps = choice.recipe(task), 1
    settings = {
        **settings_of(task, METHODS[method], recipe, dense_steps),
        "workload": TASKS[task].workload,
        "steps": recipe.steps,
        "warmup": recipe.warmup,
        "dense_steps": dense_steps,
        "ranks": choice.ranks,
        "seed": 1,
        "measure": True,
    }
    return Run(task, method, settings, link)


def rows(choice: Choice) -> Iterable[tuple[str, str]]:
    """The (task, method) asked for, in the order of the tables."""
    for task in choice.tasks:
        for method in methods_of(task):
            if method.name in choice.methods:
                yield task, method.name


def training_runs(choice: Choice) -> list[Run]:
    """All runs asked for, the cheapest and most telling first, so that a stop leaves a useful
    table: baselines of small tasks, one seed of every method there, the same for the others, the
    rest."""
    runs = [
        training_run(choice, task, method, seed)
        for task, method in rows(choice)
        for seed in range(1, choice.seeds_of(task, method) + 1)
    ]
    return sorted(runs, key=lambda run: (_wave(run), run.seed))


def _wave(run: Run) -> int:
    later = 0 if run.task in SMALL else 2
    if run.method == "none":
        return later
    if run.seed == 1:
        return later + 1
    return 4 if run.task in SMALL else 5


def timing_runs(choice: Choice, links: Iterable[str]) -> list[Run]:
    """Link by link, since the lab's speed is changed for each."""
    return [
        timing_run(choice, task, method, link) for link in links for task, method in rows(choice)
    ]


def stored(run: Run, out: Path) -> dict[str, Any] | None:
    """The run's record, finished or failed; None when there is none of these settings."""
    record = _lines(run.file(out)).get(run.place)
    return record if record is not None and record["key"] == run.key else None


def finished(run: Run, out: Path) -> dict[str, Any] | None:
    """The record of a run that ended well."""
    record = stored(run, out)
    return None if record is None or "error" in record else record


def store(run: Run, out: Path, result: dict[str, Any]) -> None:
    """Write the record so that a reader, and a kill, sees the whole file or none. One writer a
    folder."""
    file = run.file(out)
    lines = _lines(file)
    lines[run.place] = {
        "place": run.place,
        "key": run.key,
        "task": run.task,
        "method": run.method,
        "settings": run.settings,
        **result,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    text = "".join(
        json.dumps(lines[place], separators=(",", ":")) + "\n" for place in sorted(lines)
    )
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _lines(file: Path) -> dict[str, dict[str, Any]]:
    """The file's records by place; none when there is no file."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return {record["place"]: record for record in map(json.loads, text.splitlines())}
