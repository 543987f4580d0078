"""Size of the tensors that collectives carry: a logged loss is no exchange of gradients.

Only calls from Python are seen. The process group counts those from C++ too, so it is known where some were not seen.
Nothing is read any more once a tensor was too large for numbers that are logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.database.schema import MAX_LOGGED_NUMBERS

__all__ = ["CollectiveSizes"]

_MAX_TENSORS = 64


class CollectiveSizes:
    """The largest tensor that a collective of this process has carried."""

    def __init__(self, report: InfoSender) -> None:
        self._report = report
        self._largest = self._calls = 0
        self._sends = False

    def record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the arguments of a collective."""
        if self._largest <= MAX_LOGGED_NUMBERS:
            self._calls += 1
            self._take(max(map(_elements, (*args, *kwargs.values())), default=0))

    def record_message(self, _args: tuple[Any, ...], _kwargs: Mapping[str, Any]) -> None:
        """Take a message from rank to rank: ranks that send each other any train one model."""
        if not self._sends:
            self._sends = True
            self._largest = max(self._largest, MAX_LOGGED_NUMBERS + 1)
            self._report(InfoKind.COLLECTIVES, elements=self._largest, messages=True)

    def report(self, sequence: int) -> None:
        """Report the largest tensor, given the number of collectives of the process group, if all were seen."""
        if self._largest and self._calls >= sequence:
            self._report(InfoKind.COLLECTIVES, elements=self._largest)

    def _take(self, elements: int) -> None:
        self._largest = max(self._largest, elements)
        if elements > MAX_LOGGED_NUMBERS:
            self._report(InfoKind.COLLECTIVES, elements=elements)


def _elements(value: Any) -> int:
    """Return the size of a tensor, or of the largest of a list; a list of a user's objects may be of any length."""
    tensors = value[:_MAX_TENSORS] if isinstance(value, (list, tuple)) else (value,)
    return max((each.numel() for each in tensors if isinstance(each, Tensor)), default=0)
