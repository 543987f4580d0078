"""A small training that can be made to end in every way there is. Plain PyTorch; nothing of ours in it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> nn.Module:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of sleep in each step")
    parser.add_argument("--at", type=int, default=None, help="step at which it ends differently")
    parser.add_argument("--rank", type=int, default=0, help="rank that does")
    ways = ("raise", "raise_to_own_hook", "kill", "term", "exit", "_exit", "interrupt")
    parser.add_argument("--end", choices=ways, default="raise")
    parser.add_argument("--first-attempt-only", action="store_true")
    parser.add_argument("--marker", type=Path, help="file that gets this rank's pid once it trains")
    parser.add_argument("--apart", action="store_true", help="without a process group")
    parser.add_argument("--until", type=Path, help="file that ends the training early once it exists")
    options = parser.parse_args()

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if world_size > 1 and not options.apart:
        # a rendezvous that fails should fail soon, but a busy machine may start a rank late
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
        model = nn.parallel.DistributedDataParallel(model)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(rank)  # data of its own
    count = 32 * options.steps
    loader = DataLoader(TensorDataset(torch.randn(count, 64), torch.randint(10, (count,))), batch_size=32)
    print(f"rank {rank} trains", flush=True)
    for step, (inputs, targets) in enumerate(loader):
        if options.marker is not None and step == 5:
            options.marker.with_suffix(f".{rank}").write_text(str(os.getpid()))

        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        if step == options.at and rank == options.rank and not (options.first_attempt_only and restarted()):
            end(options.end)

        optimizer.step()
        time.sleep(options.pause)
        if options.until is not None and options.until.exists():
            break

    print(f"rank {rank} loss {loss.item():.17g}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

    return model


def restarted() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def end(how: str) -> None:
    if how == "raise_to_own_hook":  # as those of rich and typer, which show it in their own way
        sys.excepthook = lambda kind, error, trace: print(f"{kind.__name__}: {error}", file=sys.stderr)
    if how.startswith("raise"):
        raise ValueError("the batch is bad")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if how == "exit":
        sys.exit(3)
    os._exit(4)


if __name__ == "__main__":
    kept = main()  # while gloo's threads may still wait for the GIL: its destructor joins them with the GIL held
