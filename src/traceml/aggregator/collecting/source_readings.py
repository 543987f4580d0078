"""Readings of code, environment and machine for runs without trackers, whose rank 0 starts no collectors.

One process of low priority reads them once for each start of a job, when the run is ten seconds old: its cost is then
a small part of the run. It is killed when the run ends, or when it takes too long.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import msgspec

from traceml.aggregator.child_programs import kill_group
from traceml.database.info_kinds import InfoKind
from traceml.database.schema import INFO, LOGGED
from traceml.database.source_record import SOURCE, SourceReading
from traceml.database.store.reader import StoreReader
from traceml.errors import PluginError
from traceml.fail_open import fail_open
from traceml.run_folder import STORE_NAME
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import BUILT_IN

if TYPE_CHECKING:
    from traceml.aggregator.active_run import ActiveRun
    from traceml.aggregator.streams.stream import RankStream

__all__ = ["SourceReadings", "SourceRequest", "find_request"]

# The priority first: the imports alone are half of the work.
_BOOT = (
    "from traceml.helper_programs import lower_priority; lower_priority({nice}); "
    "from traceml.track.rank.collectors.collector_main import main; main()"
)
_POLL_S, _POLLS = 1.0, 60
_LONGEST_S = 300.0  # half a second of CPU time, while a training takes all cores
# Of a rank's info and logged rows: those of its start are first.
_FRAMES = 8
_GIT_TIMEOUT_S = 120.0  # while a training takes all cores

_log = logging.getLogger("traceml")


class CollectRequest(msgspec.Struct, kw_only=True):
    """Names of collectors, the rank's `sys.path`, its setting `mask`, and the age of the run at which they read."""

    names: list[str]
    path: list[str]
    mask: list[str] = []
    after_s: float


class SourceRequest(msgspec.Struct, kw_only=True):
    """Row `process` of a rank that leaves it to its aggregator to read about its code, environment and machine."""

    kind: str
    argv: list[str] = []
    folder: str = ""
    executable: str = ""
    python: str = ""
    collect: CollectRequest | None = None

    def line(self, names: list[str], pid: int) -> bytes:
        """Return the request for the process of the collectors; see `collector_main`."""
        assert self.collect is not None
        config = {
            "script": self.argv[0] if self.argv else "", "folder": self.folder, "argv": self.argv,
            "executable": self.executable, "python": self.python, "path": self.collect.path,
            "mask": self.collect.mask, "environ": _environ(pid), "git_timeout_s": _GIT_TIMEOUT_S,
        }  # fmt: skip
        # No path and no name of the rank's: the process imports nothing from where another process says.
        request = {
            "collectors": names, "known": {}, "mask": self.collect.mask, "cleanup_s": 0.0, "path": [], "config": config,
        }  # fmt: skip
        return json.dumps(request).encode() + b"\n"


def find_request(store: Path, stream: int) -> tuple[SourceRequest | None, list[str]]:
    """Return a rank's row `process`, None while it is not stored, and the built-in collectors that it asks for.

    Those that the rank has started itself meanwhile, as with an `Experiment`, are left out; all where another reading
    has come to its end, of an earlier aggregator.

    Raises:
        StoreError: the store cannot be read.
        msgspec.ValidationError: the row has values of other types.
    """
    with StoreReader(store) as reader:
        rows = reader.first_maps(INFO.name, stream, _FRAMES)
        row = next((row for row in rows if row.get("kind") == InfoKind.PROCESS), None)
        if row is None:
            return None, []

        request = msgspec.convert(row, SourceRequest)
        wanted = request.collect.names if request.collect is not None else ()
        last = reader.last_event(SOURCE)
        if last is not None and SourceReading.from_event(last.data).is_whole_for(stream):
            return request, []

        logged = reader.first_maps(LOGGED.name, stream, _FRAMES)
        own = {row.get("name") for row in logged if row.get("kind") == "collected"}

    return request, [name for name in BUILT_IN[PluginType.COLLECTOR] if name in wanted and name not in own]


