"""How each task is trained: the optimisers of its families, steps, learning rate over the run.

A family of optimisers has one setting a task, which its baseline and every compressed method of the
family share: learning rates are the baselines', and none is tuned for a method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WORLD = 4
SGD, ADAM, LAMB = "sgd", "adam", "lamb"


@dataclass(frozen=True)
class Recipe:
    """One task's training run."""

    family: str
    """The task's own optimiser."""
    steps: int
    warmup: int
    """Steps in which the learning rate rises from 0; after them it falls to 0 along a cosine."""
    eval_every: int
    seeds: int
    rank: int
    """Of PowerSGD's matrices."""
    learning_rates: dict[str, float]
    weight_decay: float = 0.0

    @property
    def dense_steps(self) -> int:
        """How long 1-bit Adam and its kin stay dense: 20 % of the run, of the 15 to 25 % advised.
        Top-k's density falls as long (4 epochs of 164 up to 1 of 40 in the paper, on runs longer
        than these)."""
        return self.steps // 5

    def optimizer(self, family: str) -> dict[str, Any]:
        """Class name and arguments of the family's plain optimiser."""
        rate = {"lr": self.learning_rates[family]}
        decay = {"weight_decay": self.weight_decay}
        if family == SGD:
            return {"class": "SGD", **rate, "momentum": 0.9, **decay}
        return {
            "class": {ADAM: "AdamW", LAMB: "LAMB"}[family],
            **rate,
            "betas": [0.9, 0.999],
            "eps": 1e-8 if family == ADAM else 1e-6,
            **decay,
        }


RECIPES = {
    "mlp": Recipe(
        family=SGD,
        steps=200,
        warmup=10,
        eval_every=10,
        seeds=5,
        rank=4,
        learning_rates={SGD: 0.1, ADAM: 1e-3, LAMB: 4e-3},
    ),
    "cnn": Recipe(
        family=SGD,
        steps=300,
        warmup=15,
        eval_every=15,
        seeds=5,
        rank=4,
        learning_rates={SGD: 0.05, ADAM: 2e-3, LAMB: 8e-3},
    ),
    "lstm": Recipe(
        family=SGD,
        steps=400,
        warmup=20,
        eval_every=20,
        seeds=5,
        rank=8,
        learning_rates={SGD: 1.0, ADAM: 4e-3, LAMB: 8e-3},
    ),
    "gpt": Recipe(
        family=ADAM,
        steps=800,
        warmup=80,
        eval_every=40,
        seeds=3,
        rank=8,
        learning_rates={SGD: 0.2, ADAM: 2e-3, LAMB: 8e-3},
        weight_decay=0.01,
    ),
    "minilm": Recipe(
        family=ADAM,
        steps=120,
        warmup=12,
        eval_every=20,
        seeds=3,
        rank=8,
        learning_rates={SGD: 0.05, ADAM: 1e-4, LAMB: 1e-3},
        weight_decay=0.01,
    ),
}


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied by at a step (from 0): linear warm-up, then cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
