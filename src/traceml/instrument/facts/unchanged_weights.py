"""Weights that a training never changes: its optimizers never step, or their parameters have no gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.instrument.facts.descriptions import param_groups
from traceml.instrument.facts.kept_gradients import may_read_tensors

if TYPE_CHECKING:
    from traceml.instrument.step_clock import StepClock

__all__ = ["UnchangedWeights"]

_STEPS = 32  # without a change, before they are reported
_TENSORS, _VALUES = 16, 8  # so many parameters, and values of each, are compared


class UnchangedWeights:
    """Compares the parameters of all optimizers with those at the first backward, until one has changed.

    As a rule that is at the first look, after which nothing is looked at any more.

    Args:
        optimizers: returns those that are alive.
        report: appends a row of `info`.
    """

    def __init__(self, clock: StepClock, optimizers: Callable[[], Iterable[Any]], report: InfoSender) -> None:
        self._clock, self._optimizers, self._report = clock, optimizers, report
        self._starts: weakref.WeakKeyDictionary[Any, _KnownParameters] = weakref.WeakKeyDictionary()
        self._is_over = True  # until the first backward
        self._is_reported = False

    def begin(self) -> None:
        """Note the parameters before the first backward."""
        self._is_over = not may_read_tensors()
        for optimizer in self._optimizers():
            self._add(optimizer)

    def look(self, *, is_last: bool = False) -> None:
        """Report that no parameter has changed, or that one has after such a report.

        Args:
            is_last: whether the training is over, and its optimizers may be gone.
        """
        alive = [] if self._is_over or not may_read_tensors() else list(self._optimizers())
        if not alive:
            return

        stepped = [each for each in alive if id(each) in self._clock.optimizers]
        is_one_gone = len(stepped) < self._clock.optimizers_seen
        if is_one_gone and is_last:
            return

        if is_one_gone or any(map(self._has_changed, alive)):
            self._end()
        elif self._clock.rows - max(start.rows for start in self._starts.values()) >= _STEPS:
            self._is_reported = True
            self._report(InfoKind.UNCHANGED_WEIGHTS, **_described(stepped or alive), stepped=int(bool(stepped)))

    def _has_changed(self, optimizer: Any) -> bool:
        start = self._starts.get(optimizer)
        if start is None:
            self._add(optimizer)
            return self._is_over

        is_same = start.states == len(optimizer.state) and start.versions == _versions(optimizer)
        return not is_same or start.values != _values(optimizer)

    def _add(self, optimizer: Any) -> None:
        """Note the parameters of one optimizer; of others than torch's, some keep the weights elsewhere."""
        types = {type(_local(each)) for each in _parameters(optimizer)}
        if not type(optimizer).__module__.startswith("torch.optim.") or types != {torch.Tensor}:
            self._end()
            return

        states, versions, values = len(optimizer.state), _versions(optimizer), _values(optimizer)
        self._starts[optimizer] = _KnownParameters(self._clock.rows, states, versions, values)

    def _end(self) -> None:
        self._is_over = True
        self._starts.clear()
        if self._is_reported:
            self._report(InfoKind.UNCHANGED_WEIGHTS, optimizer="", parameters=0, trainable=0, stepped=0)


class _KnownParameters(NamedTuple):
    """The parameters of an optimizer, as they were."""

    rows: int  # steps until then
    states: int  # parameters of which the optimizer had a state: it has one of each that had a gradient, or none
    versions: list[tuple[int, int]]
    values: list[list[float]]


def _described(optimizers: list[Any]) -> dict[str, Any]:
    parameters = [each for optimizer in optimizers for each in _parameters(optimizer)]
    return {
        "optimizer": type(optimizers[0]).__name__,
        "parameters": len(parameters),
        "trainable": sum(each.requires_grad for each in parameters),
    }


def _parameters(optimizer: Any) -> Iterator[Any]:
    return (each for group in param_groups(optimizer) for each in group["params"] if each.numel())


def _local(parameter: Any) -> Any:
    """Return a parameter as a plain tensor, of a `DTensor` the shard of this rank; else another one."""
    tensor = parameter.detach()
    return getattr(tensor, "_local_tensor", tensor)


def _versions(optimizer: Any) -> list[tuple[int, int]]:
    """Return which tensors the parameters are, and how often each was written to."""
    return [(id(each), each._version) for each in _parameters(optimizer)]


def _values(optimizer: Any) -> list[list[float]]:
    """Return some values: writes by `.data`, and those of several shards at once, are not counted."""
    locals_ = (_local(each) for each in islice(_parameters(optimizer), _TENSORS))
    return [each.flatten()[:_VALUES].tolist() for each in locals_ if not each.is_meta]
