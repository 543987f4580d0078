"""Header pages of a flight file: who writes it, what is open now, and the counters of its tables.

The file: a page of int64 words (prologue, open slots, counters), the identity twice (one is current while the other is
rewritten), the layout of the tables, and the tables themselves.

Process: the rank writes; the aggregator, readers and the agent of a launch read.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgpack

from traceml.clock import clock_pair
from traceml.database.flight.row_rings import pack_map
from traceml.database.schema import LINE_OTHER, LINE_OUTSIDE, LINE_STARTUP, OPEN_SLOTS, Phase, Slot
from traceml.trusted_files import GuardedDescriptor, create_trusted

__all__ = [
    "COUNTERS_AT", "DATA_AT", "DEAD_SINCE_AT", "IDENTITY_AT", "LAYOUT_AT", "MAGIC", "OPEN_SLOTS_AT", "PROLOGUE",
    "VERSION", "FlightHeader", "FlightState", "FolderClaim", "MappedFile", "is_locked", "lock_holder", "open_phase",
    "own_mapping",
]  # fmt: skip

MAGIC = b"TRACEMLF"
VERSION = 3
# magic, version, file size, monotonic and epoch timestamps of its creation, current identity (0 or 1), lengths of both
# identities, length of the layout, epoch second at which a cleanup first found the owner dead
PROLOGUE = struct.Struct("@8s9q")
DEAD_SINCE_AT = 72
OPEN_SLOTS_AT = 128
COUNTERS_AT = OPEN_SLOTS_AT + 8 * OPEN_SLOTS
IDENTITY_AT = (4096, 8192)
_IDENTITY_BYTES = 4096
LAYOUT_AT = 12288
_LAYOUT_BYTES = 4096
DATA_AT = 16384

_PHASES = len(Phase)
_STEP_START, _EXIT_START = int(Slot.STEP_START), int(Slot.EXIT_START)

_FLOCK = struct.Struct("@hhqqi4x")
# Files of this process by (pid, device, inode). Closing any descriptor of such a file would drop its lock, so it is
# never opened a second time.
_own_mappings: dict[tuple[int, int, int], mmap.mmap] = {}


class FlightState(IntEnum):
    """Progress of a rank as it reported itself (slot STATE)."""

    STARTING = 0
    RUNNING = 1
    FINISHED = 2
    FAILED = 3


class MappedFile:
    """A new file of this process: mapped, all its blocks reserved, and locked until the process ends.

    Args:
        path: where it is created; the folder exists.

    Raises:
        OSError: there is no room, no permission, or a file of that name.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.descriptor = create_trusted(path)
        """The descriptor of the file, -1 once it is closed. Closing a duplicate of it drops the lock."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self.descriptor, 0, size)
            # mmap duplicates the descriptor. It must live as long as the lock, which closing any descriptor would drop.
            self.memory = mmap.mmap(self.descriptor, size)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(self.descriptor)
            raise

        self._own = GuardedDescriptor(self.descriptor)
        self._key = os.getpid(), *self._own.file
        _own_mappings[self._key] = self.memory

    def close(self, *, unlink: bool) -> None:
        """Drop the lock, and remove the file if wanted. The mapping stays while something refers to it."""
        if self.descriptor < 0:
            return

        with suppress(FileNotFoundError, PermissionError):  # a process may have given up its rights since
            if unlink:
                self.path.unlink()

        _own_mappings.pop(self._key, None)
        self._own.close()  # drops the lock
        self.descriptor = -1


class FlightHeader:
    """Writer of the header pages.

    Attributes:
        words: the first page as int64.
        open_slots: one word per `Phase`, then one per `Slot`.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        view = memoryview(memory)
        self.words = view[: IDENTITY_AT[0]].cast("q")
        self.open_slots = view[OPEN_SLOTS_AT:COUNTERS_AT].cast("q")
        self.open_slots[Slot.STEP] = -1
        self.identity: dict[str, Any] = {}

    def begin(self, layout: list[list[Any]], identity: dict[str, Any]) -> None:
        """Write the prologue, the layout of the tables and the identity.

        Raises:
            ValueError: the layout is too long.
        """
        packed = msgpack.packb(layout)
        if len(packed) > _LAYOUT_BYTES:
            raise ValueError(f"the layout of the tables takes {len(packed)} bytes, {_LAYOUT_BYTES} are reserved")

        self._memory[LAYOUT_AT : LAYOUT_AT + len(packed)] = packed
        PROLOGUE.pack_into(
            self._memory, 0, bytes(8), VERSION, len(self._memory), *clock_pair(), 0, 0, 0, len(packed), 0
        )
        self.update_identity(**identity)
        self._memory[: len(MAGIC)] = MAGIC  # last: a file without it is incomplete

    def update_identity(self, **fields: Any) -> None:
        """Change the facts about the writer. The old copy stays valid until the switch is complete."""
        self.identity = self.identity | fields
        packed = _pack_to_fit(self.identity, _IDENTITY_BYTES)
        spare = 1 - (self.words[5] & 1)
        start = IDENTITY_AT[spare]
        self._memory[start : start + len(packed)] = packed
        self.words[6 + spare] = len(packed)
        self.words[5] = spare


