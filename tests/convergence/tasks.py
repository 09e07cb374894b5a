"""The training jobs: what they learn, from what data, and what they are judged by.

How they are trained (optimisers, steps, clipping) is in settings.py. Sizes are chosen for four
ranks on two cores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.demo.tasks import (
    CharLstmModel,
    KingJamesCharacters,
    Metric,
    MnistImages,
    Task,
    VerseMiniLm,
)


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


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Mlp, Cnn, Lstm, LstmOnce, Gpt, VerseMiniLm)
}
