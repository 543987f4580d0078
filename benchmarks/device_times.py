"""Device times on a real GPU: the cases of `tests/instrument/test_device.py`, and what tracing costs there.

    python benchmarks/device_times.py [--steps 300]

Each case trains once without tracing and once under the hooks. Its line has: whether all losses are equal to the last
bit, step rows, steps with device times, and their mean by phase in ms. The exit status is 1 if a loss differs, a step
is missing, or fewer steps have device times than one in sixteen.

Then three models train in blocks of steps, without tracing and under the hooks in turns: the added time per step is the
difference of the medians of the fastest blocks. Time between two readings of the clock includes waiting for the device.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from traceml.database.flight.flight import FlightFile
from traceml.database.schema import DEVICE_PHASES, DEVICE_STEPS
from traceml.fail_open import failures
from traceml.instrument import install

WIDTH, BATCH = 4096, 512
_PHASES = [phase.label for phase in DEVICE_PHASES]
_ROUNDS, _BLOCKS = 4, 4


class Training:
    """A multilayer perceptron, a few milliseconds per step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).cuda()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.host = [torch.randn(BATCH, WIDTH).pin_memory() for _ in range(4)]
        self.on_device = [batch.cuda() for batch in self.host]

    def step(self, x: torch.Tensor, optimizer_in: Any = None) -> torch.Tensor:
        """Train one step, the optimizer in a context; return the loss."""
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        loss.backward()
        with optimizer_in or ExitStack():
            self.optimizer.step()

        return loss.detach()


Case = Callable[[Training, int], Iterator[torch.Tensor]]


def plain(training: Training, steps: int) -> Iterator[torch.Tensor]:
    """Batches that are on the device already."""
    for step in range(steps):
        yield training.step(training.on_device[step % 4])


def blocking_copies(training: Training, steps: int) -> Iterator[torch.Tensor]:
    """Copies on the training's stream."""
    for step in range(steps):
        yield training.step(training.host[step % 4].to("cuda"))


def hidden_copies(training: Training, steps: int) -> Iterator[torch.Tensor]:
    """A prefetch on a stream of its own: `h2d` must be 0."""
    copies = torch.cuda.Stream()
    following = training.host[0].to("cuda")
    for step in range(steps):
        x = following
        with torch.cuda.stream(copies):
            following = training.host[(step + 1) % 4].to("cuda", non_blocking=True)

        yield training.step(x)
        torch.cuda.current_stream().wait_stream(copies)
        following.record_stream(torch.cuda.current_stream())


def optimizer_on_a_stream(training: Training, steps: int) -> Iterator[torch.Tensor]:
    """The optimizer on a stream of its own: `optimizer` must be 0."""
    side = torch.cuda.Stream()

    @contextmanager
    def in_order() -> Iterator[None]:
        training_stream = torch.cuda.current_stream()
        side.wait_stream(training_stream)
        with torch.cuda.stream(side):
            yield

        training_stream.wait_stream(side)

    for step in range(steps):
        yield training.step(training.on_device[step % 4], in_order())


def another_device_current(training: Training, steps: int) -> Iterator[torch.Tensor]:
    """`with torch.cuda.device(1): optimizer.step()`; with one device, it is the same one."""
    other = torch.cuda.device_count() - 1
    for step in range(steps):
        yield training.step(training.on_device[step % 4], torch.cuda.device(other))


def captured_graph(training: Training, steps: int) -> Iterator[torch.Tensor]:
    """A graph is captured in mid-run and replayed between the steps."""
    x = training.on_device[0].clone()
    graph = torch.cuda.CUDAGraph()
    for step in range(steps):
        if step == steps // 2:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph), torch.no_grad():
                training.model(x)

        yield training.step(training.on_device[step % 4])
        if step > steps // 2:
            graph.replay()


