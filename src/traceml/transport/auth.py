"""Authentication of connections: the token, its proof, and the file where one user's processes find it.

The token is never sent. Each side sends a nonce and answers the other's with an HMAC, so that a recorded answer cannot
be used again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from traceml.clock import boot_id, process_start_ticks
from traceml.fail_open import warn_once
from traceml.trusted_files import cache_home, check_trusted_folder, make_trusted_folder, open_trusted, replace_file

__all__ = [
    "AGGREGATOR", "CLIENT_NONCE_TAG", "JOINED", "METRICS", "PAGE", "PublishedServer", "client_nonce", "discover",
    "joined_runs", "mac", "new_token", "publish", "publish_joined", "published_by", "read_token", "runtime_folder",
    "same_mac", "server_nonce", "withdraw",
]  # fmt: skip

# A client never answers a challenge that begins like its own nonces: else a false aggregator could forward the nonce of
# one connection to a second connection of the same client, and use its answer as its own.
CLIENT_NONCE_TAG = b"traceml-client-1"

# Servers with a token of their own: for ranks, for browsers, and for Prometheus.
AGGREGATOR, PAGE, METRICS = "aggregator", "page", "metrics"
JOINED = "joined"  # the aggregator of another node, to which ranks of this host belong

# The file of a killed aggregator stays this long: an aggregator restarted on its port gets the same token.
_KEPT_S = 24 * 3600.0

_log = logging.getLogger("traceml")


def new_token() -> str:
    """Return a fresh token: 256 random bits as text."""
    import secrets  # not above: with OpenSSL's hashes it takes 7 ms, before `traceml run` starts the script

    return secrets.token_urlsafe(32)


def server_nonce() -> bytes:
    """Return 32 random bytes for a challenge."""
    return os.urandom(32)


def client_nonce() -> bytes:
    """Return the tag of clients' nonces and 24 random bytes."""
    return CLIENT_NONCE_TAG + os.urandom(24)


def mac(token: str, nonce: bytes, role: str, run: str, rank: int, binding: bytes = b"") -> bytes:
    """Return the proof of `token`: HMAC-SHA256 over the other side's nonce, role, run and rank.

    The texts are UTF-8, the rank is decimal ASCII, without separators. With TLS the fingerprint of the server's
    certificate follows (`binding`): a relay has another one.
    """
    import hashlib
    import hmac

    return hmac.digest(token.encode(), nonce + f"{role}{run}{rank}".encode() + binding, hashlib.sha256)


def same_mac(left: bytes, right: bytes) -> bool:
    """Compare two proofs in constant time."""
    import hmac

    return hmac.compare_digest(left, right)


class PublishedServer(NamedTuple):
    """Address and token of this user's aggregator on this host, as in its file."""

    host: str
    port: int
    token: str
    pid: int
    start_ticks: int  # that process's start time, because pids are reused
    boot: str
    runs_dir: str
    run_id: str = ""  # of JOINED: the run, the name of its node, and whether its aggregator encrypts connections
    node: str = ""
    tls: bool = False

    @property
    def alive(self) -> bool:
        """Whether that process still runs."""
        return self.boot == boot_id() and process_start_ticks(self.pid) == self.start_ticks


def runtime_folder() -> Path:
    """Return this user's 0700 folder for sockets and tokens; create it if necessary.

    The names of the usual places are known to everyone, so another user may have taken one: then the next is used.

    Raises:
        PermissionError: no place can be trusted; the text has each with its reason.
    """
    refusals = []
    for folder in _candidates():
        try:
            make_trusted_folder(folder, private=True)
        except OSError as error:
            refusals.append(_refuse(folder, error))
            continue

        return folder

    raise PermissionError(
        f"{'; '.join(refusals)}. Correct one of these folders, or set XDG_RUNTIME_DIR to a folder of this user."
    )


def publish(host: str, port: int, token: str, *, runs_dir: str = "", kind: str = AGGREGATOR) -> Path:
    """Write the 0600 file by which this user's ranks and commands find the aggregator of this process, or its page."""
    pid = os.getpid()
    entry = PublishedServer(host, port, token, pid, process_start_ticks(pid) or 0, boot_id(), runs_dir)
    return _write(entry, _name(port, kind))


def publish_joined(host: str, port: int, token: str, *, run_dir: Path, node: str, tls: bool) -> Path:
    """Write the 0600 file by which this user's commands find the run of another node that our ranks belong to.

    Args:
        run_dir: folder of the run, on that node.
    """
    pid = os.getpid()
    started, runs_dir = process_start_ticks(pid) or 0, str(run_dir.parent)
    entry = PublishedServer(host, port, token, pid, started, boot_id(), runs_dir, run_dir.name, node, tls)
    return _write(entry, _name(pid, JOINED))  # several commands may have joined runs of one address


