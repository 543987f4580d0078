"""Marks of checkpoints: how many updates the last saved one holds, and which one a restarted training reads.

A script counts its steps from 0 when it is restarted. What it reads tells where it goes on: a file of the folder to
which an earlier attempt has saved.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from traceml.database.schema import Slot
from traceml.fail_open import fail_open
from traceml.instrument.patches import Patches
from traceml.instrument.step_clock import StepClock
from traceml.instrument.values.saves import target_path

__all__ = ["CheckpointMarks", "place_of"]

_log = logging.getLogger("traceml")
Info = dict[str, Any]


class CheckpointMarks:
    """Notes saves in the flight file's slots, and reads before the first step as rows of `info`.

    Args:
        slots: the open slots of the flight file.
        clock: of the steps.
        report: takes a row.
    """

    def __init__(self, slots: Any, clock: StepClock, report: Callable[[Info], None]) -> None:
        self._slots, self._clock, self._report = slots, clock, report

    def patch(self, patches: Patches) -> None:
        """Wrap `torch.save` and `torch.load`."""
        torch, serialization = sys.modules["torch"], sys.modules["torch.serialization"]
        saves = _noting(torch.save, lambda given, named: given[1] if len(given) > 1 else named.get("f"), self._saved)
        loads = _noting(torch.load, lambda given, named: given[0] if given else named.get("f"), self._loaded)
        for module in (torch, serialization):
            patches.wrap(module, "save", saves)
            patches.wrap(module, "load", loads)

    def patch_distributed(self, patches: Patches) -> None:
        """Wrap the functions of `torch.distributed.checkpoint`, whose checkpoint is a folder."""
        package = sys.modules["torch.distributed.checkpoint"]
        for name, note in (("save", self._saved), ("async_save", self._saved), ("load", self._loaded)):
            original = getattr(package, name, None)
            if original is not None:
                patches.wrap(package, name, _noting(original, lambda _, named: named.get("checkpoint_id"), note))

    def _saved(self, target: object) -> None:
        place, clock = place_of(target), self._clock
        if place is not None and clock.is_training_thread():
            self._slots[Slot.SAVED] = clock.step + bool(clock.attempt)
            self._slots[Slot.SAVED_IN] = place

    def _loaded(self, source: object) -> None:
        place, clock = place_of(source), self._clock
        if place is not None and clock.is_training_thread() and not clock.rows and not clock.attempt:
            self._report({"kind": "loaded", "place": place})


def place_of(target: object) -> int | None:
    """Return a number for the folder of a checkpoint; None where it has none, as a buffer in memory."""
    path = target_path(target)
    if path is None:
        return None

    folder = os.path.dirname(os.path.realpath(path))  # noqa: PTH120 - a PathLike of any kind
    return int.from_bytes(hashlib.blake2b(os.fsencode(folder), digest_size=8).digest(), "big") >> 1 or 1


def _noting(
    original: Callable[..., Any], find: Callable[[Any, Any], object], note: Callable[[object], None]
) -> Callable[..., Any]:
    """Return a function that calls `original`, then notes the file that `find` finds among its arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        with fail_open(_log, "instrument", "a checkpoint could not be noted", once=True):
            note(find(args, kwargs))

        return result

    return call