CASES: dict[str, Case] = {
    "plain": plain,
    "blocking copies": blocking_copies,
    "hidden copies": hidden_copies,
    "optimizer elsewhere": optimizer_on_a_stream,
    "other device": another_device_current,
    "captured graph": captured_graph,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    forked = can_use_cuda_after_fork()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        return 0

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a forked child uses CUDA: {forked}")
    torch.use_deterministic_algorithms(True)
    good = [measure(name, case, steps) for name, case in CASES.items()]
    torch.use_deterministic_algorithms(False)
    print_cost(1, 64, 500, device="cpu")
    for layers, width, block in ((1, 64, 250), (30, 256, 50), (2, 4096, 50)):
        print_cost(layers, width, block, device="cuda")

    return 0 if all(good) and forked else 1


def print_cost(layers: int, width: int, steps: int, *, device: str) -> None:
    """Train a model without and with tracing in turns, and print what a step takes. CUDA is in use also on the CPU."""
    plain, traced, stated_ns = [], [], 0
    for _ in range(_ROUNDS):
        plain.append(fastest_block(layers, width, steps, device))
        with traced_flight() as (hooks, _):
            traced.append(fastest_block(layers, width, steps, device))
            stated_ns = hooks.hook_ns_per_step()

    added = statistics.median(traced) - statistics.median(plain)
    print(
        f"{layers:2} x Linear({width}) on {device}: "
        f"step {statistics.median(plain):.1f} us ({min(plain):.1f} to {max(plain):.1f}), "
        f"added {added:+.1f} us; stated as overhead {stated_ns / 1e3:.1f} us"
    )


def fastest_block(layers: int, width: int, steps: int, device: str) -> float:
    """Return the microseconds per step of the fastest of some blocks, the device's work included."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(BATCH if width == WIDTH else 32, width, device=device)
    took = []
    for block in range(_BLOCKS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        torch.cuda.synchronize()
        if block:  # the first one warms up
            took.append((time.perf_counter() - start) / steps * 1e6)

    return min(took)


@contextmanager
def traced_flight() -> Iterator[tuple[Any, FlightFile]]:
    """Trace what runs inside; yield the hooks and their flight file."""
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        flight = FlightFile.create(Path(folder), {})
        hooks = install(flight)
        yield hooks, flight
        hooks.uninstall()
        flight.close(unlink=True)


def can_use_cuda_after_fork() -> bool:
    """Install the hooks and call a model on the CPU, then fork: the child must be able to use CUDA.

    After a backward pass it would not be, without hooks either: torch's autograd has asked the driver then.
    """
    with traced_flight() as (hooks, _):
        model = nn.Linear(4, 1)
        torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(2, 4))
        child = os.fork()
        if child == 0:
            status = 2
            try:
                hooks.clock.stop()
                status = int(torch.cuda.is_available() and torch.zeros(1, device="cuda").item() != 0)
            finally:
                os._exit(status)

        return os.waitpid(child, 0)[1] == 0


def measure(name: str, case: Case, steps: int) -> bool:
    """Run a case without and with tracing, print its line, and return whether it is as it should be."""
    expected = losses_of(case, steps)
    with traced_flight() as (hooks, flight):
        found = losses_of(case, steps)
        hooks.close_open_step()
        ring, rows = flight.ring(DEVICE_STEPS.name), hooks.clock.rows
        device_rows = np.frombuffer(ring.read_from(0, ring.appended).data, DEVICE_STEPS.dtype)

    means = {phase: device_rows[f"{phase}_ns"].sum() / max(len(device_rows), 1) / 1e6 for phase in _PHASES}
    print(
        f"{name:20} losses {'equal' if found == expected else 'DIFFER'}; {rows} of {steps} steps, {len(device_rows)} "
        f"timed; {', '.join(f'{phase} {mean:.2f}' for phase, mean in means.items())}; failures {failures()}"
    )
    return found == expected and rows == steps and len(device_rows) >= steps // 16


def losses_of(case: Case, steps: int) -> list[float]:
    """Train, and return all losses."""
    losses = list(case(Training(), steps))
    torch.cuda.synchronize()
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main())