class FolderClaim:
    """A flight file without tables, next to the files on disk of a rank whose flight file is in memory.

    Memory is empty after a reboot. Then this file shows whose files they are.

    Args:
        path: its path, with the name of the rank's flight file.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._file = MappedFile(path, DATA_AT)
        self._header = FlightHeader(self._file.memory)
        self._header.begin([], identity)

    def update_identity(self, **fields: Any) -> None:
        """Change the facts about the writer."""
        self._header.update_identity(**fields)

    def beat(self, now_ns: int) -> None:
        """Note that the writer lives, for hosts that cannot see its lock."""
        self._header.open_slots[Slot.HEARTBEAT] = now_ns

    def close(self, *, unlink: bool) -> None:
        """Drop the lock, and remove the file if wanted."""
        self._file.close(unlink=unlink)


def own_mapping(path: Path) -> mmap.mmap | None:
    """Return the mapping of a file that this process itself writes, else None."""
    try:
        status = path.stat()
    except OSError:
        return None

    return _own_mappings.get((os.getpid(), status.st_dev, status.st_ino))


def is_locked(descriptor: int) -> bool:
    """Whether another process holds the lock of a file."""
    return _lock(descriptor)[0] != fcntl.F_UNLCK


def lock_holder(descriptor: int) -> int | None:
    """Return the process that holds the lock of a file, by its number in the pid namespace of this one.

    None if there is none, or if it is not seen from here.
    """
    kind, *_, pid = _lock(descriptor)
    return pid if kind != fcntl.F_UNLCK and pid > 0 else None


def _lock(descriptor: int) -> tuple[int, ...]:
    # Query the lock, do not take it: two readers must not mistake each other for the owner.
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, request))


def _pack_to_fit(fields: dict[str, Any], limit: int) -> bytes:
    """Pack a map; leave out its longest value while it is too long."""
    kept = dict(fields)
    while len(packed := pack_map(kept)) > limit:
        del kept[max(kept, key=lambda key: len(pack_map({key: kept[key]})))]

    return packed


def open_phase(slots: Sequence[int] | memoryview[int], has_steps: bool) -> tuple[int, int]:
    """Return the innermost open phase, as in `schema.LINE_PHASES`, and the time at which it, or its step, was opened.

    Args:
        has_steps: whether a step has ended in this process.
    """
    began = 0 if slots[_EXIT_START] else slots[_STEP_START]  # an exit is in no step, though it may close one
    opened = list(slots[:_PHASES])  # read once, as another process may write them
    latest = max(opened)
    if latest > 0:
        return opened.index(latest), latest

    return LINE_OTHER if began else LINE_OUTSIDE if has_steps else LINE_STARTUP, began
