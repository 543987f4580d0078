"""The parts of the open step that have ended, which become its row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from traceml.database.schema import StepFlag

__all__ = ["EndedParts", "time_since"]

_NO_LOADER = int(StepFlag.NO_LOADER)


@dataclass(slots=True)
class EndedParts:
    """Sums over the parts of a step that have ended: the content of its row.

    Attributes:
        times: nanoseconds by bucket at the last cut. Empty before one, and once the open part belongs to the same step.
        may_be_step: an optimizer has stepped in them, so they may be a whole step.
        is_trained: a backward pass ran in them, but that of a model in `eval()`.
        end_ns: monotonic.
        own_ns: own work in backward; counts only with `StepFlag.CALLBACK`.
        fingerprint: of the first batch that has one.
        create_ns: time to create iterators.
        drain_ns: time in which the workers of other iterators ended.
        loader: the first loader that gave the step a batch.
        sequence: number of collectives that the process group has issued at their end.
    """

    times: list[int]
    may_be_step: bool = False
    is_trained: bool = False
    end_ns: int = 0
    total_ns: int = 0
    micro_batches: int = 0
    flags: int = 0
    own_ns: int = 0
    elements: int = 0
    samples: int = 0
    fingerprint: int = 0
    create_ns: int = 0
    drain_ns: int = 0
    loader: Any = None
    sequence: int = 0

    @property
    def row_flags(self) -> int:
        """`StepFlag`s of the row."""
        return self.flags | (_NO_LOADER if self.loader is None else 0)

    def remove(self, first: EndedParts) -> None:
        """Take off the first of the parts, which are another step."""
        self.times = time_since(self.times, first.times)
        self.total_ns -= first.total_ns
        self.micro_batches -= first.micro_batches
        self.flags &= ~first.flags
        self.own_ns -= first.own_ns
        self.create_ns -= first.create_ns
        self.drain_ns -= first.drain_ns
        if first.fingerprint:
            self.fingerprint = 0


def time_since(times: list[int], before: list[int]) -> list[int]:
    """Return what each bucket has got since it had `before`, also those that were added meanwhile."""
    return [now - then for now, then in zip_longest(times, before, fillvalue=0)]
