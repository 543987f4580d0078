"""Which code runs for an iterator that gives batches and is no DataLoader."""

from __future__ import annotations

import collections
import queue
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest
import torch

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, net, sgd, train
from traceml.inspection.thread_frames import stack_frames

X = torch.randn(2, 4)


class Asked:
    """Answers for each function, as a sample would get them while it runs."""

    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self.answers: dict[str, set[bool]] = {}

    def __call__(self) -> torch.Tensor:
        """Note whether the caller runs for the training's iterator."""
        frame, source = sys._getframe(1), self._traced.instrumentation.events.batch_source
        if source is not None:
            self.answers.setdefault(frame.f_code.co_name, set()).add(source.contains(stack_frames(frame)))

        return X


def read(ask: Asked) -> torch.Tensor:
    return ask()


def batches(ask: Asked) -> Iterator[torch.Tensor]:
    for _ in range(5):
        yield read(ask)


def with_progress(ask: Asked) -> Iterator[torch.Tensor]:
    for _, x in enumerate(batches(ask)):
        yield x


class Batches:
    """An iterator written as a class, as torchdata's nodes."""

    def __init__(self, ask: Asked) -> None:
        self._ask, self._left = ask, 5

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> torch.Tensor:
        self._left -= 1
        if self._left < 0:
            raise StopIteration

        return read(self._ask)


@contextmanager
def logging(ask: Asked) -> Iterator[None]:
    ask()
    yield


def metrics(ask: Asked) -> Iterator[torch.Tensor]:
    yield ask()


@pytest.mark.parametrize("make", [batches, with_progress, Batches])
def test_what_the_iterator_runs_is_told_from_other_code(traced: Traced, make: Callable[[Asked], Any]) -> None:
    """A context manager and a generator that a step uses up are other code, though they are generators."""
    ask = Asked(traced)
    model = net()
    optimizer = sgd(model)
    for x in make(ask):
        train(model, optimizer, x)
        with logging(ask):
            list(metrics(ask))

        [ask() for _ in range(2)]
        sum(ask().sum() for _ in range(2))

    others = {"logging", "metrics", "<listcomp>", "<genexpr>"} - (
        {"<listcomp>"} if sys.version_info >= (3, 12) else set()
    )
    assert ask.answers.pop("read") == {True}
    assert {name: ask.answers[name] for name in others} == {key: {False} for key in others}
    assert len(traced.finish()) == 5


def test_a_generator_of_losses_gives_no_batches(traced: Traced) -> None:
    """It is suspended during the backward pass, as Pyro's generator of traces, but not when the optimizer steps."""
    ask = Asked(traced)
    model = net()
    optimizer = sgd(model)

    def losses(x: torch.Tensor) -> Iterator[torch.Tensor]:
        for _ in range(2):
            ask()
            yield model(x).sum()

    for step, x in enumerate(batches(ask)):
        for loss in losses(x):
            loss.backward()

        optimizer.step()
        if not step:
            ask.answers.clear()  # the generators are known since the first step

    assert ask.answers == {"losses": {False}, "read": {True}}
    assert len(traced.finish()) == 5


def test_a_loader_needs_no_search(traced: Traced) -> None:
    """Its waits are measured."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(3):
        train(model, optimizer, x)

    assert traced.instrumentation.events.batch_source is None


def test_the_queue_of_another_thread_feeds_the_training(traced: Traced) -> None:
    """The loop takes its batches from it; a queue that a function of the loop reads is other code."""
    ask = Asked(traced)

    class Tensors(queue.Queue):
        def _get(self) -> Any:
            ask()
            return super()._get()

    batches, messages = Tensors(), Tensors()
    for _ in range(5):
        batches.put(X)
        messages.put(X)

    def log() -> None:
        messages.get()

    model = net()
    optimizer = sgd(model)
    train(model, optimizer, batches.get())
    for _ in range(4):
        train(model, optimizer, batches.get())
        assert ask.answers.pop("_get") == {True}
        log()
        assert ask.answers.pop("_get") == {False}


def test_the_results_of_a_pool_feed_the_training(traced: Traced) -> None:
    """The loop takes its batches from `imap`, which is no generator."""
    ask = Asked(traced)

    class Items(collections.deque[Any]):
        def popleft(self) -> Any:
            ask()
            return super().popleft()

    model = net()
    optimizer = sgd(model)
    with ThreadPool(1) as pool:
        results: Any = pool.imap(lambda _: X, range(3))
        with results._cond:
            results._items = Items(results._items)

        train(model, optimizer, next(results))
        ask.answers.clear()
        for x in results:
            train(model, optimizer, x)

    assert ask.answers == {"popleft": {True}}
