"""Trace writer for any Python program: spans, instants, counters and arrows, for Perfetto, dftracer and traceml.

    with traces.Writer("trace.pfw.gz") as trace:
        with trace.span("load", cat="io", path=path):
            ...

The calling thread only creates an object per event; a thread of the writer encodes and compresses events in blocks. A
writer that is killed loses the blocks that were not written yet, at most a second of events.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from itertools import islice
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, overload

from traceml.clock import clock_pair, monotonic_ns
from traceml.errors import UsageError
from traceml.traces.writer.blocks import BlockWriter, TraceWriterStatistics
from traceml.traces.writer.encoding import (
    NO_ARGS,
    CounterEvent,
    FlowEvent,
    InstantEvent,
    MetaEvent,
    SpanEvent,
    TraceEvent,
    args_of,
)
from traceml.traces.writer.sinks import GzipArraySink, expand_path, sink_of

__all__ = ["Span", "TraceWriterStatistics", "Writer"]

_PAIR_ID_BITS = 30
P = ParamSpec("P")
R = TypeVar("R")
_WriteSpan = Callable[[str, str, int, int, dict[str, Any]], None]
"""Function that takes a span: its name and category, begin and end in nanoseconds, and arguments."""


class Span:
    """Context manager that writes the duration of its block; created by `Writer.span`."""

    __slots__ = ("_args", "_cat", "_name", "_start_ns", "_write")

    def __init__(self, write: _WriteSpan, name: str, cat: str, args: dict[str, Any]) -> None:
        self._write, self._name, self._cat, self._args = write, name, cat, args

    def __enter__(self) -> Span:
        self._start_ns = monotonic_ns()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        end_ns = monotonic_ns()
        if kind is not None:
            self._args["error"] = kind.__name__

        self._write(self._name, self._cat, self._start_ns, end_ns, self._args)

    def note(self, **args: Any) -> None:
        """Add arguments that are known only later, such as the number of bytes read."""
        self._args.update(args)


class _TracedItems(Generator[Any, Any, Any]):
    """A generator with a span from each request to the item, or to the end."""

    def __init__(self, inner: Generator[Any, Any, Any], span: Callable[[], Span]) -> None:
        self._inner, self._span = inner, span

    def send(self, value: Any) -> Any:
        return self._request(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return self._request(self._inner.throw, *error)

    def close(self) -> None:
        self._inner.close()

    def _request(self, function: Callable[..., Any], *args: Any) -> Any:
        with self._span():
            try:
                return function(*args)
            except StopIteration as end:
                stop = end

        raise stop


class Writer:
    """Writes a trace file. Any thread may use it; a forked child continues in the same file on its own.

    Times come from a monotonic clock and are written as microseconds since 1970, so that the traces of several
    processes share one time line.

    Examples:
        >>> with traces.Writer("trace.pfw.gz") as trace, trace.span("load", cat="io"):
        ...     pass

    Args:
        path: the file: `.pfw` (a JSON object per line), `.pfw.gz` (the same in gzip members), `.json` (an array for
            Perfetto and chrome://tracing) or `.json.gz`. `{pid}`, `{host}` and `{rank}` in it are replaced.
        append: append to an existing file, which other processes may do at the same time; else it is replaced. Not for
            `.json.gz`.
        process_name: name of the process in the trace; the name of the script by default.
        origin_ns: write microseconds since this time (epoch nanoseconds) instead, with nanoseconds as decimals.

    Attributes:
        path: the file.
        origin_ns: as given.

    Raises:
        UsageError: the path's suffix is not a known format, or one that cannot be appended to.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        append: bool = False,
        process_name: str | None = None,
        origin_ns: int | None = None,
    ) -> None:
        self.path = expand_path(path)
        sink = sink_of(self.path)  # raises before a file that is no trace is removed
        if not append:
            self.path.unlink(missing_ok=True)
        elif sink is GzipArraySink:
            raise UsageError(f"{self.path}: a compressed array takes no more events: use .pfw.gz or .json with append")

        monotonic, epoch_ns = clock_pair()
        self._offset_ns = epoch_ns - monotonic
        self.origin_ns = origin_ns
        self._process_name = process_name or _script_name()
        self._begin()
        self._blocks = BlockWriter(self.path, self._begin)

    def _begin(self) -> None:
        """Start in this process, which may be a forked child."""
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        # Those of pairs differ between processes that share a file, and are exact as numbers of JavaScript.
        self._pair_ids = itertools.count((self._pid << _PAIR_ID_BITS) + 1)
        self._local = threading.local()
        self._named = False

    def __repr__(self) -> str:
        return f"Writer({str(self.path)!r})"

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def span(self, name: str, /, cat: str = "", **args: Any) -> Span:
        """Return a context manager that writes the duration of its block.

        Args:
            name: name of the span; analyses group by it.
            cat: category.
            args: arguments; values that JSON does not know are written as text.
        """
        return Span(self._write_span, name, cat, args)

    @overload
    def trace(self, name: Callable[P, R], /) -> Callable[P, R]: ...
    @overload
    def trace(self, name: str | None = None, /, cat: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    def trace(self, name: Any = None, /, cat: str = "") -> Any:
        """Return a decorator that writes a span for each call of a function; it is one itself, as `traceml.trace`.

        Calls of a coroutine function overlap on their thread: each is a pair of events (ph b, e) on a track of its own.
        A generator function has a span for each item; an asynchronous one has none.

        Args:
            name: name of the span; the name of the function by default.
            cat: category.
        """
        if callable(name):
            return self.trace()(name)

        def decorate(function: Any) -> Any:
            called = name or function.__qualname__
            if isasyncgenfunction(function):
                return function

            if iscoroutinefunction(function):
                return self._trace_coroutine(function, called, cat)

            if isgeneratorfunction(function):
                return self._trace_generator(function, called, cat)

            @wraps(function)
            def traced(*args: Any, **kwargs: Any) -> Any:
                with Span(self._write_span, called, cat, {}):
                    return function(*args, **kwargs)

            return traced

        return decorate

    def _trace_coroutine(self, function: Any, name: str, cat: str) -> Any:
        @wraps(function)
        async def traced(*args: Any, **kwargs: Any) -> Any:
            number = next(self._pair_ids)
            self._put(TraceEvent(number, name, cat, self._pid, self._tid(), self._us(self._now_ns()), "b"))
            try:
                return await function(*args, **kwargs)
            finally:
                self._put(TraceEvent(number, name, cat, self._pid, self._tid(), self._us(self._now_ns()), "e"))

        return traced

    def _trace_generator(self, function: Any, name: str, cat: str) -> Any:
        @wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            items = function(*args, **kwargs)
            return (yield from _TracedItems(items, lambda: Span(self._write_span, name, cat, {})))

        return traced

    def instant(self, name: str, /, cat: str = "", *, scope: Literal["t", "p", "g"] = "t", **args: Any) -> None:
        """Write an event at the current time.

        Args:
            name: name of the event.
            cat: category.
            scope: scope of the event: this thread (t), this process (p), or global (g).
            args: arguments.
        """
        self.write_instant(name, self._now_ns(), cat=cat, scope=scope, pid=self._pid, tid=self._tid(), args=args)

    def counter(self, name: str, value: float | None = None, /, cat: str = "", **series: float) -> None:
        """Write the current value of a counter, or of several series by name."""
        values = series if value is None else {"value": value, **series}
        self.write_counter(name, self._now_ns(), values, cat=cat, pid=self._pid, tid=self._tid())

    def flow_start(self, name: str, id: int, /, cat: str = "") -> None:  # noqa: A002 - the format's name for it
        """Begin an arrow at the open span of this thread.

        Args:
            name: name of the arrow.
            id: the same at both ends, and unique among arrows of this name.
            cat: category.
        """
        self.write_flow("s", name, id, self._now_ns(), cat=cat, pid=self._pid, tid=self._tid())

    def flow_end(self, name: str, id: int, /, cat: str = "") -> None:  # noqa: A002
        """End an arrow at the open span of this thread, in this or another process; see `flow_start`."""
        self.write_flow("f", name, id, self._now_ns(), cat=cat, pid=self._pid, tid=self._tid())

    def process_name(self, name: str) -> None:
        """Set the name of this process."""
        self._process_name, self._named = name, True
        self.write_name("process_name", name, pid=self._pid, tid=self._tid())

    def thread_name(self, name: str) -> None:
        """Set the name of this thread, instead of its Python name."""
        self.write_name("thread_name", name, pid=self._pid, tid=self._tid())

    # ---- the same for events of other processes and times: epoch nanoseconds, any process and thread number ----

    def write_span(
        self, name: str, start_ns: int, end_ns: int, *, pid: int, tid: int, cat: str = "",
        args: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write a span from `start_ns` to `end_ns`, epoch nanoseconds."""
        ts = self._us(start_ns)
        packed = args_of(args) if args else NO_ARGS
        dur = (end_ns - start_ns) / 1000 if self.origin_ns is not None else int(self._us(end_ns) - ts)
        self._put(SpanEvent(next(self._ids), name, cat, pid, tid, ts, dur, "X", packed))

    def write_instant(
        self, name: str, at_ns: int, *, pid: int, tid: int, cat: str = "", scope: str = "t",
        args: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write an instant at `at_ns`, epoch nanoseconds."""
        number, packed = next(self._ids), args_of(args) if args else NO_ARGS
        self._put(InstantEvent(number, name, cat, pid, tid, self._us(at_ns), "i", s=scope, args=packed))

    def write_counter(
        self, name: str, at_ns: int, values: Mapping[str, float], *, pid: int, tid: int, cat: str = ""
    ) -> None:
        """Write values of a counter at `at_ns`, epoch nanoseconds."""
        number = next(self._ids)
        self._put(CounterEvent(number, name, cat, pid, tid, self._us(at_ns), "C", args=args_of(values)))

    def write_flow(
        self, phase: Literal["s", "t", "f"], name: str, id: int | str, at_ns: int, *, pid: int, tid: int,  # noqa: A002
        cat: str = "",
    ) -> None:  # fmt: skip
        """Write a point of an arrow (s, t or f) at the span that is open at `at_ns`, epoch nanoseconds."""
        bound = "" if phase == "s" else "e"
        self._put(FlowEvent(id, name, cat, pid, tid, self._us(at_ns), phase, bp=bound))

    def write_name(
        self, what: Literal["process_name", "thread_name"], name: str, *, pid: int, tid: int, **facts: Any
    ) -> None:
        """Write the name of a process or a thread."""
        self._put(MetaEvent(what, pid, tid, "M", args_of({"name": name, **facts})))

    def reserve_ids(self, count: int) -> Iterator[int]:
        """Return the numbers of the next events, for `write_lines`."""
        return islice(self._ids, count)

    def write_lines(self, text: bytes, events: int) -> None:
        """Write events that are encoded already, after the pending ones.

        Args:
            text: a JSON object per line; times are microseconds since `origin_ns`.
            events: number of lines.
        """
        self._blocks.write_lines(text, events)

    def flush(self) -> None:
        """Write all pending events now."""
        self._blocks.flush()

    def close(self) -> None:
        """Write all pending events and finish the file; may be called again. Later events are lost and counted."""
        self._blocks.close()

    @property
    def statistics(self) -> TraceWriterStatistics:
        """Counts of written, pending and lost events in this process."""
        return self._blocks.statistics

    # ---- the hot path ----

    def _write_span(self, name: str, cat: str, start_ns: int, end_ns: int, args: dict[str, Any]) -> None:
        try:
            tid = self._local.tid
        except AttributeError:
            tid = self._register_thread()

        offset_ns = self._offset_ns
        if self.origin_ns is None:
            ts = (start_ns + offset_ns) // 1000
            packed = args_of(args) if args else NO_ARGS
            dur = (end_ns + offset_ns) // 1000 - ts
            blocks = self._blocks
            blocks.push(SpanEvent(next(self._ids), name, cat, self._pid, tid, ts, dur, "X", packed))
            if len(blocks.pending) > blocks.limit:
                blocks.schedule()
        else:
            start, end = start_ns + offset_ns, end_ns + offset_ns
            self.write_span(name, start, end, pid=self._pid, tid=tid, cat=cat, args=args)

    def _put(self, event: Any) -> None:
        blocks = self._blocks
        blocks.push(event)
        if len(blocks.pending) > blocks.limit:
            blocks.schedule()

    def _now_ns(self) -> int:
        return monotonic_ns() + self._offset_ns

    def _us(self, epoch_ns: int) -> int | float:
        return epoch_ns // 1000 if self.origin_ns is None else (epoch_ns - self.origin_ns) / 1000

    def _tid(self) -> int:
        try:
            return int(self._local.tid)
        except AttributeError:
            return self._register_thread()

    def _register_thread(self) -> int:
        tid = self._local.tid = threading.get_native_id()
        if not self._named:
            self._named = True
            self.write_name("process_name", self._process_name, pid=self._pid, tid=tid)

        self.write_name("thread_name", threading.current_thread().name, pid=self._pid, tid=tid)
        return tid


def _script_name() -> str:
    name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] not in ("", "-c") else "python"
    rank = os.environ.get("RANK")
    return f"rank {rank}: {name}" if rank else name
