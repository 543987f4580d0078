"""Traces of torch.profiler of several ranks as one file for Perfetto, with steps and phases above the operators."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from traceml.database.schema import STEPS, StepFlag, unpack_bits
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.database.store.run_clocks import RunClocks
from traceml.errors import TraceMLError
from traceml.runs.export.step_parts import STEP_PARTS, part_bounds, step_parts, waiting_of
from traceml.runs.export.top_operators import CallSamples, OperatorTable
from traceml.runs.rows.group_rows import read_group_use

__all__ = ["ProfileFile", "ProfiledRank", "steps_stored", "write_profile"]

_PROFILED = int(StepFlag.PROFILED)
_TRACK = "steps and phases (traceml)"
_BEFORE = 64  # steps that profiled ones are compared with
_RANK_IDS = 1 << 32  # flows are numbered per process


class _TraceDocument(msgspec.Struct):
    """A file of torch.profiler, its events not yet parsed."""

    traceEvents: list[msgspec.Raw]  # noqa: N815 - as in the file
    baseTimeNanoseconds: int = 0  # noqa: N815


@dataclass(frozen=True, slots=True)
class ProfiledRank:
    """The trace of a rank.

    Attributes:
        first_step, steps: the profiled steps.
        data: the trace, gzip.
        calls: sampled lines.
    """

    rank: int
    host: str
    pid: int
    first_step: int
    steps: int
    data: bytes
    calls: CallSamples


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """A written profile."""

    path: Path
    events: int
    operators: OperatorTable
    # by rank, profiled step time / step time before; None if too few steps came before
    slowdown: dict[int, float | None]


def steps_stored(reader: StoreReader, ranks: Iterable[ProfiledRank]) -> bool:
    """Return whether the rows of all profiled steps are in the store."""
    streams = _streams(reader)
    for each in ranks:
        stream, last = streams.get((each.rank, each.pid)), each.first_step + each.steps - 1
        if stream is None or not len(reader.rows(STEPS.name, {stream.id}, steps=[(last, last)])):
            return False

    return True


def write_profile(path: Path, reader: StoreReader, ranks: Sequence[ProfiledRank]) -> ProfileFile:
    """Merge traces into one file; compressed if its name ends in `.gz`.

    Raises:
        TraceMLError: a trace is damaged.
        OSError: the file cannot be written.
    """
    merger = _ProfileMerger(reader)
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        separator = b""
        for each in ranks:
            for event in merger.events(each):
                file.write(separator + msgspec.json.encode(event))
                separator = b",\n"
                merger.written += 1

        file.write(b"\n]}\n")

    return ProfileFile(path, merger.written, merger.operators, merger.slowdown)


class _ProfileMerger:
    """Puts the events of ranks on one time line, with processes and tracks of their own."""

    def __init__(self, reader: StoreReader) -> None:
        self.operators = OperatorTable()
        self.slowdown: dict[int, float | None] = {}
        self.written = 0
        self._reader = reader
        self._streams = _streams(reader)
        self._clocks = RunClocks(reader.streams())
        world_size = len({stream.rank for stream in reader.streams() if stream.is_rank})
        self._grouped = read_group_use(reader).is_grouped(world_size)
        self._origin_ns = 0
        self._tracks: dict[tuple[int, Any, Any], int] = {}
        self._processes: dict[tuple[int, Any], int] = {}

    def events(self, each: ProfiledRank) -> Iterator[dict[str, Any]]:
        """Yield the events of a rank: names, steps and phases, operators."""
        base_ns, decoded = _decoded(each)
        stream = self._streams.get((each.rank, each.pid))
        shift_ns = self._clocks.from_wall_clock(stream.id, 0) if stream is not None else 0
        self.operators.add(decoded, base_ns, each.calls)
        if not self._origin_ns:
            self._origin_ns = _first_ns(decoded, base_ns + shift_ns)

        yield from self._names(each, decoded)
        if stream is not None:
            yield from self._steps(each, stream)

        for event in decoded:
            if event.get("ph") != "M" and isinstance(event.get("pid"), int):
                yield self._moved(each, event, base_ns + shift_ns)

    def _names(self, each: ProfiledRank, events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Name the processes after ranks and devices; threads keep their names."""
        pids = dict.fromkeys(
            [each.pid, *(e["pid"] for e in events if isinstance(e.get("pid"), int) and e["ph"] != "M")]
        )
        for pid in pids:
            own = pid == each.pid
            number = self._process(each.rank, pid)
            name = f"rank {each.rank} ({each.host})" if own else f"rank {each.rank}, device {pid}"
            yield _name("process_name", number, 0, name=name)
            yield _name("process_sort_index", number, 0, sort_index=number)

        for event in events:
            if event.get("ph") == "M" and event["name"] == "thread_name" and event["pid"] in pids:
                yield _name(
                    "thread_name",
                    self._process(each.rank, event["pid"]),
                    self._track(each.rank, event["pid"], event["tid"]),
                    **event["args"],
                )

    def _moved(self, each: ProfiledRank, event: dict[str, Any], base_ns: int) -> dict[str, Any]:
        """Return an event on the common time line, in its rank's process."""
        moved = {**event, "ts": (base_ns - self._origin_ns) / 1000 + event["ts"]}
        moved["tid"] = self._track(each.rank, event["pid"], event.get("tid"))
        moved["pid"] = self._process(each.rank, event["pid"])
        if isinstance(event.get("id"), int):
            moved["id"] = event["id"] + each.rank * _RANK_IDS

        return moved

    def _steps(self, each: ProfiledRank, stream: StreamRecord) -> Iterator[dict[str, Any]]:
        """Yield steps and phases of the profiled steps; note how much longer these took than those before."""
        first, last = each.first_step, each.first_step + each.steps - 1
        rows = self._reader.rows(STEPS.name, {stream.id}, steps=[(max(first - _BEFORE, 0), last)])
        inside = rows[rows["step"] >= first]
        before = rows[(rows["step"] < first) & (unpack_bits(rows["bits"]).flags & _PROFILED == 0)]
        usual_ns = float(np.median(before["total_ns"])) if len(before) >= 3 else 0.0
        self.slowdown[each.rank] = float(inside["total_ns"].mean()) / usual_ns if usual_ns and len(inside) else None

        pid, tid = self._process(each.rank, each.pid), self._track(each.rank, each.pid, _TRACK)
        yield _name("thread_name", pid, tid, name=_TRACK)
        yield _name("thread_sort_index", pid, tid, sort_index=-1)
        end = self._clocks.from_monotonic(stream.id, inside["t_end_ns"])
        begin = end - inside["total_ns"]
        parts = step_parts(inside, waiting_of(inside, grouped=self._grouped))
        starts, ends = part_bounds(begin, end, parts)
        for number, step in enumerate(inside["step"].tolist()):
            yield self._slice(f"step {step}", "step", int(begin[number]), int(end[number]), pid, tid)
            for (name, category), at, until in zip(STEP_PARTS, starts[number], ends[number], strict=True):
                if until > at:
                    yield self._slice(name, category, int(at), int(until), pid, tid)

    def _slice(self, name: str, category: str, begin_ns: int, end_ns: int, pid: int, tid: int) -> dict[str, Any]:
        ts, dur = (begin_ns - self._origin_ns) / 1000, (end_ns - begin_ns) / 1000
        return {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": ts, "dur": dur}

    def _process(self, rank: int, pid: Any) -> int:
        """Return the number of a process: they are in the order of ranks."""
        return self._processes.setdefault((rank, pid), len(self._processes) + 1)

    def _track(self, rank: int, pid: Any, tid: Any) -> int:
        """Return the number of a track, unique in the file: viewers look tracks up without their process."""
        return self._tracks.setdefault((rank, pid, tid), len(self._tracks) + 1)


def _streams(reader: StoreReader) -> dict[tuple[int, int], StreamRecord]:
    return {(each.rank, each.identity.pid): each for each in reader.streams() if each.is_rank}


def _decoded(each: ProfiledRank) -> tuple[int, list[dict[str, Any]]]:
    """Return the time to which the events of a trace are relative, and the events."""
    try:
        document = msgspec.json.decode(zlib.decompress(each.data, 31), type=_TraceDocument)
        events = [msgspec.json.decode(raw, type=dict[str, Any]) for raw in document.traceEvents]
    except (zlib.error, msgspec.DecodeError) as error:
        raise TraceMLError(f"the trace of rank {each.rank} is damaged: {error}. Profile again") from error

    return document.baseTimeNanoseconds, events


def _first_ns(events: Iterable[dict[str, Any]], base_ns: int) -> int:
    """Return the start of the first event's second, so that times stay short."""
    first = min((event["ts"] for event in events if "ts" in event), default=0.0)
    return (base_ns + round(first * 1000)) // 10**9 * 10**9


def _name(what: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}
