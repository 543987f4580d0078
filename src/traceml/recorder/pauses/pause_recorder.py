"""Rows of pauses: each cycle of the recorder's thread takes what the collector and dynamo have reported."""

from __future__ import annotations

import os
import time  # that of the script: torch dates the ends of its compilations by it
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from traceml.clock import monotonic_ns
from traceml.database.schema import STEPS, Pause, Phase, Slot
from traceml.inspection.user_files import display_path
from traceml.privacy import secrets_only
from traceml.recorder.pauses.collection_watch import LONG_NS, Collection, CollectionWatch
from traceml.recorder.pauses.compilations import Compilation, CompilationReader
from traceml.recorder.user_code import user_line

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.instrument.checkpoints.save_log import Save, SaveLog

__all__ = ["PauseRecorder", "size_of"]

_SHORT_SHARE = 0.02  # short collections that take less of the time are not reported
_MIN_NS = 10**8
_CHECKPOINT = int(Phase.CHECKPOINT)
_MAX_FILES = 1000
_MAX_ROWS = 2048
_Row = tuple[int, ...]
_STEP, _T_END, _TOTAL = map(STEPS.names.index, ("step", "t_end_ns", "total_ns"))


class PauseRecorder:
    """Called in each cycle of the recorder's thread.

    Args:
        flight: takes the rows of `schema.PAUSES`.
        saves: records checkpoints; None without hooks.
    """

    def __init__(
        self,
        flight: FlightFile,
        is_evaluating: Callable[[], bool],
        is_user: Callable[[FrameType], bool],
        saves: SaveLog | None = None,
    ) -> None:
        self._slots, self._ring, self._name_id = flight.open_slots, flight.ring("pauses"), flight.names.id_of
        self._steps = flight.ring("steps")
        self._compilations = CompilationReader()
        self._compiled: list[tuple[Compilation, int]] = []  # with their ends, while their steps have not ended
        self._stood: tuple[int, bool] | None = None  # steps that had ended then, and whether one was open
        self._saves = saves
        if saves is not None:
            saves.caller = lambda frame: user_line(frame, is_user)

        self._watch = CollectionWatch(self._slots, is_evaluating, is_user)
        self._watch.start()
        self._turn = monotonic_ns(), self._slots[Slot.STEP]
        self._since_ns = self._turn[0]

    def __call__(self, last: bool) -> None:
        """Append rows; with `last`, stop watching."""
        if last:
            self._watch.stop()

        now, step = monotonic_ns(), self._slots[Slot.STEP]
        for each in self._watch.drain_long():
            self._append_collection(each)

        for save in self._saves.drain() if self._saves is not None else ():
            self._append_save(save)

        begun_ns = time.time_ns() - now  # of the monotonic clock
        new = [(each, 1000 * each.end_us - begun_ns) for each in self._compilations.drain()]
        self._append_compilations(new, step, last=last)
        self._drain_short(now, step)
        self._turn = now, step

    def forget(self) -> None:
        """Stop watching, in a forked child."""
        self._watch.stop()

    def _drain_short(self, now: int, step: int) -> None:
        passed = now - self._since_ns
        if passed < _MIN_NS:
            return

        count, ns = self._watch.drain_short()
        self._since_ns = now
        if ns >= _SHORT_SHARE * passed:
            self._append_collection(Collection(now, step, -1, ns, count, 0))

    def _append_collection(self, each: Collection) -> None:
        line = self._id(_place(each.code, each.line)) if each.code is not None else -1
        library = self._id(_place(each.library, each.library_line)) if each.library is not None else -1
        cause, called = int(Pause.COLLECTION), int(each.code is not None)
        self._ring.append(
            each.t_end_ns,
            each.step,
            cause,
            each.phase,
            each.ns,
            each.together,
            each.generation,
            called,
            -1,
            line,
            library,
        )

    def _append_save(self, save: Save) -> None:
        if save.ns < LONG_NS:
            return

        line = self._id(_place(save.code, save.line)) if save.code is not None else -1
        file = self._id(secrets_only().mask_value("file", save.targets[0])) if save.targets else -1
        size = size_of(save.targets, save.sizes)
        cause, later = int(Pause.SAVE), int(not save.is_written)
        self._ring.append(save.t_end_ns, save.step, cause, _CHECKPOINT, save.ns, 1, later, 1, size, line, file)

    def _append_compilations(self, new: Sequence[tuple[Compilation, int]], step: int, *, last: bool) -> None:
        """Append those whose steps have ended; nothing can have changed before another step has."""
        self._compiled += new
        stands, self._stood = self._stood, (self._steps.appended, step >= 0)
        if self._compiled and (new or last or stands != self._stood):
            rows = self._newest_rows()
            pending = [each for each in self._compiled if not self._append_compilation(*each, step, rows, last=last)]
            self._compiled = pending

    def _append_compilation(
        self, each: Compilation, ended_ns: int, step: int, rows: Sequence[_Row], *, last: bool
    ) -> bool:
        """Append a compilation; return False, and do nothing, where the step that it was in has not ended.

        Only rows tell that step: where no loader is read, a step is known to begin only by what follows.
        """
        middle_ns = ended_ns - each.ns // 2
        number = bisect_left(rows, middle_ns, key=lambda row: row[_T_END])
        before, after = (rows[each] if 0 <= each < len(rows) else None for each in (number - 1, number))
        if after is None and step >= 0 and not last:
            return False

        if after is not None and after[_T_END] - after[_TOTAL] <= middle_ns:
            step = after[_STEP]
        elif after is not None and (before is not None or not after[_STEP]):
            step = -1  # between steps
        elif middle_ns <= self._turn[0]:
            step = self._turn[1]

        place = self._id(each.place) if each.place else -1
        guard = self._id(secrets_only().mask_value("guard", each.guard)) if each.guard else -1
        self._ring.append(ended_ns, step, int(Pause.COMPILATION), -1, each.ns, 1, each.detail, 0, -1, place, guard)
        return True

    def _newest_rows(self) -> list[_Row]:
        ring = self._steps
        found = ring.read_from(max(ring.appended - _MAX_ROWS, 0), _MAX_ROWS)
        return list(STEPS.struct.iter_unpack(found.data))

    def _id(self, text: str) -> int:
        known = self._name_id(text)
        return -1 if known is None else known


def _place(code: CodeType, line: int) -> str:
    return f"{display_path(code.co_filename)}:{line} {code.co_qualname}"


def size_of(targets: Sequence[str], sizes: Sequence[int | None]) -> int:
    """Return the bytes of files, and of the files directly in folders, each once; -1 where that is not known.

    Args:
        sizes: of each file; None of a folder, which may have many files: they are not read on the training thread.
    """
    if -1 in sizes:
        return -1

    known = list(zip(map(Path, targets), sizes, strict=True))
    folders = {path for path, size in known if size is None}
    try:
        own = sum(size for path, size in known if size is not None and path.parent not in folders)
        return own + sum(map(_size_of_folder, folders)) or -1
    except OSError:
        return -1


def _size_of_folder(path: Path) -> int:
    with os.scandir(path) as entries:
        return sum(entry.stat().st_size for entry in islice(entries, _MAX_FILES) if entry.is_file())
