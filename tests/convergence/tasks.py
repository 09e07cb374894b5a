"""The training jobs: what they learn, from what data, and what they are judged by.

How they are trained (optimisers, steps, clipping) is in settings.py. Sizes are chosen for four
ranks on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.demo.tasks import (
    CharLstmModel,
    KingJamesCharacters,
    Metric,
    MnistImages,
    Shard,
    Task,
)
from examples.pytorch import minilm


class Mlp(MnistImages):
    """784-1024-1024-10 perceptron."""

    name = "mlp"
    title = "MNIST MLP"
    workload = "MNIST MLP 784-1024-1024-10, 1.86 M parameters, batch 32 a host"
    metric = Metric("accuracy", "%", True, 93.0)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(784, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, 10),
        )


class Cnn(MnistImages):
    """Two convolutions and two linear layers on the same images."""

    name = "cnn"
    title = "MNIST CNN"
    workload = "MNIST CNN, 32 and 64 5x5 filters, 1024-256-10, 0.32 M parameters, batch 16 a host"
    metric = Metric("accuracy", "%", True, 96.5)
    batch = 16

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 32, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 256),
            nn.ReLU(),
            nn.Linear(256, 10),
        )


class LstmOnce(KingJamesCharacters):
    """The demo's language model with one layer of 128, on half as many characters as there are."""

    name = "lstm-once"
    title = "char LSTM, half an epoch"
    workload = (
        "char LSTM 1x128, King James text of 3.9 M characters, 0.09 M parameters, 64 steps, batch "
        "4 a host"
    )
    metric = Metric("perplexity", "", False, 5.0)
    batch = 4
    held_out_windows = 256

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return CharLstmModel(self._characters, 32, 128, layers=1)


class Lstm(LstmOnce):
    """The same on the end of the text, in many epochs, as the word models that DGC was published
    with."""

    name = "lstm"
    title = "char LSTM"
    workload = (
        "char LSTM 1x128, 100,000 characters of the King James text, 0.09 M parameters, 64 steps, "
        "batch 4 a host"
    )
    metric = Metric("perplexity", "", False, 5.2)

    def __init__(self) -> None:
        super().__init__()
        self._train = self._train[-100_000:]


class _GptModel(nn.Module):
    """Characters and positions embedded, pre-norm blocks with causal attention, linear decoder."""

    def __init__(
        self, characters: int, window: int, width: int = 64, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(window, width)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            block, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.decoder = nn.Linear(width, characters, bias=False)
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(window), persistent=False
        )
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # GPT-2's, smaller where a block ends in the residual stream
                ends = name.endswith(("out_proj.weight", "linear2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if ends else 0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        embedded = self.characters(inputs) + self.positions.weight[: inputs.shape[1]]
        logits: Tensor = self.decoder(self.blocks(embedded, self.mask, is_causal=True))
        return logits


class Gpt(KingJamesCharacters):
    """A small GPT on the same text."""

    name = "gpt"
    title = "char GPT"
    workload = (
        "char transformer, 2 blocks of 64, 4 heads, King James text, 0.11 M parameters, "
        "64 characters, batch 4 a host"
    )
    metric = Metric("perplexity", "", False, 7.0)
    batch = 4
    held_out_windows = 256

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return _GptModel(self._characters, self.window)


class VerseMiniLm(Task):
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


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Mlp, Cnn, Lstm, LstmOnce, Gpt, VerseMiniLm)
}
