"""The aggregator of a runs folder: each folder has at most one per host and user, and a file with its address.

The file is `.open/aggregator-HOST-UID` in the runs folder. Its lock is held by the aggregator, or by the process that
starts one, as long as it lives. So the address of a dead aggregator is never believed, whatever became of its pid and
port. The lock of a killed process is free at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple, Self

from traceml.clock import boot_id
from traceml.run_folder import OPEN_FOLDER
from traceml.trusted_files import create_trusted, open_trusted

__all__ = [
    "AggregatorAddress",
    "FolderLock",
    "address_of",
    "create_runs_dir",
    "folder_id",
    "reachable",
    "serving_hosts",
]

_LONGEST_BYTES = 65536

_log = logging.getLogger("traceml")


class AggregatorAddress(NamedTuple):
    """Address of the aggregator of a runs folder."""

    host: str
    port: int
    token_file: str = ""  # file with its token; "" before it has written one
    tls: bool = False  # whether it encrypts connections

    @property
    def token(self) -> str | None:
        """The token; None if the file cannot be read."""
        from traceml.transport import auth

        return auth.read_token(Path(self.token_file)) if self.token_file else None


def reachable(host: str) -> str:
    """Return the address by which programs of this host reach a listener."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared only


def create_runs_dir(runs_dir: Path) -> None:
    """Create a runs folder, with a `.gitignore` of all in it; one that exists is left as it is.

    Raises:
        OSError: it cannot be created, or is not a folder.
    """
    try:
        runs_dir.mkdir(parents=True)
    except FileExistsError:
        if not runs_dir.is_dir():
            raise

        return  # the user's own may hold more than runs

    with contextlib.suppress(OSError):
        (runs_dir / ".gitignore").write_text("*\n")


class FolderLock:
    """The right to be a folder's aggregator, held until the last process that has the descriptor ends or closes it.

    Args:
        descriptor: a locked descriptor of the folder's file, perhaps inherited.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def acquire(cls, runs_dir: Path) -> Self | None:
        """Take the lock; None while another process has it.

        Raises:
            OSError: no file can be created or locked.
        """
        with contextlib.suppress(OSError):  # then the file is in the runtime folder
            create_runs_dir(runs_dir)
            (runs_dir / OPEN_FOLDER).mkdir(exist_ok=True)

        descriptor, locked = _lock(runs_dir, create=True)
        if locked:
            return cls(descriptor)

        os.close(descriptor)
        return None

    def fileno(self) -> int:
        """Return the descriptor, for a child that is to hold the lock."""
        return self._descriptor

    def publish(self, address: AggregatorAddress | None) -> None:
        """Write the address of the folder's aggregator; with None remove it."""
        import json  # here and below: `traceml run`, whose script waits, only makes the folder

        text = json.dumps({**address._asdict(), "pid": os.getpid()}) if address is not None else ""
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)
        except OSError as error:  # a full disk, for example: only those with the address reach the aggregator
            _log.warning("the aggregator's address cannot be written into the runs folder: %s", error)

    def close(self) -> None:
        """Close this process's descriptor. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)

        self._descriptor = -1


def address_of(runs_dir: Path, port: int) -> AggregatorAddress | None:
    """Return the address of this user's aggregator that serves a runs folder on this host; None without one.

    Args:
        port: the usual port, where one may listen that was started while another one had the folder.
    """
    if (published := _published_address(runs_dir)) is not None:
        return published

    from traceml.transport import auth

    usual = auth.discover(port)
    if usual is not None and usual.runs_dir and folder_id(Path(usual.runs_dir)) == (folder_id(runs_dir) or None):
        return AggregatorAddress(usual.host, usual.port)

    return None


def _published_address(runs_dir: Path) -> AggregatorAddress | None:
    """Return the address in the folder's file, if the lock shows that its writer lives."""
    import json

    try:
        descriptor, free = _lock(runs_dir, create=False)
    except OSError:
        return None

    try:
        if free:
            return None

        facts = json.loads(os.pread(descriptor, _LONGEST_BYTES, 0))
        return AggregatorAddress(str(facts["host"]), int(facts["port"]), str(facts["token_file"]), facts["tls"] is True)
    except (ValueError, KeyError, TypeError):  # its address is not written yet
        return None
    finally:
        os.close(descriptor)


def serving_hosts(runs_dir: Path) -> list[str]:
    """Return the other hosts that share a runs folder and on which an aggregator of this user serves it."""
    own, hosts = _name_of(socket.gethostname()), []
    for path in sorted((runs_dir / OPEN_FOLDER).glob(_name_of("*"))):
        if path.name == own:
            continue

        with contextlib.suppress(OSError):
            descriptor, free = _locked(path, create=False)
            os.close(descriptor)
            if not free:
                hosts.append(path.name.removeprefix("aggregator-").rpartition("-")[0])

    return hosts


def folder_id(folder: Path) -> list[Any]:
    """Return the identity of a folder, by which another process recognizes the same one; empty without a folder."""
    try:
        status = folder.stat()
    except OSError:
        return []

    return [boot_id(), status.st_dev, status.st_ino]


def _lock(runs_dir: Path, *, create: bool) -> tuple[int, bool]:
    """Open the folder's file and try to lock it; return its descriptor, and whether the lock is ours now.

    Raises:
        OSError: there is no such file, or none can be created or locked.
    """
    try:
        return _locked(runs_dir / OPEN_FOLDER / _name_of(socket.gethostname()), create=create)
    except OSError:  # a folder of another user, or a filesystem without locks
        import hashlib  # not above: OpenSSL's take 3 ms to load

        from traceml.transport import auth

        known = hashlib.sha256(os.fsencode(runs_dir.resolve())).hexdigest()[:16]
        return _locked(auth.runtime_folder() / f"folder-{known}", create=create)


def _name_of(host: str) -> str:
    return f"aggregator-{host}-{os.getuid()}"


def _locked(path: Path, *, create: bool) -> tuple[int, bool]:
    descriptor = _opened(path, create=create)
    try:
        # A reader takes the lock for a moment too, but shared: it must not keep another reader from an answer.
        fcntl.flock(descriptor, (fcntl.LOCK_EX if create else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return descriptor, False
    except OSError:
        os.close(descriptor)
        raise

    return descriptor, True


def _opened(path: Path, *, create: bool) -> int:
    """Open the file; only this user may read it, else anyone could hold its lock."""
    while True:
        try:
            return open_trusted(path, os.O_RDWR)
        except FileNotFoundError:
            if not create:
                raise

        with contextlib.suppress(FileExistsError):  # another process has just created it
            return create_trusted(path)
