"""Both forms of the clock write the same rows: random loops over the same fake time, equal to the last ns."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.instrument.clocks import use_clock
from tests.instrument.conftest import FEW_ROWS, Traced
from traceml.database.flight.flight import FlightFile
from traceml.instrument import (
    clock_implementations,
    install,
)
from traceml.instrument.native.extension import extension, use_time
from traceml.instrument.values import step_pace

_TABLES = ("steps", "evals", "epochs", "user_phases", "fingerprints")
_EVENTS = 400


class Stop(Exception):
    """An error of the training."""


class Loop:
    """A loop whose parts come in a random order, some of them failing."""

    def __init__(self, traced: Traced, seed: int) -> None:
        self.chance, self.traced = random.Random(seed), traced
        self.models = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))]
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in self.models]
        self.loaders = [torch.utils.data.DataLoader(torch.randn(6, 4), batch_size=size) for size in (1, 2)]
        self.iterators: list[Any] = [iter(each) for each in self.loaders]
        self.x = torch.randn(2, 4)
        self.losses: list[torch.Tensor] = []
        self.fails = False
        for model in self.models:
            model.register_forward_hook(lambda *_: self._may_fail())

        for each in self.optimizers:
            each.register_step_post_hook(lambda *_: self._may_fail())

    def run(self) -> None:
        usual: list[Callable[[], None]] = [self.next_batch, self.forward, self.backward, self.step]
        rare = [
            self.evaluate,
            self.phase,
            self.crossed_phases,
            self.collective,
            self.accumulate,
            self.other,
            self.block,
            self.failing,
        ]
        has_loader = self.chance.random() < 0.7
        self.one = 0 if self.chance.random() < 0.7 else None
        while self.chance.random() > 1 / _EVENTS:
            for event in usual if has_loader else usual[1:]:
                event()
                if self.chance.random() < 0.04:
                    self.chance.choice(rare)()

    def _which(self) -> int:
        return self.chance.randrange(2) if self.one is None else self.one

    def _may_fail(self) -> None:
        if self.fails:
            self.fails = False
            raise Stop

    def next_batch(self) -> None:
        at = self._which()
        try:
            self.x = next(self.iterators[at])
        except StopIteration:
            self.iterators[at] = iter(self.loaders[at])

    def forward(self) -> None:
        self.losses = [self.models[self._which()](self.x).sum()]

    def backward(self) -> None:
        while self.losses:
            self.losses.pop().backward()

    def step(self) -> None:
        self.optimizers[self._which()].step()

    def evaluate(self) -> None:
        with torch.no_grad():
            for _ in range(self.chance.randrange(4)):
                self.models[0].eval()(self.x)

        self.models[0].train()

    def phase(self) -> None:
        with self.traced.instrumentation.phase(self.chance.choice("ab")):
            self.chance.choice([self.forward, self.backward, self.other])()

    def crossed_phases(self) -> None:
        """Phases as generators leave them: the outer one ends first, then the inner one, which has ended with it."""
        outer, inner = (self.traced.instrumentation.phase(name) for name in self.chance.sample("abc", 2))
        outer.__enter__()
        inner.__enter__()
        self.chance.choice([self.forward, self.other])()
        outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)

    def collective(self) -> None:
        clock = self.traced.instrumentation.clock
        began = clock.enter(5)
        if began is not None:
            self.chance.choice([clock.leave, clock.cancel])(5, began)

    def accumulate(self) -> None:
        self.forward()
        self.backward()

    def other(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.models[0].parameters(), 1.0)

    def block(self) -> None:
        if self.chance.random() < 0.05:
            with self.traced.instrumentation.trace_step():
                self.accumulate()

    def failing(self) -> None:
        self.fails = True
        try:
            self.chance.choice([self.forward, self.step])()
        except Stop:
            return


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    if extension() is None:
        pytest.skip("the hooks in C are not built: there is only one form")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    use_time(None)
    torch.set_num_threads(threads)


def rows_of(form: str, folder: Path, seed: int) -> dict[str, Any]:
    """Run a loop with one form; return its rows, and the words of what is open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEML_NATIVE", "1" if form == "native" else "0")
        ticks = count(1_000_000, 1_000)
        use_clock(patch, lambda: next(ticks), clock_implementations, step_pace)

        torch.manual_seed(seed)
        gc.collect()
        flight = FlightFile.create(folder, {}, capacities=FEW_ROWS)
        instrumentation = install(flight, device_types=frozenset())
        traced = Traced(flight, instrumentation)
        try:
            Loop(traced, seed).run()
            words = list(flight.open_slots)[:20]
            instrumentation.close_open_step()
            assert instrumentation.clock.errors == 0
            return {name: traced.table(name) for name in _TABLES} | {"words": words}
        finally:
            instrumentation.uninstall()
            flight.close(unlink=True)


@pytest.mark.parametrize("seed", range(12))
def test_random_loops(tmp_path: Path, seed: int) -> None:
    """Rows of all tables, and the words for what is open, are equal."""
    native, python = (rows_of(form, tmp_path / form, seed) for form in ("native", "python"))

    for name, rows in python.items():
        assert native[name] == rows, name
