"""Analysis on a Dask cluster: workers read parts of the files, the client merges the results.

Counts, sums and self times are those of one process, to the last digit. Workers must see the files under the same
paths, and have traceml installed.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from traceml.errors import TraceEmptyError, TraceMLError, TraceNotFoundError, UsageError
from traceml.formatting import error_text
from traceml.installation import install_command
from traceml.traces.aggregate.pairs import SpanMatcher
from traceml.traces.aggregate.sorting import ExternalSorter
from traceml.traces.query.analysis import Analysis, TraceQuery
from traceml.traces.query.fields import FieldContext
from traceml.traces.query.file_parts import (
    FilePart,
    IndivisibleError,
    PartBoundaries,
    facts_of,
    join_parts,
    read_part,
    split,
)
from traceml.traces.query.labels import Labels, read_labels
from traceml.traces.query.partial import PartialAnalysis, absorb, partial_of
from traceml.traces.reader.columns import StringTable, TraceFileFacts
from traceml.traces.reader.native_scanner import new_scanner
from traceml.traces.reader.python_scanner import PythonScanner
from traceml.traces.reader.reading import check_read, read

__all__ = ["analyze_part", "dask_client", "keep_freed_memory", "labels_of", "run_on"]

_PER_THREAD = 3  # parts that run or wait per thread of the cluster
_CONNECT_S = 10
_ALL = 2**62

# Dask starts workers with this setting at 65536, so that freed memory returns to the system at once. For columns that
# are allocated again and again this costs a page fault per page: a part of a trace took 1.6 times as long.
_SETTING = "MALLOC_TRIM_THRESHOLD_"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 256 * 1024 * 1024
_LARGEST_BYTES = 32 * 1024 * 1024  # maximum that glibc accepts for M_MMAP_THRESHOLD
_DEFAULT_BYTES = 128 * 1024

PartResult = tuple[PartialAnalysis, PartBoundaries | TraceFileFacts]


def run_on(
    cluster: Any,
    query: TraceQuery,
    files: Sequence[Path],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Analysis, list[TraceFileFacts]]:
    """Run a query on files on a Dask cluster.

    Args:
        cluster: a scheduler's address, or a `distributed.Client`.
        files: the files, under paths that the workers can open.
        progress: called from time to time with events and files so far.

    Raises:
        UsageError: `distributed` is not installed, or no scheduler answers.
        TraceNotFoundError: a worker does not see a file.
        TraceEmptyError: there is no event, and a file is no trace.
    """
    whole: set[int] = set()
    with dask_client(cluster) as client:
        labels = _labels(client, query, files)
        while True:
            analysis, facts, failed = _run_once(client, query, files, labels, whole, progress)
            if not failed:
                break

            whole |= failed

    check_read(facts)
    for source, each in enumerate(facts):
        analysis.context.labels.add_file(source, each.path, each.header)

    analysis.finish()
    return analysis, facts


def labels_of(query: TraceQuery, source: int, path: str) -> Labels:
    """Return the metadata that conditions depend on from the file number `source`, in a worker."""
    _check_seen(path)
    try:
        return read_labels([Path(path)], query.metadata, source)
    except TraceEmptyError:
        return Labels()  # other files may have events: the client checks that


def analyze_part(query: TraceQuery, part: FilePart, labels: Labels | None) -> PartResult | str:
    """Analyze a part of a file, in a worker; return a reason when the file has to be read in one go.

    Args:
        labels: labels of all files, if conditions depend on them.
    """
    with keep_freed_memory():
        return _analyzed(query, part, labels)


def _analyzed(query: TraceQuery, part: FilePart, labels: Labels | None) -> PartResult | str:
    paths = [Path(part.path)] * (part.source + 1)  # those of the other files are not used
    context = FieldContext(StringTable(), paths, labels)
    analysis = Analysis(query, context)
    analysis.begin_source(part.source)
    analysis.sorter = ExternalSorter(limit=_ALL, run=_ALL)  # all is sent back
    analysis.matcher = SpanMatcher(ExternalSorter(limit=_ALL, run=_ALL))
    _check_seen(part.path)
    try:
        boundaries = _whole(analysis, part) if part.whole else read_part(part, _scanner(analysis), analysis.feed)
    except IndivisibleError as error:
        return str(error)

    partial = partial_of(analysis)
    if labels is not None:
        partial.labels = Labels()  # the client has them

    return partial, boundaries


def _check_seen(path: str) -> None:
    if not Path(path).exists():
        raise TraceNotFoundError(f"a Dask worker does not see {path}: its host needs the file under this path")


def _whole(analysis: Analysis, part: FilePart) -> TraceFileFacts:
    query, strings = analysis.query, analysis.context.strings
    reading = read([part.path], args=query.args, strings=strings, workers=1, metadata=query.metadata)
    try:
        for batch in reading:
            batch.source = part.source
            analysis.feed(batch)
    except TraceEmptyError:
        pass  # other files may have events: the client checks that

    return reading.files[0]


def _labels(client: Any, query: TraceQuery, files: Sequence[Path]) -> Labels | None:
    """Read the metadata that conditions depend on, a file per task; None without such conditions."""
    if not query.needs_labels:
        return None

    labels = Labels()
    for task in [client.submit(labels_of, query, source, str(path), pure=False) for source, path in enumerate(files)]:
        labels.merge(_result(task))

    return labels


def _result(task: Any) -> Any:
    """Wait for the result of a task.

    Raises:
        TraceMLError: the worker could not run it.
    """
    try:
        return task.result()
    except (TraceMLError, OSError):
        raise
    except Exception as error:
        what = f"the Dask cluster did not run a task: {error_text(error)}"
        raise TraceMLError(f"{what}. Workers need traceml, and enough memory for a part of a trace") from error


def _run_once(
    client: Any,
    query: TraceQuery,
    files: Sequence[Path],
    labels: Labels | None,
    whole: set[int],
    progress: Callable[[int, int], None] | None,
) -> tuple[Analysis, list[TraceFileFacts], set[int]]:
    """Run the query on the cluster, the files in `whole` in one go; add each part as soon as it fits.

    Returns:
        The analysis, facts about each file, and the files that turned out to need reading in one go: if there are any,
        the rest is incomplete.
    """
    context = FieldContext(StringTable(), list(files))
    if labels is not None:
        context.labels.merge(labels)

    analysis, facts, failed = Analysis(query, context), list[TraceFileFacts](), set[int]()
    threads = max(1, sum(client.nthreads().values()))
    for source, (parts, results) in enumerate(_by_file(client, query, context, labels, threads, whole)):
        try:
            facts.append(_add_parts(analysis, parts, results))
        except IndivisibleError:
            failed.add(source)
            deque(results, maxlen=0)  # waits for the other parts

        if progress is not None:
            progress(sum(each.events for each in facts), source + 1)

    return analysis, facts, failed


def _by_file(
    client: Any, query: TraceQuery, context: FieldContext, labels: Labels | None, threads: int, whole: set[int]
) -> Iterator[tuple[list[FilePart], Iterator[PartResult | str]]]:
    """Yield the parts of each file with their results, in order; a bounded number runs at a time."""
    files = [split(source, path, least=4 * threads) for source, path in enumerate(context.paths)]
    for source in whole:
        files[source] = [replace(files[source][0], end=files[source][-1].end, whole=True)]

    shared = None if labels is None else client.scatter(labels, hash=False, broadcast=True)
    waiting = deque(part for parts in files for part in parts)
    running: deque[Any] = deque()

    def results(count: int) -> Iterator[PartResult | str]:
        for _ in range(count):
            while waiting and len(running) < _PER_THREAD * threads:
                part = waiting.popleft()
                running.append(client.submit(analyze_part, query, part, shared, pure=False))

            yield _result(running.popleft())

    for parts in files:
        yield parts, results(len(parts))


def _add_parts(analysis: Analysis, parts: list[FilePart], results: Iterator[PartResult | str]) -> TraceFileFacts:
    """Add the parts of a file, each once the part after it is known to fit.

    Raises:
        IndivisibleError: the file has to be read in one go.
    """
    source, path = parts[0].source, analysis.context.paths[parts[0].source]
    boundaries: list[PartBoundaries] = []
    earlier: PartialAnalysis | None = None
    for result in results:
        if isinstance(result, str):
            raise IndivisibleError(result)

        partial, boundary = result
        if isinstance(boundary, TraceFileFacts):
            absorb(analysis, partial, source)
            boundary.path = path
            return boundary

        if earlier is not None:
            _absorb_fitting(analysis, earlier, parts[len(boundaries) - 1], boundaries[-1], boundary)

        earlier = partial
        boundaries.append(boundary)

    assert earlier is not None
    _absorb_fitting(analysis, earlier, parts[-1], boundaries[-1], None)
    return facts_of(path, boundaries, wrapped=parts[0].wrapped)


def _absorb_fitting(
    analysis: Analysis, partial: PartialAnalysis, part: FilePart, left: PartBoundaries, right: PartBoundaries | None
) -> None:
    between = join_parts(left, right, part, _scanner(analysis))
    absorb(analysis, partial, part.source)
    if between is not None:
        analysis.feed(between)


def _scanner(analysis: Analysis) -> PythonScanner:
    return new_scanner(tuple(analysis.query.args), analysis.context.strings, analysis.query.metadata)


@contextmanager
def dask_client(cluster: Any) -> Iterator[Any]:
    """Connect to a cluster with workers; the value is the `distributed.Client`.

    Args:
        cluster: a scheduler's address, the path of its file, or a `distributed.Client`, which stays open.

    Raises:
        UsageError: `distributed` is not installed, or no scheduler answers.
    """
    if _is_client(cluster):
        yield cluster
        return

    from distributed import Client

    cluster = _checked_address(cluster) if isinstance(cluster, str) else cluster
    try:
        client = Client(cluster, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {cluster}: {error}") from error

    with client:
        if not client.nthreads():
            raise UsageError(f"the Dask scheduler at {cluster} has no workers")

        yield client


def _checked_address(given: str) -> str:
    """Return a scheduler's address, also from the file that `dask scheduler --scheduler-file` writes.

    `Client` needs 20 s to fail without a port.
    """
    from distributed.comm import parse_address, parse_host_port

    address = given
    try:
        if Path(given).is_file():
            address = str(json.loads(Path(given).read_text(encoding="utf-8"))["address"])

        scheme, location = parse_address(address)
        if scheme in ("tcp", "tls"):
            parse_host_port(location)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "not a scheduler's file" if Path(given).is_file() else "neither an address nor a scheduler's file"
        raise UsageError(f"dask={given!r} is {what} ({error}): give HOST:PORT, as in tcp://10.0.0.1:8786") from error

    return address


def _is_client(cluster: Any) -> bool:
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(f"analysis on a cluster needs Dask: {install_command('dask')} ({error})") from error

    return isinstance(cluster, Client)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory in the process; return it at the end, and restore the setting of the environment."""
    threshold = os.environ.get(_SETTING, "")
    libc = _glibc() if threshold.isdigit() else None
    if libc is None:
        yield
        return

    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, int(threshold))
        libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_BYTES)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
