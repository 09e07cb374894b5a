"""How much of a VGG-16's update fedzip leaves, by its density, in bytes as they would be sent.

    PYTHONPATH=.:integrations/torch python tests/bench/fedzip_vgg.py [--update trained|student]

trained: what a client of a federated job sends. VGG-16 for images of 32 x 32 (13 convolutions,
three linear layers, 15.2 million parameters) learns MNIST for --warm steps, then --steps
more; the update is the difference that those made. student: the shapes of VGG-16 itself (138
million), values of Student's t with four degrees of freedom. Each parameter is a payload of its
own: bytes are those of `thinwire.codec(...).encode`, frame and message headers included, and factor
is the fp32 bytes over them. share: of the update's squared length that arrives. The last row is the
largest density, to two digits, whose factor is above --factor.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import thinwire
import torch
from torch import nn
from torch.nn import functional

from examples.demo.tasks import MnistMlp

PUBLISHED_FACTOR = 1085.0
"""Of the paper, arXiv 2102.01593, whose encoders count bits that no decoder could read."""
DENSITIES = (0.1, 0.01, 0.005, 0.003, 0.002, 0.001, 0.0005)
WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Of VGG-16's convolutions; 0 halves the image."""

Update = dict[str, np.ndarray]


@dataclass
class Row:
    """An update at one density."""

    update: str
    elements: int
    density: float
    bytes: int
    factor: float
    share: float


def vgg16() -> nn.Sequential:
    """For 3 x 32 x 32; weights as He et al. draw them, without which it learns nothing in so few
    steps."""
    layers: list[nn.Module] = []
    channels = 3
    for width in WIDTHS:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
    layers.append(nn.Flatten())
    for size in (512, 512):
        layers += [nn.Linear(channels, size), nn.ReLU()]
        channels = size
    layers.append(nn.Linear(channels, 10))
    model = nn.Sequential(*layers)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


def trained_update(warm: int, steps: int) -> Update:
    """The difference that `steps` steps make after `warm` ones."""
    torch.manual_seed(1)
    model = vgg16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    MnistMlp.prepare()
    batches = MnistMlp().batches(0, 1, seed=1)
    before: dict[str, torch.Tensor] = {}
    losses = []
    for step in range(warm + steps):
        if step == warm:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
        pixels, labels = next(batches)
        images = functional.pad(pixels.view(-1, 1, 28, 28), (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"# loss {losses[0]:.2f}, before the update {losses[warm]:.2f}, after {losses[-1]:.2f}")
    return {name: (p.detach() - before[name]).numpy() for name, p in model.named_parameters()}


def student_update() -> Update:
    """Of VGG-16 for 3 x 224 x 224."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for i, width in enumerate(w for w in WIDTHS if w):
        shapes[f"conv{i}.weight"], shapes[f"conv{i}.bias"] = (width, channels, 3, 3), (width,)
        channels = width
    for i, (width, inputs) in enumerate(((4096, 512 * 49), (4096, 4096), (1000, 4096))):
        shapes[f"fc{i}.weight"], shapes[f"fc{i}.bias"] = (width, inputs), (width,)
    generator = np.random.default_rng(1)
    return {
        name: generator.standard_t(4, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def encode(name: str, update: Update, density: float) -> Row:
    """All of an update's parameters at one density."""
    codec = thinwire.codec(f"fedzip:{density:g}")
    elements = sent = 0
    lost = whole = 0.0
    for key, values in update.items():
        residual = np.zeros(values.shape, np.float32)
        sent += len(codec.encode(values, residual=residual, key=key))
        elements += values.size
        flat = values.ravel()
        whole += float(np.dot(flat, flat))
        lost += float(np.dot(residual.ravel(), residual.ravel()))
    return Row(name, elements, density, sent, 4 * elements / sent, 1 - lost / whole)


def largest_density(name: str, update: Update, factor: float) -> Row | None:
    """Of two digits, whose factor is above the wanted one."""
    steps = [float(f"{digits}e-{power}") for power in (6, 5, 4, 3) for digits in range(10, 100)]
    low, high = 0, len(steps)  # steps[low - 1] will do, steps[high] will not
    best = None
    while low < high:
        middle = (low + high) // 2
        row = encode(name, update, steps[middle])
        if row.factor > factor:
            best, low = row, middle + 1
        else:
            high = middle
    return best


def rows_of(name: str, update: Update, factor: float) -> Iterator[Row]:
    for density in DENSITIES:
        yield encode(name, update, density)
    best = largest_density(name, update, factor)
    if best is not None:
        yield best


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fedzip_vgg.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--update", choices=["trained", "student"], action="append")
    parser.add_argument("--warm", type=int, default=30)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--factor", type=float, default=PUBLISHED_FACTOR)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    print(f"# command: {' '.join(['python', 'tests/bench/fedzip_vgg.py', *words])}")
    lines = []
    for name in options.update or ["trained", "student"]:
        start = time.perf_counter()
        update = (
            trained_update(options.warm, options.steps) if name == "trained" else student_update()
        )
        elements = sum(values.size for values in update.values())
        print(f"# {name}: {elements:,} values of {len(update)} parameters, made in ", end="")
        print(f"{time.perf_counter() - start:.0f} s")
        print(f"{'density':>9} {'bytes':>12} {'factor':>9} {'share':>7}")
        for row in rows_of(name, update, options.factor):
            print(f"{row.density:>9g} {row.bytes:>12,} {row.factor:>9.1f} {row.share:>7.3f}")
            lines.append(json.dumps(asdict(row)) + "\n")
    if options.json:
        options.json.write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
