"""Report of a launcher to the aggregator: how a process of the job ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from typing import Any, Self

import msgspec

from traceml.inspection.cgroups import OomPlace

__all__ = ["ExitReport", "write_line"]

_log = logging.getLogger("traceml")


class ExitReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The end of a process, in the commands `exits` of the wire protocol; `docs/wire.md` describes the keys."""

    rank: int | None = None
    local_rank: int = 0
    pid: int | None = None
    host: str | None = None  # None: the aggregator's
    exitcode: int | None = None  # negative for a signal; None where the host is lost
    lost: str | None = None  # why the launcher gave up the host
    time: float | None = None  # epoch seconds at which the launcher saw the end
    stopped: bool = False  # whether the launcher ended it, because of others or of a signal to the job
    oom: OomPlace | None = None  # where the kernel has killed for lack of memory meanwhile
    crash: str | None = None  # the output of faulthandler
    flight: str | None = None  # path of a copy of its flight file
    scheduler: str | None = None  # why the scheduler ended the job, see `RankExit`
    limit_s: float | None = None  # the job's time limit, seconds

    def to_message(self) -> dict[str, Any]:
        """Return its form on the wire, without what is not known."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]

    @classmethod
    def from_message(cls, message: object) -> Self | None:
        """Return a report from its form on the wire; None if a value is of the wrong type. Unknown keys are ignored."""
        try:
            return msgspec.convert(message, cls)
        except msgspec.ValidationError as error:
            _log.info("an exit report is ignored: %s: %s", error, message)
            return None


def write_line(fd: int, message: dict[str, Any]) -> None:
    """Write a message, such as that of a report, as a line of JSON to the descriptor that `traceml run` reads."""
    with contextlib.suppress(BrokenPipeError):  # it was killed: nobody reads it
        os.write(fd, json.dumps(message).encode() + b"\n")
