"""Marks of checkpoints: how many updates the last saved one holds, and which one a restarted training reads.

A script counts its steps from 0 when it is restarted. What it reads shows where it continues: a file of the folder to
which an earlier attempt has saved. A file that is too small for the trained model, as one of metrics, is no checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.database.schema import Slot
from traceml.fail_open import fail_open
from traceml.instrument.checkpoints.save_log import size_of, target_path
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.step_clock import StepClock

__all__ = ["CheckpointMarks", "Find", "folder_number"]

Find = Callable[[tuple[Any, ...], Mapping[str, Any]], object]
"""Returns the path or file among the arguments of a function; None if there is none."""

_log = logging.getLogger("traceml")


class CheckpointMarks:
    """Notes saves in the flight file's slots, and reads before the first step as rows of `info`.

    Args:
        least_bytes: returns the bytes that a file with the trained model has at least.
    """

    def __init__(self, slots: Any, clock: StepClock, report: InfoSender, least_bytes: Callable[[], int]) -> None:
        self._slots, self._clock, self._report, self._least_bytes = slots, clock, report, least_bytes

    def steps(self) -> int:
        """Return how many updates a checkpoint has that begins to be saved."""
        done: int = self._clock.step + bool(self._clock.step_call)
        return done

    def saved(self, target: object, steps: int) -> None:
        """Record that a path or file with so many updates has been saved, by any thread."""
        place = folder_number(target)
        if place is None or self._is_other(target):
            return

        # One that a thread writes may end after a newer one.
        if self._clock.is_training_thread() or steps >= self._slots[Slot.SAVED]:
            self._slots[Slot.SAVED] = steps
            self._slots[Slot.SAVED_IN] = place

    def _is_other(self, target: object) -> bool:
        """Whether a file is certainly too small for a checkpoint. Of an open one, the end may not be written yet."""
        path = None if hasattr(target, "write") else target_path(target)
        size = None if path is None else size_of(path)
        return size is not None and 0 <= size < self._least_bytes()

    def loaded(self, source: object) -> None:
        """Report that the training thread has read a path or file before its first step."""
        place, clock = folder_number(source), self._clock
        if place is not None and clock.is_training_thread() and not clock.rows and not clock.step_call:
            self._report(InfoKind.LOADED, place=place)

    @uncounted
    def loading(self, original: Callable[..., Any], find: Find) -> Callable[..., Any]:
        """Return a function that calls `original`, which loads."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            with fail_open(_log, "instrument", "a checkpoint could not be noted", once=True):
                self.loaded(find(args, kwargs))

            return result

        return call


def folder_number(target: object) -> int | None:
    """Return a number for the folder of a checkpoint; None if it has none, as a buffer in memory."""
    path = target_path(target)
    if path is None:
        return None

    folder = os.path.dirname(os.path.realpath(path))  # noqa: PTH120 - a PathLike of any kind
    return int.from_bytes(hashlib.blake2b(os.fsencode(folder), digest_size=8).digest(), "big") >> 1 or 1
