"""Recorder of what a process does to its files, through SQLite and itself, and the files after any part of it.

SQLite's file system is replaced by one that notes each write, truncation and removal. A killed process leaves what it
had done so far, in this order: the pages of a file outlive it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["FileEvent", "FileRecorder", "ReplayedFiles"]

_OK = 0
_METHODS = 19  # version, then the functions of sqlite3_io_methods: xClose, xRead, xWrite, xTruncate, ...
_WRITE, _TRUNCATE = 3, 4
# Names are pointers here: SQLite keeps them.
_OPEN = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_DELETE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int)
_WRITES = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_TRUNCATES = CFUNCTYPE(c_int, c_void_p, c_int64)
_active: list[FileRecorder] = []
_is_hooked = False


class _FileSystem(ctypes.Structure):
    """The beginning of sqlite3_vfs."""

    _fields_: ClassVar[Any] = [
        ("version", c_int),
        ("file_bytes", c_int),
        ("longest_path", c_int),
        ("next", c_void_p),
        ("name", c_char_p),
        ("data", c_void_p),
        ("open", c_void_p),
        ("delete", c_void_p),
    ]


@dataclass(frozen=True, slots=True)
class FileEvent:
    """Something that was done to a file: `write`, `truncate`, `create`, `remove`, or `rename` (of `name` to `data`).

    A `mark` is a note of the test between them.
    """

    kind: str
    name: str = ""
    offset: int = 0
    data: Any = b""


@dataclass
class ReplayedFiles:
    """Files after some events.

    Attributes:
        files: their bytes by name.
    """

    files: dict[str, bytearray] = field(default_factory=dict)

    def apply(self, event: FileEvent, most_bytes: int | None = None) -> None:
        """Do what an event did, of a write only so many bytes."""
        if event.kind == "write":
            data = event.data[:most_bytes]
            file = self.files.setdefault(event.name, bytearray())
            file.extend(bytes(max(event.offset - len(file), 0)))
            file[event.offset : event.offset + len(data)] = data
        elif event.kind == "truncate":
            del self.files[event.name][event.offset :]
        elif event.kind == "create":
            self.files.setdefault(event.name, bytearray())
        elif event.kind == "remove":
            self.files.pop(event.name, None)
        elif event.kind == "rename":
            self.files[event.data] = self.files.pop(event.name)

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


class FileRecorder:
    """Records what is done to the files of a folder.

    Args:
        folder: the folder.

    Attributes:
        events: what was done.

    Raises:
        OSError: this Python has SQLite in it: there is no library to ask.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[FileEvent] = []
        self._system = _file_system()
        self._names: dict[int, str] = {}
        self._tables: dict[int, Any] = {}
        self._kept: list[Any] = []  # functions that SQLite calls

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record; all connections are opened and closed meanwhile."""
        system = self._system
        before = system.open, system.delete
        opened, removed = _OPEN(self._opening(_OPEN(before[0]))), _DELETE(self._removing(_DELETE(before[1])))
        system.open, system.delete = _address(opened), _address(removed)
        _hook_python()
        _active.append(self)
        try:
            yield
        finally:
            _active.remove(self)
            system.open, system.delete = before

    def mark(self, data: Any) -> None:
        """Note something between the events."""
        self.events.append(FileEvent("mark", data=data))

    def note_python(self, event: str, args: tuple[Any, ...]) -> None:
        """Record a renaming or a removal by Python itself."""
        name = self._name_of(args[0])
        if name is None:
            return

        if event == "os.rename":
            self.events.append(FileEvent("rename", name, data=Path(os.fsdecode(args[1])).name))
        elif event == "os.remove" and Path(os.fsdecode(args[0])).exists():
            self.events.append(FileEvent("remove", name))

    def _name_of(self, path: Any) -> str | None:
        if not isinstance(path, str | bytes | os.PathLike):
            return None

        found = Path(os.fsdecode(path))
        return found.name if found.parent == self.folder else None

    def _opening(self, original: Callable[..., int]) -> Callable[..., int]:
        def opening(system: int, path: int | None, file: int, flags: int, answer: int) -> int:
            status = original(system, path, file, flags, answer)
            name = self._name_of(ctypes.string_at(path)) if path else None
            if status == _OK and name is not None:
                self._names[file] = name
                self.events.append(FileEvent("create", name))
                methods = ctypes.cast(file, POINTER(c_void_p))
                methods[0] = self._methods_for(int(methods[0] or 0))

            return status

        return opening

    def _removing(self, original: Callable[..., int]) -> Callable[..., int]:
        def removing(system: int, path: int, sync: int) -> int:
            status = original(system, path, sync)
            name = self._name_of(ctypes.string_at(path))
            if status == _OK and name is not None:
                self.events.append(FileEvent("remove", name))

            return status

        return removing

    def _methods_for(self, methods: int) -> int:
        """Return the address of a copy of a table of functions whose writes are noted."""
        if methods in self._tables:
            return ctypes.addressof(self._tables[methods])

        table = (c_void_p * _METHODS).from_buffer_copy((c_void_p * _METHODS).from_address(methods))
        writes, truncates = _WRITES(table[_WRITE]), _TRUNCATES(table[_TRUNCATE])

        def writing(file: int, data: int, size: int, offset: int) -> int:
            self.events.append(FileEvent("write", self._names[file], offset, ctypes.string_at(data, size)))
            return int(writes(file, data, size, offset))

        def truncating(file: int, size: int) -> int:
            self.events.append(FileEvent("truncate", self._names[file], size))
            return int(truncates(file, size))

        self._kept += [_WRITES(writing), _TRUNCATES(truncating)]
        table[_WRITE], table[_TRUNCATE] = map(_address, self._kept[-2:])
        self._tables[methods] = table
        return ctypes.addressof(table)


def _address(function: Any) -> int:
    return int(ctypes.cast(function, c_void_p).value or 0)


def _file_system() -> Any:
    """Return the file system of the SQLite that this Python uses."""
    import _sqlite3

    paths = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libsqlite3" in line]
    library = ctypes.CDLL(paths[0] if paths else _sqlite3.__file__)
    try:
        find = library.sqlite3_vfs_find
    except AttributeError as error:
        raise OSError(f"{_sqlite3.__file__} has SQLite in it") from error

    find.restype = POINTER(_FileSystem)
    return find(None).contents


def _hook_python() -> None:
    global _is_hooked
    if not _is_hooked:
        _is_hooked = True
        sys.addaudithook(_note)


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _active and event in ("os.rename", "os.remove"):
        for recorder in _active:
            recorder.note_python(event, args)