def _environ(pid: int) -> dict[str, str] | None:
    """Return the variables with which a program of this user was started.

    None if unknown: for a forked process, such as a worker of a launch, the kernel shows its parent's.
    """
    own = Path("/proc", str(pid))
    try:
        if own.stat().st_uid != os.getuid() or _is_fork(own):
            return None

        text = (own / "environ").read_bytes().decode("utf-8", "replace")
    except (OSError, ValueError):
        return None

    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def _is_fork(process: Path) -> bool:
    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
    return (process / "cmdline").read_bytes() == Path("/proc", parent, "cmdline").read_bytes()


class SourceReadings:
    """Readings of the runs of an aggregator, one for each start of a job."""

    def __init__(self, nice: int) -> None:
        self._boot = _BOOT.format(nice=nice)
        self._runs: dict[ActiveRun, _RankReading] = {}

    def check(self, run: ActiveRun) -> None:
        """Begin when rank 0 of the newest start of the job has come. Call it about once a second."""
        known = self._runs.get(run)
        if known is not None and known.attempt == run.attempt:
            return

        firsts = (each for each in run.connected if each.rank == 0 and not each.is_helper)
        rank = next((each for each in firsts if each.attempt == run.attempt), None)
        if rank is not None:
            if known is not None:
                known.cancel()

            self._runs[run] = _RankReading(run, rank, self._boot)

    async def end(self, run: ActiveRun) -> None:
        """End the reading of a run that ends; what was read is stored."""
        known = self._runs.pop(run, None)
        if known is not None:
            known.cancel()
            await known.ended()

    async def close(self) -> None:
        """End all readings."""
        for run in list(self._runs):
            await self.end(run)


class _RankReading:
    """The reading of one start of a job, from the arrival of its rank 0."""

    def __init__(self, run: ActiveRun, rank: RankStream, boot: str) -> None:
        self.attempt = rank.attempt
        self._run, self._rank, self._boot = run, rank, boot
        self._began_s = time.monotonic()
        self._facts: dict[str, dict[str, Any]] = {}
        self._task = asyncio.create_task(self._read())

    def cancel(self) -> None:
        self._task.cancel()

    async def ended(self) -> None:
        await asyncio.wait({self._task})

    async def _read(self) -> None:
        with fail_open(_log, "aggregator", f"changes and packages of run {self._run.id} are not known", once=True):
            request, names = await self._request()
            if request is None or request.collect is None or not names:
                return

            if not self._rank.seen_here:
                self._store("elsewhere")
                return

            await asyncio.sleep(request.collect.after_s - (time.monotonic() - self._began_s))
            _, names = await self._find()  # an Experiment has begun meanwhile
            if names:
                await self._collect(request.line(names, self._rank.incarnation.pid))

    async def _request(self) -> tuple[SourceRequest | None, list[str]]:
        for _ in range(_POLLS):
            await asyncio.sleep(_POLL_S)
            if self._rank.next.get(INFO.name):
                request, names = await self._find()
                if request is not None:
                    return request, names

        return None, []

    async def _find(self) -> tuple[SourceRequest | None, list[str]]:
        return await asyncio.to_thread(find_request, self._run.path / STORE_NAME, self._rank.id)

    async def _collect(self, request: bytes) -> None:
        unread = "failed"
        try:
            async with asyncio.timeout(_LONGEST_S):
                await self._run_collectors(request)

            unread = ""
        except TimeoutError:
            unread = "late"
        except asyncio.CancelledError:
            unread = "ended"
            raise
        finally:
            self._store(unread)

    async def _run_collectors(self, request: bytes) -> None:
        """Take what a process of the collectors reads, until its end.

        Raises:
            PluginError: it has failed.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", self._boot, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(request)  # it stays open: the process ends with it
            unpacker = msgpack.Unpacker(max_buffer_size=4 << 20)
            while data := await process.stdout.read(1 << 16):
                unpacker.feed(data)
                for row in unpacker:
                    self._take(row)

            if await process.wait():
                raise PluginError(f"the process of the collectors ended with status {process.returncode}")
        finally:
            if process.returncode is None:
                await kill_group(process)

    def _take(self, row: dict[str, Any]) -> None:
        if row["kind"] == "collected":
            self._facts[row["name"]] = row["facts"]
        elif row["kind"] == "warning":
            with fail_open(_log, "aggregator", f"facts of run {self._run.id} are missing"):
                raise PluginError(row["text"])

    def _store(self, unread: str) -> None:
        if not self._run.ended:
            self._run.store.event(SOURCE, SourceReading(self._rank.id, self._facts, unread).to_event())
