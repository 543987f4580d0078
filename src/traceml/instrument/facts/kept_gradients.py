"""Gradients that a training never clears: without `zero_grad()` each backward adds to those of all steps before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.instrument.facts.descriptions import param_groups

__all__ = ["KeptGradients", "may_read_tensors"]

_STEPS = 8
"""So many steps begin with the gradients of those before: they are kept on purpose for fewer, if at all."""
_MOST = 4  # optimizers that are watched


class KeptGradients:
    """Looks before each backward that is read whether a gradient is clear, until it was once.

    As a rule that is in the second step, after which nothing is looked at any more.

    Args:
        step: returns the number of steps so far.
        report: appends a row of `info`.

    Attributes:
        watched: gradients that are looked at; empty as a rule, and then there is no need to look.
    """

    def __init__(self, step: Callable[[], int], report: InfoSender) -> None:
        self._step, self._report = step, report
        self.watched: list[_WatchedGradient] = []

    def watch(self, optimizer: Any) -> None:
        """Watch the smallest parameter that an optimizer, which makes its first step, has a gradient of."""
        parameters = (each for group in param_groups(optimizer) for each in group["params"])
        smallest = min(filter(_is_readable, parameters), key=lambda each: each.numel(), default=None)
        if smallest is not None and len(self.watched) < _MOST:
            self.watched.append(_WatchedGradient(weakref.ref(smallest), type(optimizer).__name__, set()))

    def look(self) -> None:
        """Look at the gradients before a backward."""
        if self.watched and may_read_tensors():
            self.watched = [each for each in self.watched if self._is_kept(each)]

    def _is_kept(self, watched: _WatchedGradient) -> bool:
        """Report a gradient that was kept for long; return whether it is to be watched further."""
        parameter = watched.parameter()
        if parameter is None or not _is_readable(parameter) or not parameter.grad.any():
            return False

        watched.steps.add(self._step())
        if len(watched.steps) < _STEPS:
            return True

        self._report(InfoKind.KEPT_GRADIENTS, optimizer=watched.optimizer)
        return False


class _WatchedGradient(NamedTuple):
    """The gradient of one parameter of an optimizer."""

    parameter: Callable[[], Any]  # weak reference
    optimizer: str  # its class
    steps: set[int]  # that began with a gradient


def _is_readable(parameter: Any) -> bool:
    """Return whether a parameter has a plain gradient: one of shards is read by ranks together."""
    grad: Any = getattr(parameter, "grad", None)
    return type(grad) is torch.Tensor and grad.layout is torch.strided and grad.numel() > 0


def may_read_tensors() -> bool:
    """Return whether tensors have values: not while fake ones are traced, or a CUDA graph is captured."""
    is_captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return not torch._C._len_torch_dispatch_stack() and not is_captured
