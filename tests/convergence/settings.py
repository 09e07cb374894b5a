"""How each task is trained: the optimisers of its families, steps, learning rate over the run.

A family of optimisers has one setting a task, which its baseline and every compressed method of the
family share: learning rates are the baselines', and none is tuned for a method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
    """Of PowerSGD's matrices: 4 for images, 8 for language, as published."""
    density_warmup: int
    """Steps in which the density of top-k falls: 4 epochs of the images, as published for CIFAR and
    ImageNet, an eighth of the run elsewhere."""
    learning_rates: dict[str, float]
    """Of the families that the task is trained with."""
    weight_decay: float = 0.0
    clip: float | None = None
    """Largest norm of the reduced gradient."""

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


_LSTM = Recipe(
    family=SGD,
    steps=2000,
    warmup=100,
    eval_every=100,
    seeds=5,
    rank=8,
    density_warmup=250,
    learning_rates={SGD: 2.0},
    clip=1.0,
)
RECIPES = {
    "mlp": Recipe(
        family=SGD,
        steps=1000,
        warmup=50,
        eval_every=50,
        seeds=5,
        rank=4,
        density_warmup=125,
        learning_rates={SGD: 0.05, ADAM: 1e-3},
    ),
    "cnn": Recipe(
        family=SGD,
        steps=1500,
        warmup=75,
        eval_every=75,
        seeds=5,
        rank=4,
        density_warmup=250,
        learning_rates={SGD: 0.05, ADAM: 1e-3, LAMB: 8e-3},
    ),
    "lstm": _LSTM,
    "lstm-once": replace(_LSTM, seeds=3),
    "gpt": Recipe(
        family=ADAM,
        steps=2000,
        warmup=200,
        eval_every=100,
        seeds=3,
        rank=8,
        density_warmup=250,
        learning_rates={ADAM: 4e-3, LAMB: 1e-2},
        weight_decay=0.01,
        clip=1.0,
    ),
    "minilm": Recipe(
        family=ADAM,
        steps=120,
        warmup=12,
        eval_every=20,
        seeds=3,
        rank=8,
        density_warmup=15,
        learning_rates={ADAM: 1e-4},
        weight_decay=0.01,
        clip=1.0,
    ),
}


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied by at a step (from 0): linear warm-up, then cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
