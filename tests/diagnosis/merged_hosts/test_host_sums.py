"""Sums of hosts: those of all rows, and small."""

from __future__ import annotations

from pathlib import Path

import msgpack
import numpy as np
import pytest

from tests.diagnosis.merged_hosts.clusters import Cluster, any_run
from traceml.database.schema import NAMES, STEPS, USER_PHASES
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.database.store.summaries import StepSums, sum_rows
from traceml.diagnosis.facts.run_time import SET_UP_STEPS
from traceml.diagnosis.merged_hosts.host_sums import HostSums

CLUSTER = Cluster(ranks=16, per_host=4)


def stored(path: Path, rows, ranks) -> StoreReader:
    """Return a host's store: each rank has a user phase `mine`, with a number of its own."""
    with StoreWriter(path) as store:
        for rank in ranks:
            stream = store.stream(StreamIdentity(rank, 0, "host", 1, rank, str(rank)))
            number = rank % 3
            store.append(stream, NAMES.name, 0, 1, msgpack.packb({"id": number, "name": "mine"}), -1, -1)
            for first in range(0, len(rows[rank]), 10):
                part = rows[rank][first : first + 10]
                data = part.tobytes()
                store.append(stream, STEPS.name, first, len(part), data, int(part["step"][0]), int(part["step"][-1]))
                user = np.zeros(len(part), USER_PHASES.dtype)
                user["step"], user["name_id"], user["ns"] = part["step"], number, 1000 + rank
                store.append(
                    stream,
                    USER_PHASES.name,
                    first,
                    len(user),
                    user.tobytes(),
                    int(part["step"][0]),
                    int(part["step"][-1]),
                )

            store.commit()

    return StoreReader(path)


@pytest.mark.parametrize(("seed", "before"), [*((seed, 0) for seed in range(5)), (5, 7_000)])
def test_the_sums_of_hosts_add_up_to_those_of_all_rows(seed: int, before: int, tmp_path: Path) -> None:
    """Bin by bin, with the histogram of step times, also of the first steps alone, from a checkpoint on, too."""
    run = any_run(CLUSTER, seed)
    for rows in run.rows:
        rows["step"] += before

    hosts = []
    for first in range(0, CLUSTER.ranks, CLUSTER.per_host):
        ranks = range(first, first + CLUSTER.per_host)
        with stored(tmp_path / f"{first}.store", run.rows, ranks) as reader:
            read = HostSums.read(reader, {stream.id: stream.rank for stream in reader.streams()})
            hosts.append(HostSums.from_row(msgpack.unpackb(msgpack.packb(read.to_row()))))

    every = np.concatenate(run.rows)
    for rows, found in (
        (every, StepSums.of({}).join(*(host.steps for host in hosts))),
        (every[every["step"] < before + SET_UP_STEPS], StepSums.of({}).join(*(host.set_up for host in hosts))),
    ):
        exact = sum_rows(STEPS.name, rows)[0].widened(found.steps.width)
        assert found.steps.bins.tolist() == exact.bins.tolist()
        assert found.steps.levels.tolist() == exact.levels.tolist()
        assert found.count == len(rows)

    assert sorted(rank for host in hosts for rank in host.ranks) == list(range(CLUSTER.ranks))
    for host in hosts:
        assert list(host.names.values()) == ["mine"]
        assert host.steps.user_phases.bins["ns"].sum() == sum(
            len(run.rows[rank]) * (1000 + rank) for rank in host.ranks
        )


@pytest.mark.parametrize("row", [None, 3, [], [[0], {}, {}], [[0], {"steps": "!"}, {}, []], [["a"], {}, {}, []]])
def test_what_are_no_sums_is_refused(row: object) -> None:
    """The error says so."""
    with pytest.raises(ValueError, match="the sums of a host cannot be read"):
        HostSums.from_row(row)
