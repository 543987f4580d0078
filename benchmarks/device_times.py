"""Device times on a real GPU: the cases of `tests/instrument/test_device.py`, and what tracing costs there.

    python benchmarks/device_times.py [--steps 300]

Each case trains once without tracing and once under the hooks. Its line has: whether all losses are equal to the last
bit, step rows, steps with device times, their mean by phase in ms, and the added time per step. The exit status is 1 if
a loss differs, a step is missing, or more than one in ten steps has no device times.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from traceml.database.flight.flight import FlightFile
from traceml.database.schema import DEVICE_STEPS
from traceml.fail_open import failures
from traceml.instrument import install

WIDTH, BATCH, WARM_UP = 4096, 512, 20
_PHASES = [name.removesuffix("_ns") for name in DEVICE_STEPS.names[2:]]


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
    return 0 if all(good) and forked else 1


def can_use_cuda_after_fork() -> bool:
    """Install the hooks and train on the CPU, then fork: the child must be able to use CUDA."""
    with tempfile.TemporaryDirectory() as folder:
        flight = FlightFile.create(Path(folder), {})
        hooks = install(flight)
        weight = nn.Linear(4, 1)
        weight(torch.randn(2, 4)).sum().backward()
        child = os.fork()
        if child == 0:
            status = 2
            try:
                hooks.disable_in_child()
                status = int(torch.cuda.is_available() and torch.zeros(1, device="cuda").item() != 0)
            finally:
                os._exit(status)

        ended = os.waitpid(child, 0)[1]
        hooks.uninstall()
        flight.close(unlink=True)
        return ended == 0


def measure(name: str, case: Case, steps: int) -> bool:
    """Run a case without and with tracing, print its line, and return whether it is as it should be."""
    expected, plain_ms, _, _ = run(case, steps, traced=False)
    found, traced_ms, rows, device_rows = run(case, steps, traced=True)
    equal = found == expected
    means = {phase: sum(row[2 + at] for row in device_rows) / max(len(device_rows), 1) / 1e6
             for at, phase in enumerate(_PHASES)}  # fmt: skip
    print(
        f"{name:20} losses {'equal' if equal else 'DIFFER'}; {rows} of {steps} steps, {len(device_rows)} timed; "
        + ", ".join(f"{phase} {mean:.2f}" for phase, mean in means.items())
        + f"; step {plain_ms:.3f} ms, added {1e3 * (traced_ms - plain_ms):+.1f} us; failures {failures()}"
    )
    return equal and rows == steps and len(device_rows) >= 0.9 * steps


def run(case: Case, steps: int, *, traced: bool) -> tuple[list[float], float, int, list[tuple[int, ...]]]:
    """Return the losses, milliseconds per step, the number of step rows, and the device rows."""
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        flight = FlightFile.create(Path(folder), {})
        hooks = install(flight) if traced else None
        losses, took_ms = timed(case, steps)
        rows, device_rows = 0, []
        if hooks is not None:
            torch.cuda.synchronize()
            hooks.close_open_step()
            ring = flight.ring(DEVICE_STEPS.name)
            rows = hooks.clock.rows
            device_rows = list(DEVICE_STEPS.struct.iter_unpack(ring.take(0, ring.appended).data))
            hooks.uninstall()

        flight.close(unlink=True)
        return losses, took_ms, rows, device_rows


def timed(case: Case, steps: int) -> tuple[list[float], float]:
    training = Training()
    losses, start = [], 0.0
    for step, loss in enumerate(case(training, steps)):
        losses.append(loss)
        if step == WARM_UP:
            torch.cuda.synchronize()
            start = time.perf_counter()

    torch.cuda.synchronize()
    took_ms = (time.perf_counter() - start) / max(steps - WARM_UP, 1) * 1e3
    return [loss.item() for loss in losses], took_ms


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main())
