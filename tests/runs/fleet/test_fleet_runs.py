"""Runs as they are read from the dataset."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dask_programs import dask_programs
from tests.runs.fleet.fabricated_fleet import PHASES_MS, fleet_report
from traceml.errors import UsageError
from traceml.runs.fleet.fleet_dataset import FleetDataset
from traceml.runs.fleet.fleet_runs import FLEET_FIELDS, read_runs
from traceml.runs.run_query import select_runs


@pytest.fixture
def dataset(tmp_path):
    """Three runs, the newest written first."""
    made = FleetDataset(tmp_path / "fleet")
    for number in (2, 1, 0):
        made.add(fleet_report(number, ["a", "b", "c"], slow={"b": 1.5}))

    return made


def test_a_run_has_its_phases_and_the_work_of_its_hosts(dataset):
    """Work is that of the slowest rank, without waiting; rank 0 is left out, so its host has one rank."""
    runs = read_runs(dataset.files()).runs

    assert [run.run for run in runs] == ["run-0000", "run-0001", "run-0002"]
    assert runs[0].phases == pytest.approx({**PHASES_MS, "forward": 30 * (1 + 1.5 + 1) / 3})
    assert {host.host: host.work_ms for host in runs[0].hosts} == pytest.approx({"a": 100, "b": 115, "c": 100})
    assert runs[0].hosts[0].phases.keys() == PHASES_MS.keys() - {"comm"}
    assert (runs[0].project, runs[0].month, runs[0].script) == ("vision", "2025-10", "train.py")


def test_a_host_with_rank_0_alone_is_not_judged(tmp_path):
    """Rank 0 has more to do: it logs and saves."""
    dataset = FleetDataset(tmp_path)
    dataset.add(fleet_report(0, ["a", "b", "c"], ranks_per_host=1))

    assert [host.host for host in read_runs(dataset.files()).runs[0].hosts] == ["b", "c"]


def test_a_file_of_many_runs_is_read_as_well(dataset):
    """Other programs may rewrite a month as one file; runs of the same id stay apart."""
    dataset.add(fleet_report(3, ["a"], id="run-0002"))
    before = read_runs(dataset.files()).runs
    files = dataset.files()
    whole = pa.concat_tables([pq.ParquetFile(file).read() for file in files])
    for file in files:
        file.unlink()

    pq.write_table(whole, files[0].with_name("part-0.parquet"))
    assert read_runs(dataset.files()).runs == before


def test_a_damaged_file_is_reported_and_skipped(dataset):
    """Also one of another program."""
    dataset.add(fleet_report(3))
    *files, last = dataset.files()
    files[0].write_bytes(b"PAR1 no more")
    pq.write_table(pa.table({"x": [1]}), files[1])
    rows = pq.ParquetFile(last).read()
    pq.write_table(rows.set_column(rows.column_names.index("steps"), "steps", pa.nulls(len(rows), pa.int64())), last)
    (message,) = read_runs([last]).damage
    assert message.endswith("values are missing: steps")

    read = read_runs(files)
    assert [run.run for run in read.runs] == ["run-0002"]
    assert [str(file) in message for file, message in zip(files[:2], read.damage, strict=True)] == [True, True]


def test_conditions_choose_runs(dataset):
    """By the names of the fields; an unknown one is an error that lists them."""
    runs = read_runs(dataset.files()).runs

    assert len(select_runs(runs, "project=vision hosts~b ranks>=6 train")) == 3
    assert [run.run for run in select_runs(runs, "id~0001")] == ["run-0001"]
    assert select_runs(runs, "tag:baseline") == []
    with pytest.raises(UsageError, match=r"no run of the dataset has a field 'lr'. Fields: id, ranks"):
        select_runs(runs, "lr<1")
    assert all(runs[0].has(name) for name in FLEET_FIELDS)


@pytest.mark.process
def test_dask_reads_the_same(dataset, tmp_path):
    """Workers of a cluster return the runs as threads do."""
    from distributed import Client  # 0.2 s of CPU in each worker that collects this file

    with dask_programs(tmp_path, workers=2) as address, Client(address) as client:
        client.wait_for_workers(2, timeout=240)
        assert read_runs(dataset.files(), dask=address) == read_runs(dataset.files())
