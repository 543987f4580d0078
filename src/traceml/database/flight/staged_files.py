"""Staged files: what a rank has begun to log, next to its flight file in memory until it is copied.

A rank that is killed leaves a row, with how to finish it, and its contents: bytes, pixels that are not encoded yet,
or, for a file of the user, its path only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from traceml.database.file_contents import Content, OpenFile, Pixels
from traceml.database.flight.row_rings import pack_map

__all__ = ["STAGED", "StagedFile"]

STAGED = "staged"
"""Key of a row whose file is not copied yet."""
_CONTENTS_SUFFIX = ".staged"


class StagedFile(NamedTuple):
    """A file that is to be copied: its row, and its contents beside it.

    Attributes:
        path: path of the row, in the spool next to the flight file.
        how: the row's value of `STAGED`: what is needed to finish it.
    """

    path: Path
    how: Mapping[str, Any]

    @classmethod
    def write(
        cls, path: Path, row: Mapping[str, Any], content: Content, *, limit_bytes: int, suffix: str
    ) -> StagedFile | None:
        """Keep what is needed to finish a file if this process is killed; return None if the contents come later.

        Args:
            row: the file's row in `logged`, without the facts of the copy.

        Raises:
            OSError: there is no room.
        """
        how: dict[str, Any] = {"limit_bytes": limit_bytes, "suffix": suffix}
        data = b""
        if isinstance(content, OpenFile):
            how |= {"path": os.fsencode(content.path), "identity": content.identity}
        elif isinstance(content, Pixels):
            data, *pixels = content
            how["pixels"] = pixels
        elif isinstance(content, bytes):
            data = content
        else:
            return None

        staged = cls(path, how)
        try:
            if not isinstance(content, OpenFile):
                _check_room(path.parent, len(data))
                staged.contents.write_bytes(data)

            path.write_bytes(pack_map({**row, STAGED: how}))
        except BaseException:
            staged.remove()
            raise

        return staged

    @property
    def contents(self) -> Path:
        """Path of the contents; there is none of a user's file, except in an archive."""
        return self.path.with_suffix(_CONTENTS_SUFFIX)

    def find(self) -> Path | None:
        """Return the path of what it contains; None if a user's file has changed since."""
        if self.contents.exists():
            return self.contents

        return Path(self._users_file.path) if self._users_file is not None and self._users_file.is_unchanged else None

    @property
    def users_path(self) -> str:
        """Path of a user's file; empty for other contents."""
        return self._users_file.path if self._users_file is not None else ""

    @property
    def users_bytes(self) -> int:
        """Size of a user's file when it was logged."""
        return self._users_file.size if self._users_file is not None else 0

    @property
    def _users_file(self) -> OpenFile | None:
        if "path" not in self.how:
            return None

        return OpenFile(None, os.fsdecode(self.how["path"]), tuple(self.how["identity"]))

    def read(self) -> Content:
        """Return the contents; those of a user's file are read when they are copied.

        Raises:
            OSError: they cannot be read.
        """
        if self._users_file is not None and not self.contents.exists():
            return self._users_file

        data = self.contents.read_bytes()
        if "pixels" in self.how:
            dtype, shape, channels_first = self.how["pixels"]
            return Pixels(data, dtype, tuple(shape), channels_first)

        return data

    def remove(self) -> None:
        """Remove both: the file is copied or refused."""
        for path in (self.path, self.contents):
            with suppress(OSError):
                path.unlink()


def _check_room(folder: Path, size_bytes: int) -> None:
    """Check that half of the filesystem stays free: loader workers share memory in it.

    Raises:
        OSError: there is no room.
    """
    status = os.statvfs(folder)
    if status.f_bavail * status.f_frsize - size_bytes < status.f_blocks * status.f_frsize // 2:
        raise OSError(f"more than half of {folder} is used")
