"""Checkpoints: how long each took, where it went, who called for it, and the folder of all."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

from traceml.clock import monotonic_ns
from traceml.instrument.step_clock import StepClock

__all__ = ["Save", "SaveFolder", "SaveLog", "size_of", "target_path"]

_MAX_WAITING = 256
_MAX_TARGETS = 64


class Save(NamedTuple):
    """A call that saved, with the calls inside it."""

    t_end_ns: int  # its end, monotonic
    step: int
    ns: int
    targets: tuple[str, ...]  # files and folders that it was given
    # Bytes of each when it ended, before the script renames or overwrites it; None of a folder, -1 where not known.
    sizes: tuple[int | None, ...]
    code: CodeType | None  # the user's code that called it, and its line; None, 0 if none did
    line: int
    is_written: bool  # whether its files are complete at its end


class SaveLog:
    """Records saves on the training thread; the recorder's thread takes them.

    Attributes:
        caller: returns the user's code and line of a frame.
    """

    def __init__(self) -> None:
        self.caller: Callable[[FrameType], tuple[CodeType | None, int]] = lambda _frame: (None, 0)
        self._done: deque[Save] = deque(maxlen=_MAX_WAITING)
        self._targets: list[str] = []

    def drain(self) -> list[Save]:
        """Return the saves since the last call, at most 256."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def add_nested(self, clock: StepClock, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record the target of a call inside another save."""
        try:
            self._add_target(args, kwargs)
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

    def end(
        self,
        clock: StepClock,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        began_ns: int,
        frame: FrameType,
        *,
        is_written: bool = True,
    ) -> None:
        """Record a save that ends now.

        Args:
            frame: of the function that times it.
            is_written: whether the checkpoint's files are complete; a thread or process may still write them.
        """
        try:
            self._add_target(args, kwargs)
            now, targets = monotonic_ns(), tuple(dict.fromkeys(self._targets))
            self._targets = []
            sizes = tuple(size_of(target) if is_written else -1 for target in targets)
            code, line = self.caller(frame)
            self._done.append(Save(now, clock.step, now - began_ns, targets, sizes, code, line, is_written))
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

    def _add_target(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record the first file or folder among the arguments."""
        for value in (*args, *kwargs.values()):
            target = target_path(value)
            if target is not None and len(self._targets) < _MAX_TARGETS:
                self._targets.append(target)
                return


def size_of(path: str) -> int | None:
    """Return the bytes of a file; None of a folder, -1 where it is gone or is not a path."""
    try:
        found = os.stat(path)  # noqa: PTH116 - on the training thread
    except (OSError, ValueError):
        return -1

    return None if stat.S_ISDIR(found.st_mode) else found.st_size


def target_path(target: object) -> str | None:
    """Return the path of a file or folder that a function saves to or loads from; None of a buffer in memory.

    Args:
        target: an argument of the function: a path, an open file, or anything else.
    """
    is_file = hasattr(target, "write") or hasattr(target, "read")
    path = getattr(target, "name", None) if is_file else target
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None


class SaveFolder:
    """Folder into which checkpoints are written.

    Args:
        report: called with the folder when it is another one.

    Attributes:
        path: absolute, and common to the checkpoints so far where they have a folder each; None before the first.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.path: str | None = None
        self._report = report

    def record(self, target: Any) -> None:
        """Note a path, or an open file; anything else has no folder."""
        path = target_path(target)
        if path is None or "://" in path:
            return

        folder = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120 - a link stays one, and it costs less
        if self.path is not None and folder != self.path:
            common = os.path.commonpath([self.path, folder])
            folder = common if common.count("/") > 1 else folder

        if folder != self.path:
            self.path = folder
            self._report(folder)
