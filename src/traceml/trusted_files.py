"""Files and folders that may be trusted: of this user alone, or regular ones inside a folder.

What another user may have planted under a known name is refused, and so is what a run's folder from elsewhere may hold
in place of a file: a pipe, which would stop its reader for good, or a link that leads out of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_native_id

__all__ = [
    "GuardedDescriptor",
    "cache_home",
    "check_trusted_folder",
    "create_trusted",
    "fill_standard_descriptors",
    "is_file_inside",
    "make_trusted_folder",
    "open_regular",
    "open_trusted",
    "opened_trusted",
    "read_regular",
    "replace_file",
    "replace_link",
]

_OTHERS_WRITE = 0o022
_OTHERS_ANY = 0o077
_MAX_BYTES = 256 << 20  # the report of a job of 65,536 ranks has less


class GuardedDescriptor:
    """An open descriptor of ours in a process whose script may close it, as by `os.closerange`.

    Its number may be that of a file of the script then, which is neither written to nor closed.

    Attributes:
        file: device and inode of its file.
    """

    __slots__ = ("file", "number")

    def __init__(self, number: int) -> None:
        self.number, self.file = number, _file_of(number)

    def check(self) -> None:
        """Check that it is still ours.

        Raises:
            OSError: the script has closed it.
        """
        if _file_of(self.number) != self.file:
            raise OSError(errno.EBADF, "the script has closed this descriptor")

    def close(self) -> None:
        """Close it if it is still ours."""
        with suppress(OSError):
            self.check()
            os.close(self.number)


def _file_of(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def fill_standard_descriptors() -> None:
    """Open the standard descriptors that are closed: a file with such a number receives what is printed there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)

    os.close(descriptor)


def cache_home() -> Path:
    """Return this user's folder of caches, which may not exist: XDG_CACHE_HOME, or ~/.cache."""
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named or os.path.expanduser("~/.cache"))  # noqa: PTH111 - raises nothing where there is no home


def open_trusted(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file of this user and return its descriptor; it never waits.

    A name alone proves nothing, so the opened file is checked: a pipe would stop its reader for good, and a file of
    another user may say anything.

    Raises:
        PermissionError: it is a pipe, a device or a folder, or belongs to another user.
        OSError: it cannot be opened; a symbolic link is not followed.
    """
    descriptor = open_regular(path, flags | os.O_NOFOLLOW)
    try:
        _check_owner(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise

    return descriptor


def read_regular(path: Path, most_bytes: int = _MAX_BYTES) -> bytes:
    """Return the content of a regular file of any user, also through links; it never waits.

    Raises:
        PermissionError: it is a pipe, a device or a folder.
        OSError: it cannot be read, or is larger than `most_bytes`: a file with holes takes no room on a disk.
    """
    with open(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))

        return file.read(most_bytes)


def replace_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that readers see the old content or all of the new one.

    The draft next to it is always a new file: a link that was planted under its name is not written through.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _draft_of(path) as draft, open(os.open(draft, flags, mode), "wb") as file:
        file.write(data)


def replace_link(path: Path, target: str) -> None:
    """Make a symbolic link, in place of the one that is there, so that readers see one of the two.

    Raises:
        OSError: it cannot be made; the old one stays.
    """
    with _draft_of(path) as draft:
        draft.symlink_to(target)


@contextmanager
def _draft_of(path: Path) -> Iterator[Path]:
    """Yield the path of a draft, which replaces the other one at the end of a block that did not fail."""
    draft = path.with_name(f".{path.name}-{os.getpid()}-{get_native_id()}")
    try:
        draft.unlink(missing_ok=True)
        yield draft
        draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def is_file_inside(path: Path, folder: Path) -> bool:
    """Return whether a path is a regular file below a folder, also after its links are followed."""
    try:
        return path.is_file() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # ValueError: a null byte
        return False


@contextmanager
def opened_trusted(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file as `open_trusted` does, for a `with` block, within which the script may close the descriptor."""
    own = GuardedDescriptor(open_trusted(path, flags))
    try:
        yield own.number
    finally:
        own.close()


def create_trusted(path: Path) -> int:
    """Create a file that only this user may read; return its descriptor.

    Raises:
        FileExistsError: there is one of that name.
        PermissionError: the filesystem gives it to another user, as NFS does for root: nobody would trust it later.
        OSError: it cannot be created.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _check_owner(os.fstat(descriptor), path)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise

    return descriptor


def make_trusted_folder(folder: Path, *, private: bool = False) -> None:
    """Create a folder if it is missing, and check it as `check_trusted_folder` does.

    Raises:
        OSError: it cannot be created or written into, as on a read-only filesystem, or is not this user's alone.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_trusted_folder(folder, private=private)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "it cannot be written", str(folder))


def check_trusted_folder(folder: Path, *, private: bool = False) -> None:
    """Check that a folder is this user's own, no link, and that nobody else may write into it.

    Args:
        private: whether nobody else may read it either.

    Raises:
        FileNotFoundError: there is none.
        PermissionError: it is not; the text says why.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(errno.EPERM, "it is not a folder", str(folder))

    _check_owner(status, folder)
    if status.st_mode & (_OTHERS_ANY if private else _OTHERS_WRITE):
        mode = stat.S_IMODE(status.st_mode)
        raise PermissionError(errno.EPERM, f"others may use it, its mode is {mode:04o}, not 0700", str(folder))


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file of any user, also through links, and return its descriptor; it never waits.

    Raises:
        PermissionError: it is a pipe, a device or a folder.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor

    os.close(descriptor)
    raise PermissionError(errno.EPERM, "it is not a regular file", str(path))


def _check_owner(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"it belongs to another user (uid {status.st_uid})", str(path))
