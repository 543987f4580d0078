"""Training script of `traceml demo`: a small network on handwritten digits, on one rank or under DDP.

It does not use traceml. Its options make one rank slow in one part of the step, as a problem to diagnose:

    traceml run --nproc-per-node 2 _demo_train.py --fault input --rank 1 --ms 15
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, default_collate

__all__ = ["main"]

FAULTS = ("none", "input", "forward", "backward", "optimizer", "other")
TEST_IMAGES = 297


class Net(nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """Two convolutions and a linear layer, for images of 8 x 8."""

    def __init__(self, delay: Callable[[], None]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classify = nn.Linear(64 * 4 * 4, 10)
        self.delay = delay

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        self.delay()
        return self.classify(self.features(images).flatten(1))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Train on handwritten digits, optionally with a slow rank.")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step (default: 32)")
    parser.add_argument("--fault", choices=FAULTS, default="none", help="slow part of the step (default: none)")
    parser.add_argument("--rank", type=int, default=1, help="the slow rank (default: 1)")
    parser.add_argument("--ms", type=float, default=15.0, help="delay of its step in ms (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (default: 0)")
    return parser.parse_args(argv)


def load() -> tuple[TensorDataset, Tensor, Tensor]:
    """Return the digits of scikit-learn: a training set, test images and test labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[:-TEST_IMAGES], labels[:-TEST_IMAGES])
    return train, images[-TEST_IMAGES:], labels[-TEST_IMAGES:]


def batches(
    loader: DataLoader[tuple[Tensor, ...]], sampler: DistributedSampler[object], steps: int
) -> Iterator[Tensor]:
    """Yield one batch per step; each epoch has a new order."""
    epoch = done = 0
    while done < steps:
        sampler.set_epoch(epoch)
        epoch += 1
        for batch in loader:
            yield batch
            done += 1
            if done == steps:
                return


def main(argv: list[str] | None = None) -> None:
    """Train; print the loss every 50 steps and the accuracy at the end."""
    options = parse(argv)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")

    def delay(part: str) -> Callable[[], None]:
        is_slow = rank == options.rank and part == options.fault
        return (lambda: time.sleep(options.ms / 1e3)) if is_slow else (lambda: None)

    torch.manual_seed(options.seed)
    train, test_images, test_labels = load()
    wait_for_disk = delay("input")

    def collate(samples: list[tuple[Tensor, ...]]) -> list[Tensor]:
        wait_for_disk()
        collated: list[Tensor] = default_collate(samples)
        return collated

    sampler: DistributedSampler[object] = DistributedSampler(train, world_size, rank, seed=options.seed)
    loader = DataLoader(train, options.batch_size, sampler=sampler, collate_fn=collate, drop_last=True)
    net = Net(delay("forward"))
    model = DistributedDataParallel(net) if world_size > 1 else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    backward, update, log = delay("backward"), delay("optimizer"), delay("other")
    optimizer.register_step_pre_hook(lambda *_: update())

    for step, (images, labels) in enumerate(batches(loader, sampler, options.steps)):
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        logits.register_hook(lambda _: backward())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log()
        if rank == 0 and step % 50 == 49:
            print(f"step {step + 1:4d}/{options.steps}  loss {loss.item():.3f}", flush=True)

    if rank == 0:
        with torch.no_grad():
            accuracy = (net(test_images).argmax(1) == test_labels).float().mean().item()

        print(f"accuracy on {TEST_IMAGES} test images: {accuracy:.1%}", flush=True)

    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
