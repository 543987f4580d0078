"""The same analysis on a Dask cluster: workers read parts of the files, the answer is put together here.

Counts, sums and self times are those of one process, to the last digit. Workers must see the files under the same
paths, and have traceml installed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from traceml.errors import TraceEmptyError, TraceNotFoundError, UsageError
from traceml.traces.analysis import Analysis, Question
from traceml.traces.columns import Batch, FileFacts, Strings
from traceml.traces.fields import Origin
from traceml.traces.labels import Labels
from traceml.traces.pairs import Matcher
from traceml.traces.partial import Partial, absorb, partial_of
from traceml.traces.parts import IndivisibleError, Part, Seams, facts_of, mend, read_part, split
from traceml.traces.sorting import Sorter

__all__ = ["analyse_part", "run_on"]

_PER_THREAD = 3  # parts that each thread of the cluster has at a time, or waiting
_CONNECT_S = 10
_ALL = 2**62

Result = tuple[Partial, Seams | FileFacts]


def run_on(
    cluster: Any,
    question: Question,
    files: Sequence[Path],
    progress: Callable[[int, int], None] | None = None,
    *,
    labels: Labels | None = None,
) -> tuple[Analysis, list[FileFacts]]:
    """Put a question to files on a Dask cluster.

    Args:
        cluster: a scheduler's address, or a `distributed.Client`.
        question: what is asked.
        files: the files, under paths that the workers know.
        progress: called now and then with events and files so far.
        labels: what metadata says, where conditions rest on it.

    Raises:
        UsageError: `distributed` is not installed, or no scheduler answers.
        TraceNotFoundError: a worker does not see a file.
        TraceEmptyError: there is not one event.
    """
    origin = Origin(Strings(), list(files))
    origin.labels = labels or Labels()
    analysis = Analysis(question, origin)
    facts = []
    with _client(cluster) as client:
        threads = max(1, sum(client.nthreads().values()))
        for source, parts, results in _by_file(client, question, origin, threads):
            facts.append(_put_together(client, analysis, source, parts, results))
            if progress is not None:
                progress(sum(each.events for each in facts), source + 1)

    if not any(each.events for each in facts):
        raise TraceEmptyError(f"there is no trace event in {', '.join(str(file) for file in files[:5])}")

    for source, each in enumerate(facts):
        origin.labels.take_file(source, each.path, each.header)

    analysis.finish()
    return analysis, facts


def analyse_part(question: Question, part: Part, paths: list[str], labels: Labels) -> Result | str:
    """Analyse a part of a file, in a worker; returns why not where the file has to be read in one go."""
    strings = Strings()
    origin = Origin(strings, [Path(path) for path in paths])
    origin.labels = labels
    analysis = Analysis(question, origin)
    analysis.begin_source(part.source)
    analysis.sorter = Sorter(limit=_ALL, part=_ALL)  # all of it travels
    analysis.matcher = Matcher(Sorter(limit=_ALL, part=_ALL))
    if not Path(part.path).exists():
        raise TraceNotFoundError(f"a Dask worker does not see {part.path}: its host needs the file under this path")

    if part.whole:
        return _whole(analysis, part)

    try:
        seams = read_part(part, question.args, strings, analysis.feed)
    except IndivisibleError as error:
        return str(error)

    return partial_of(analysis), seams


def _whole(analysis: Analysis, part: Part) -> Result:
    from traceml.traces.reading import read

    reading = read([part.path], args=analysis.question.args, strings=analysis.origin.strings, workers=1)
    try:
        for batch in reading:
            analysis.feed(_as_source(batch, part.source))
    except TraceEmptyError:
        pass  # other files may have events: who puts the parts together knows

    return partial_of(analysis), reading.files[0]


def _as_source(batch: Batch, source: int) -> Batch:
    batch.source = source
    return batch


def _by_file(
    client: Any, question: Question, origin: Origin, threads: int
) -> Iterator[tuple[int, list[Part], Iterator[Result | str]]]:
    """Yield each file with its parts and what comes of them, in order; a bounded number is on its way."""
    files = [split(source, path, least=2 * threads) for source, path in enumerate(origin.paths)]
    paths = [str(path) for path in origin.paths]
    waiting = deque(part for parts in files for part in parts)
    running: deque[Any] = deque()

    def results(count: int) -> Iterator[Result | str]:
        for _ in range(count):
            while waiting and len(running) < _PER_THREAD * threads:
                part = waiting.popleft()
                running.append(client.submit(analyse_part, question, part, paths, origin.labels, pure=False))

            yield running.popleft().result()

    for source, parts in enumerate(files):
        yield source, parts, results(len(parts))


def _put_together(
    client: Any, analysis: Analysis, source: int, parts: list[Part], results: Iterator[Result | str]
) -> FileFacts:
    """Absorb the parts of a file once they are known to fit; else the file is read in one go by a worker."""
    collected = list(results)
    fitting = [result for result in collected if not isinstance(result, str)]
    path = analysis.origin.paths[source]
    if len(fitting) == len(collected):
        if parts[0].whole:
            partial, facts = fitting[0]
            assert isinstance(facts, FileFacts)
            absorb(analysis, partial, source)
            facts.path = path
            return facts

        try:
            return _joined(analysis, parts, fitting)
        except IndivisibleError:
            pass

    whole = Part(source, str(path), 0, path.stat().st_size, True, parts[0].wrapped)
    names = [str(each) for each in analysis.origin.paths]
    result = client.submit(analyse_part, analysis.question, whole, names, analysis.origin.labels, pure=False).result()
    return _put_together(client, analysis, source, [whole], iter([result]))


def _joined(analysis: Analysis, parts: list[Part], results: list[Result]) -> FileFacts:
    source, question = parts[0].source, analysis.question
    seams = [each for _, each in results if isinstance(each, Seams)]
    between = [
        mend(left, right, part, question.args, analysis.origin.strings)
        for left, right, part in zip(seams, [*seams[1:], None], parts, strict=True)
    ]
    for (partial, _), batch in zip(results, between, strict=True):
        absorb(analysis, partial, source)
        if batch is not None:
            analysis.feed(batch)

    return facts_of(analysis.origin.paths[source], seams, wrapped=parts[0].wrapped)


@contextmanager
def _client(cluster: Any) -> Iterator[Any]:
    if _is_client(cluster):
        yield cluster
        return

    from distributed import Client

    try:
        client = Client(cluster, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {cluster}: {error}") from error

    with client:
        if not client.nthreads():
            raise UsageError(f"the Dask scheduler at {cluster} has no workers")

        yield client


def _is_client(cluster: Any) -> bool:
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(f"analysis on a cluster needs Dask: pip install 'traceml[dask]' ({error})") from error

    return isinstance(cluster, Client)
