"""Runs of the dataset, each reduced to its facts, its mean phases, and the own work of its hosts.

This is all that the analyses need, so it is computed where the files are read: by threads here, or by Dask's workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.runs.export.table_columns import parquet_library
from traceml.runs.fleet.fleet_dataset import partition_of
from traceml.runs.fleet.fleet_rows import WAITING

__all__ = ["FLEET_FIELDS", "FleetRun", "HostWork", "SummarizedFiles", "read_runs", "summarize_files"]

_FACTS = ("run", "name", "started_epoch_s", "state", "verdict", "script", "model", "parameters", "dtype", "device",
          "parallel", "compiled", "batch_size", "world_size", "steps", "step_ms")  # fmt: skip
_COLUMNS = (*_FACTS, "host", "rank", "phase", "mean_ms")
_NEVER_NULL = ("run", "script", "steps", "world_size", "host", "rank", "phase", "mean_ms")
_BATCH = 256  # files that a thread or worker reads at a time

Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class HostWork:
    """Own work of a host in a run: that of its slowest rank, for which others wait."""

    host: str
    work_ms: float  # own work per step, in milliseconds
    phases: dict[str, float]  # own work by phase, in milliseconds; they add up to `work_ms`
    ranks: int  # its ranks without rank 0


@dataclass(frozen=True, slots=True)
class FleetRun:
    """A run of the fleet.

    Attributes:
        run: its id, name: its name, project, month: of its folder in the dataset.
        started: epoch seconds, None if unknown.
        script, model, parameters, dtype, device, parallel, compiled, batch_size, world_size: what was trained, and how.
        steps: number of steps, step_ms: mean step time.
        phases: mean milliseconds per step by phase, over all ranks.
        hosts: own work of each host without rank 0, which also logs and saves; a host that ran only rank 0 is left out.
    """

    run: str
    name: str
    project: str
    month: str
    started: float | None
    state: str
    verdict: str
    script: str
    model: str | None
    parameters: int | None
    dtype: str | None
    device: str | None
    parallel: str | None
    compiled: bool | None
    batch_size: int | None
    world_size: int
    steps: int
    step_ms: float | None
    phases: dict[str, float]
    hosts: tuple[HostWork, ...]

    @property
    def tags(self) -> Sequence[str]:
        """None: labels may change later, and are not in the dataset."""
        return ()

    @property
    def texts(self) -> Sequence[str]:
        """The texts in which a single word is looked for."""
        return self.run, self.name, self.project, self.state, self.verdict, self.script, self.model or ""

    def unknown_name(self, name: str) -> str:
        """Return the text of an error for a name that no run has, with the fields."""
        return f"no run of the dataset has a field {name!r}. Fields: {', '.join(FLEET_FIELDS)}"

    def value(self, name: str) -> Any:
        """Return a field; None if the run has none of this name."""
        return FLEET_FIELDS[name](self) if self.has(name) else None

    def has(self, name: str) -> bool:
        """Return whether there is a field of this name."""
        return name in FLEET_FIELDS


FLEET_FIELDS: dict[str, Callable[[FleetRun], Any]] = {
    "id": lambda run: run.run,
    "ranks": lambda run: run.world_size,
    "hosts": lambda run: ",".join(each.host for each in run.hosts),
    **{
        name: attrgetter(name)
        for name in ("name", "project", "month", "started", "state", "verdict", "script", "model", "parameters",
                     "dtype", "device", "parallel", "compiled", "batch_size", "steps", "step_ms")
    },
}  # fmt: skip
"""Fields of a run by name, for conditions."""


@dataclass(frozen=True, slots=True)
class SummarizedFiles:
    """Runs of some files, and messages about files that cannot be read."""

    runs: list[FleetRun]
    damage: list[str]


def read_runs(files: Sequence[Path], dask: str | None = None, progress: Progress | None = None) -> SummarizedFiles:
    """Return the runs in files, the oldest first; of a run that occurs twice, the last one.

    Args:
        dask: address of a Dask scheduler whose workers read the files; they need them under the same paths.

    Raises:
        UsageError: pyarrow or distributed is not installed, or no scheduler answers.
    """
    batches = [[str(file) for file in files[at : at + _BATCH]] for at in range(0, len(files), _BATCH)]
    found: dict[tuple[str, str, float | None], FleetRun] = {}
    damage: list[str] = []
    done = 0
    for part in _local(batches) if dask is None else _on_dask(dask, batches):
        found |= {(each.project, each.run, each.started): each for each in part.runs}
        damage += part.damage
        done += _BATCH
        if progress is not None:
            progress(min(done, len(files)), len(files))

    return SummarizedFiles(sorted(found.values(), key=lambda run: (run.started or 0.0, run.run)), damage)


def _local(batches: Sequence[list[str]]) -> Iterator[SummarizedFiles]:
    with ThreadPoolExecutor(min(len(batches), os.cpu_count() or 1) or 1) as threads:
        yield from threads.map(summarize_files, batches)


def _on_dask(address: str, batches: Sequence[list[str]]) -> Iterator[SummarizedFiles]:
    from traceml.traces.query.cluster import dask_client

    with dask_client(address) as client:
        for future in [client.submit(summarize_files, batch, pure=False) for batch in batches]:
            yield future.result()


def summarize_files(paths: Sequence[str]) -> SummarizedFiles:
    """Return the runs in some files; a file that cannot be read is reported, and skipped."""
    pa = parquet_library("the fleet's dataset")
    runs: list[FleetRun] = []
    damage: list[str] = []
    for path in paths:
        try:
            table = pa.parquet.ParquetFile(path).read(columns=list(_COLUMNS), use_threads=False)
            if empty := [name for name in _NEVER_NULL if table[name].null_count]:
                raise ValueError(f"values are missing: {', '.join(empty)}")

            runs += _runs_of(table, *partition_of(Path(path)))
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
            damage.append(f"{path}: {error}")

    return SummarizedFiles(runs, damage)


def _runs_of(table: Any, project: str, month: str) -> Iterator[FleetRun]:
    """Yield the runs of a table; a file that another program has rewritten may hold many, also of the same id."""
    ids, starts = (np.unique(table[name].to_numpy(), return_inverse=True)[1] for name in ("run", "started_epoch_s"))
    _, first, number = np.unique(ids * (len(starts) + 1) + starts, return_index=True, return_inverse=True)
    facts = table.select(list(_FACTS)).take(first).to_pylist()
    order = np.argsort(number, kind="stable")
    ends = np.bincount(number).cumsum()[:-1]
    columns = [np.split(table[name].to_numpy()[order], ends) for name in ("host", "rank", "phase", "mean_ms")]
    for each, *of_run in zip(facts, *columns, strict=False):
        phases, cells, ranks, hosts = _matrix(*of_run)
        started = each.pop("started_epoch_s")
        yield FleetRun(
            **each,
            project=project,
            month=month,
            started=started,
            phases=dict(zip(phases, cells.mean(axis=0).tolist(), strict=True)),
            hosts=_hosts(phases, cells, ranks, hosts),
        )


def _matrix(
    hosts: NDArray[Any], ranks: NDArray[Any], phases: NDArray[Any], mean_ms: NDArray[Any]
) -> tuple[list[str], NDArray[np.float64], NDArray[Any], NDArray[Any]]:
    """Return the names of the phases, milliseconds by rank and phase, the ranks, and the host of each."""
    names, column = np.unique(phases, return_inverse=True)
    numbers, first, row = np.unique(ranks, return_index=True, return_inverse=True)
    cells = np.zeros((len(numbers), len(names)))
    cells[row, column] = mean_ms
    return [str(name) for name in names], cells, numbers, hosts[first]


def _hosts(
    phases: list[str], cells: NDArray[np.float64], ranks: NDArray[Any], hosts: NDArray[Any]
) -> tuple[HostWork, ...]:
    own = [at for at, name in enumerate(phases) if name != WAITING]
    work = cells[:, own].sum(axis=1)
    of_host: dict[str, list[int]] = {}
    for row in np.flatnonzero(ranks != 0).tolist():
        if host := str(hosts[row]):
            of_host.setdefault(host, []).append(row)

    found = []
    for host, rows in of_host.items():
        slowest = max(rows, key=lambda row: float(work[row]))
        by_phase = {phases[at]: float(cells[slowest, at]) for at in own}
        found.append(HostWork(host, float(work[slowest]), by_phase, len(rows)))

    return tuple(found)
