"""Loader workers that died, from `worker_lost` rows and from the exceptions that torch raises for them."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["LostWorker", "lost_worker_of", "worker_in"]

_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pid>\d+)[^)]*\) (?P<how>is killed by signal|exited)")
_SIGNAL = re.compile(r"is killed by signal: (?P<words>[^.]+)")
_STATUS = re.compile(r"with exit code (?P<code>\d+)")


class LostWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A loader worker that died."""

    pid: int
    worker: int | None = None  # its number in the loader, from 0
    workers: int | None = None  # how many there were
    signal: int | None = None
    code: int | None = None
    step: int | None = None
    oom_kills: int | None = None  # processes that the out-of-memory killer had ended since the start of the rank
    shm_bytes: int | None = None  # shared memory of the host
    shm_used_bytes: int | None = None  # its use after the death, without the worker's own
    memory_limit_bytes: int | None = None


_FIELDS = LostWorker.__struct_fields__


def lost_worker_of(row: Mapping[str, Any]) -> LostWorker | None:
    """Return the worker of an `info` row; None if the row is not a valid one."""
    known = {name: row[name] for name in _FIELDS if isinstance(row.get(name), int)}
    if "pid" not in known:
        return None

    reported = worker_in(str(row.get("message", "")))
    if reported is not None and "signal" not in known and "code" not in known:
        known |= {"signal": reported.signal, "code": reported.code}

    return LostWorker(**known)


def worker_in(exception: str) -> LostWorker | None:
    """Return the worker whose death an exception of torch's loader reports; None for another exception."""
    found = _DIED.search(exception)
    if found is None:
        return None

    status, words = _STATUS.search(exception), _SIGNAL.search(exception)
    return LostWorker(
        pid=int(found["pid"]),
        signal=_number_of(words["words"].strip()) if words else None,
        code=int(status["code"]) if status else None,
    )


def _number_of(words: str) -> int | None:
    """Return the signal that the C library calls so: 9 for `Killed`."""
    return next((int(number) for number in signal.valid_signals() if signal.strsignal(number) == words), None)
