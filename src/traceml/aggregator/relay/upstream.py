"""Sender of a host's runs to another aggregator, in a thread of the host's aggregator."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from traceml.aggregator.relay.run_relay import RunRelay
from traceml.database.store.store import merge_wal
from traceml.errors import AggregatorRefusedError, StoreError, TraceMLError, UsageError
from traceml.fail_open import fail_open
from traceml.run_folder import RELAY_NAME, STORE_NAME
from traceml.transport.client import Connection, connect
from traceml.transport.hello import Hello
from traceml.trusted_files import replace_file

__all__ = ["Upstream"]

_MARK_TURNS = 30
_EVERY_S = 1.0
_CONNECT_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _REFUSED_PAUSE_S = 1.0, 10.0, 30.0
_LAST_S = 3.0

_log = logging.getLogger("traceml")


class Upstream:
    """Sends the runs of an aggregator to another one.

    Args:
        address: that of the other one, as HOST:PORT.
        token: the secret of both; None: the one that an aggregator of this user on this host has published.

    Raises:
        UsageError: the address is invalid.
    """

    def __init__(self, address: str, runs_dir: Path, token: str | None, *, tls: bool = False) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise UsageError(f"upstream takes HOST:PORT of another aggregator, not {address!r}")

        self.address, self._host, self._port = address, host.strip("[]"), int(port)
        self._token, self._tls = token, tls
        self._host_id = hashlib.sha256(os.fsencode(runs_dir.absolute())).hexdigest()[:12]
        self._relays: dict[Path, RunRelay] = {}
        self._retries: dict[Path, _Retry] = {}
        self._marked: dict[Path, int] = {}
        self._turns = 0
        for path in _left_over(runs_dir, self.address):
            self._add(path)

    def __repr__(self) -> str:
        return f"<upstream {self.address}, {len(self._relays)} runs>"

    def run(self, open_runs: Callable[[], Collection[Path]], ended: Callable[[float], bool]) -> None:
        """Send until the end, and then what is left.

        Args:
            open_runs: returns the folders of the runs that are not over.
            ended: waits for some seconds, and returns whether this is the end.
        """
        while not ended(_EVERY_S):
            self.poll(open_runs())

        self.close()

    def poll(self, open_runs: Iterable[Path]) -> None:
        """Send what is new of all runs. Call it once a second."""
        for path in open_runs:
            if path not in self._relays:
                self._add(path)

        for path, relay in list(self._relays.items()):
            if not (path / STORE_NAME).is_file():
                self._forget(path)
            elif self._retries[path].is_due and self._tried(path, relay.poll) and relay.is_done:
                self._done(path, relay)
                del self._relays[path]

        self._turns += 1
        if self._turns % _MARK_TURNS == 0:
            self._mark_safe()

    def close(self) -> None:
        """Send what is left for some seconds, and log what could not be sent."""
        deadline_s = time.monotonic() + _LAST_S
        for path, relay in self._relays.items():
            left_s = deadline_s - time.monotonic()
            if left_s > 0 and self._retries[path].is_due:
                self._tried(path, partial(relay.finish, left_s))

            if relay.is_done:
                self._done(path, relay)
                continue

            is_stored = relay.is_stored
            relay.disconnect()
            _mark(path, self.address, sent=False, safe=relay.safe)
            if not is_stored:
                _log.warning(
                    "run %s: %s has not confirmed that its last rows are stored there. `traceml serve --upstream %s` "
                    "with the same runs folder sends what is missing", path.name, self.address, self.address,
                )  # fmt: skip

        self._relays.clear()

    def _add(self, path: Path) -> None:
        safe = _safe_of(path, self.address)
        self._relays[path], self._retries[path] = RunRelay(path, self._host_id, self._dial, safe), _Retry()
        _mark(path, self.address, sent=False, safe=safe)

    def _forget(self, path: Path) -> None:
        """Forget a run that was removed, as one without ranks is."""
        self._relays.pop(path).disconnect()
        with contextlib.suppress(OSError):
            (path / RELAY_NAME).unlink()
            path.rmdir()

    def _mark_safe(self) -> None:
        """Store how far the runs are sent, so that the next aggregator of this folder begins there."""
        for path, relay in self._relays.items():
            if relay.safe != self._marked.get(path):
                self._marked[path] = relay.safe
                _mark(path, self.address, sent=False, safe=relay.safe)

    def _done(self, path: Path, relay: RunRelay) -> None:
        relay.disconnect()
        _mark(path, self.address, sent=True, safe=relay.safe)
        merge_wal(path / STORE_NAME)  # which could not be done while it was read here

    def _tried(self, path: Path, send: Callable[[], object]) -> bool:
        """Send; return False after an error, which is logged once as long as it lasts."""
        retry = self._retries[path]
        expected = (OSError, StoreError, TraceMLError)
        try:
            with fail_open(_log, "aggregator", f"an error while run {path.name} was sent", reraise=expected) as guarded:
                send()
        except AggregatorRefusedError as error:
            retry.failed(f"run {path.name} cannot be sent: {error}", _REFUSED_PAUSE_S)
        except expected as error:
            retry.failed(f"run {path.name} waits here until {self.address} answers: {error}")
        else:
            if guarded.error is None:
                retry.succeeded(f"run {path.name} is sent to {self.address}")
                return True

            retry.failed(f"run {path.name} cannot be sent: {guarded.error!r}", _REFUSED_PAUSE_S)

        return False

    def _dial(self, hello: Hello) -> Connection:
        return connect(self._host, self._port, hello, self._token, timeout_s=_CONNECT_S, tries=1, tls=self._tls)


class _Retry:
    """Time of the next try of a run, and what was logged about the last one."""

    def __init__(self) -> None:
        self._due_s, self._pause_s, self._reported = 0.0, _FIRST_PAUSE_S, ""

    @property
    def is_due(self) -> bool:
        """Whether it is time to try."""
        return time.monotonic() >= self._due_s

    def failed(self, text: str, pause_s: float | None = None) -> None:
        """Record a failure; the pauses between tries double."""
        self._due_s = time.monotonic() + (self._pause_s if pause_s is None else pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        _log.log(logging.DEBUG if self._reported == "failed" else logging.WARNING, "%s", text)
        self._reported = "failed"

    def succeeded(self, text: str) -> None:
        """Record a success."""
        self._pause_s = _FIRST_PAUSE_S
        if self._reported != "sent":
            _log.info("%s", text)

        self._reported = "sent"


def _left_over(runs_dir: Path, address: str) -> list[Path]:
    """Return the runs whose end an earlier aggregator of this folder could not send there."""
    return [mark.parent for mark in sorted(runs_dir.absolute().glob(f"*/{RELAY_NAME}")) if _is_left(mark, address)]


def _is_left(mark: Path, address: str) -> bool:
    content = _read_mark(mark, address)
    return "sent" in content and not content["sent"] and (mark.parent / STORE_NAME).is_file()


def _safe_of(path: Path, address: str) -> int:
    """Return the frame up to which an earlier aggregator of this folder has sent a run there; 0 if none has."""
    safe = _read_mark(path / RELAY_NAME, address).get("safe")
    return safe if type(safe) is int else 0


def _read_mark(mark: Path, address: str) -> dict[str, Any]:
    """Return what a mark says of a run that is sent there; empty without one."""
    try:
        content = json.loads(mark.read_text())
        return content if content["address"] == address else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.debug("ignoring %s: %r", mark, error)
        return {}


def _mark(path: Path, address: str, *, sent: bool, safe: int) -> None:
    try:
        replace_file(path / RELAY_NAME, json.dumps({"address": address, "sent": sent, "safe": safe}).encode())
    except OSError as error:
        _log.warning("run %s would not be sent after a restart of this aggregator: %s", path.name, error)
