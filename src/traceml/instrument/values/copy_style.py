"""Copies of data to a device: whether they are from pinned memory, and whether the script waits for them.

Of the first copies after the first step, which has that of the model, both are noted by bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from traceml.database.info_kinds import InfoKind, InfoSender

__all__ = ["CopyStyle"]

_COPIES = 32


class CopyStyle:
    """Shares of the copied bytes that came from pinned memory, and that were copied without waiting.

    Attributes:
        wants_more: whether more copies are to be recorded.
    """

    def __init__(self, report: InfoSender, rows: Callable[[], int]) -> None:
        self._report, self._rows = report, rows
        self._copies = self._bytes = self._pinned = self._non_blocking = 0
        self.wants_more = True

    def record(self, tensor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take a tensor on the CPU that was copied, and the arguments of its `to` or `cuda`."""
        if not self._rows():
            return

        self._copies += 1
        if tensor.layout is torch.strided:  # a sparse one has neither a size nor pinned memory of its own
            size = tensor.nbytes
            self._bytes += size
            self._pinned += size * bool(tensor.is_pinned())
            self._non_blocking += size * _is_non_blocking(args, kwargs)

        if self._copies == _COPIES:
            self.wants_more = False
            whole = max(self._bytes, 1)
            shares = {"pinned": self._pinned / whole, "non_blocking": self._non_blocking / whole}
            self._report(InfoKind.COPIES, **{name: round(share, 2) for name, share in shares.items()})


def _is_non_blocking(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return the argument `non_blocking`: in both methods the first that may be a bool."""
    given = kwargs.get("non_blocking")
    return bool(next((each for each in args if isinstance(each, bool)), False) if given is None else given)
