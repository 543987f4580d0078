"""The cost of the hooks that a rank reports follows what its steps enter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.instrument.conftest import Traced
from traceml.instrument import backward
from traceml.instrument.backward import timed_backward
from traceml.instrument.maintenance import overhead
from traceml.instrument.maintenance.overhead import HookOverhead, entered_phases
from traceml.instrument.native.extension import use_time

TICK_NS = 100  # what each reading of the clock takes in these tests
HOOK_NS = 2 * TICK_NS  # a hook reads the clock twice


class Training:
    """A small training of some steps."""

    def __init__(self, traced: Traced) -> None:
        self.traced, self.model = traced, nn.Linear(4, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def _learn(self, x: torch.Tensor) -> None:
        self.model(x).sum().backward()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @staticmethod
    def _batches(number: int) -> Iterator[torch.Tensor]:
        for (x,) in DataLoader(TensorDataset(torch.randn(number, 4))):
            yield x

    def usual(self) -> None:
        for x in self._batches(3):
            self._learn(x)
            self._update()

    def without_loader(self) -> None:
        x = torch.randn(2, 4)
        for _ in range(3):
            self._learn(x)
            self._update()

    def accumulated(self) -> None:
        for number, x in enumerate(self._batches(12)):
            self._learn(x)
            if number % 4 == 3:
                self._update()

    def in_user_phases(self) -> None:
        for x in self._batches(3):
            for _ in range(5):
                with self.traced.instrumentation.phase("augment"):
                    torch.randn(2)

            with self.traced.instrumentation.phase("loss"):
                self._learn(x)

            self._update()

    def in_a_user_phase_before(self) -> None:
        with self.traced.instrumentation.phase("warm-up"):
            torch.randn(2)

        self.usual()


LOOPS = {
    Training.usual: 4,
    Training.without_loader: 3,
    Training.accumulated: 4 * 3 + 1,
    Training.in_user_phases: 4 + 5 + 1,
    Training.in_a_user_phase_before: 4,
}


@pytest.mark.parametrize(("loop", "entries"), LOOPS.items(), ids=[loop.__name__ for loop in LOOPS])
def test_phases_of_a_step_are_counted(traced: Traced, loop: Callable[[Training], None], entries: int) -> None:
    """Each micro-batch and each use of a user phase is an entry; what a step leaves out is none."""
    loop(Training(traced))
    traced.finish()

    assert entered_phases(traced.flight) == entries


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize(("loop", "entries"), LOOPS.items(), ids=[loop.__name__ for loop in LOOPS])
def test_the_figure_is_a_hook_per_entry(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, loop: Callable[[Training], None], entries: int, is_slow: bool
) -> None:
    """By a clock that each reading advances, hooks take two readings each, and the row takes none."""
    loop(Training(traced))
    traced.finish()
    ticks = count(0, TICK_NS)
    use_time(lambda: next(ticks))
    for module in (backward, overhead):
        monkeypatch.setattr(module, "monotonic_ns", lambda: next(ticks))

    measured = HookOverhead(timed_backward, traced.flight)
    for _ in range(3):
        measured.measure(is_slow=is_slow)

    assert measured.ns_per_step == entries * HOOK_NS


def test_one_of_two_measurements_that_was_interrupted_is_not_told(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program took the core meanwhile: a short run has no more than two."""
    Training(traced).usual()
    traced.finish()
    now, tick = 0, TICK_NS

    def read() -> int:
        nonlocal now
        now += tick
        return now

    use_time(read)
    for module in (backward, overhead):
        monkeypatch.setattr(module, "monotonic_ns", read)

    measured = HookOverhead(timed_backward, traced.flight)
    measured.measure(is_slow=False)
    usual, tick = measured.ns_per_step, 1000 * TICK_NS
    measured.measure(is_slow=False)

    assert measured.ns_per_step == usual > 0


def test_without_a_measurement_nothing_is_told(traced: Traced) -> None:
    """Before the first step the cost is 0."""
    assert HookOverhead(timed_backward, traced.flight).ns_per_step == 0