def discover(port: int, *, include_dead: bool = False, kind: str = AGGREGATOR) -> PublishedServer | None:
    """Return the address that this user's aggregator on `port` has published; None without one.

    Args:
        include_dead: also return the file of an aggregator that has ended.
        kind: `AGGREGATOR`, `PAGE` or `METRICS`.
    """
    for folder in _candidates():
        entry = _read(folder / _name(port, kind))
        if entry is not None and (include_dead or entry.alive):
            return entry

    return None


def find_page(runs_dir: str) -> PublishedServer | None:
    """Return a web page of this user that shows a runs folder; None without one."""
    return next((entry for entry in _alive(PAGE) if entry.runs_dir == runs_dir), None)


def published_by(pid: int) -> PublishedServer | None:
    """Return the address that this user's aggregator with that process id has published; None without one."""
    return next((entry for entry in _alive(AGGREGATOR) if entry.pid == pid), None)


def joined_runs() -> list[PublishedServer]:
    """Return the runs of other nodes that ranks of this user on this host belong to, the newest first."""
    return sorted(_alive(JOINED), key=lambda entry: entry.start_ticks, reverse=True)


def read_token(path: Path) -> str | None:
    """Return the token in a file that `publish` has written; None without one."""
    entry = _read(path)
    return entry.token if entry is not None else None


def withdraw(port: int) -> None:
    """Remove the file of the aggregator on `port`, if it is this process's."""
    for folder in _candidates():
        entry = _read(folder / _name(port, AGGREGATOR))
        if entry is not None and entry.pid == os.getpid():
            with contextlib.suppress(OSError):
                (folder / _name(port, AGGREGATOR)).unlink()


def _alive(kind: str) -> Iterator[PublishedServer]:
    """Yield the servers of a kind whose processes still run."""
    for folder in _candidates():
        for path in sorted(folder.glob(f"{kind}-*.json")):
            entry = _read(path)
            if entry is not None and entry.alive:
                yield entry


def _write(entry: PublishedServer, name: str) -> Path:
    path = runtime_folder() / name
    replace_file(path, json.dumps(entry._asdict()).encode(), mode=0o600)
    _sweep(path.parent)
    return path


def _sweep(folder: Path) -> None:
    """Remove old files of killed aggregators, whose ranks have given up by now."""
    for path in (path for kind in (AGGREGATOR, PAGE, METRICS, JOINED) for path in folder.glob(f"*{kind}-*.json*")):
        with contextlib.suppress(OSError):  # another process removes it, or it is not our file
            if time.time() - path.stat().st_mtime < _KEPT_S:
                continue

            entry = _read(path)
            if entry is None or not entry.alive:
                path.unlink()


def _name(number: int, kind: str) -> str:
    return f"{kind}-{number}.json"


def _candidates() -> list[Path]:
    """Return the folders to read, in the order of writing.

    A shell under ssh or cron may lack XDG_RUNTIME_DIR where another one has it, so all folders are read.
    """
    uid = os.getuid()
    parents = (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}")
    folders = [Path(parent, "traceml") for parent in parents if parent and _is_own(Path(parent))]
    # These names are predictable, so owner and mode are checked before anything there is used. A container with a
    # read-only root has a /dev/shm that can be written, but often no /tmp and no home.
    folders += [Path(f"/tmp/traceml-{uid}"), Path(f"/dev/shm/traceml-{uid}")]  # noqa: S108
    cache = cache_home()
    if cache.is_absolute():
        folders.append(cache / "traceml" / os.uname().nodename)  # several hosts may share a home

    return list(dict.fromkeys(folders))


def _is_own(folder: Path) -> bool:
    try:
        return folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK)
    except OSError:
        return False


def _read(path: Path) -> PublishedServer | None:
    try:
        check_trusted_folder(path.parent, private=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        _refuse(path.parent, error)
        return None

    try:
        with open(open_trusted(path)) as file:
            facts = json.load(file)
            # Another version of traceml may have written more.
            return PublishedServer(**{name: facts[name] for name in facts.keys() & set(PublishedServer._fields)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("ignoring %s: %s", path, error)
        return None


def _refuse(folder: Path, error: OSError) -> str:
    """Return why a folder is not used, and warn the user once."""
    why = f"{folder} cannot keep an aggregator's token: {error.strerror or error}"
    warn_once(why, "%s. The next folder is used", why)
    return why
