"""The fleet's dataset: rows, partitions, updates, and other programs that read it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pyarrow.dataset
import pyarrow.parquet
import pytest

from tests.diagnosis.fabricated import Job
from tests.runs.fabricated_store import store_run
from tests.runs.fleet.fabricated_fleet import PHASES_MS, fleet_report
from traceml.errors import StoreError, TraceMLError
from traceml.runs.fleet import fleet_dataset
from traceml.runs.fleet.fleet_dataset import FleetDataset, partition_of
from traceml.runs.fleet.fleet_rows import COLUMNS, script_of
from traceml.runs.report.report import build_report, save_report

PAGE = Path(__file__).parents[3] / "docs" / "fleet.md"


@pytest.fixture
def dataset(tmp_path):
    return FleetDataset(tmp_path / "fleet")


def test_the_file_of_a_run_has_its_id_as_it_is_but_for_marks(dataset):
    """The longest id of another language fits; of ours only what a folder's name would take for a partition changes."""
    report = fleet_report(0, ["a", "b"])
    report.run.id = "学" * 60 + "=1"

    assert dataset.add(report).name == "学" * 60 + "%3D1-1760000000.parquet"


def test_a_run_has_a_row_for_each_host_rank_and_phase(dataset):
    """In a folder by project and month, with the facts of the run in each row."""
    path = dataset.add(fleet_report(0, ["a", "b"]))

    assert path == dataset.folder / "project=vision" / "month=2025-10" / "run-0000-1760000000.parquet"
    rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    assert {(row["host"], row["rank"], row["phase"]) for row in rows} == {
        (host, rank, phase) for rank, host in enumerate("aabb") for phase in PHASES_MS
    }
    facts = {name: rows[0][name] for name in ("run", "script", "model", "device", "batch_size", "world_size", "steps")}
    assert facts == {
        "run": "run-0000", "script": "train.py", "model": "ResNet", "device": "cuda", "batch_size": 32,
        "world_size": 4, "steps": 500,
    }  # fmt: skip


def test_the_columns_are_those_of_the_page(dataset):
    """docs/fleet.md lists each with its type and meaning."""
    schema = pyarrow.parquet.read_schema(dataset.add(fleet_report(0)))

    assert schema.names == [column.name for column in COLUMNS]
    rows = [f"| `{each.name}` | {each.kind} | {each.doc} |" for each in COLUMNS]
    assert [row for row in rows if row not in PAGE.read_text()] == []


def test_other_programs_read_it_by_partition(dataset):
    """pyarrow and polars, as DuckDB, Spark and Dask, take the project and the month from the folders."""
    import polars  # 0.2 s of CPU in each worker that collects this file

    for number, project in enumerate(("vision", "nlp/ü", "nlp/ü")):
        dataset.add(fleet_report(40 * number, project=project))

    found = pyarrow.dataset.dataset(dataset.folder, partitioning="hive", exclude_invalid_files=True).to_table()
    assert set(found["project"].to_pylist()) == {"vision", "nlp/ü"}
    scanned = polars.scan_parquet(dataset.folder / "**/*.parquet", hive_partitioning=True)
    counts = scanned.group_by("month").agg(polars.col("run").n_unique()).collect()
    assert dict(counts.rows()) == {"2025-10": 1, "2025-11": 1, "2025-12": 1}


def test_the_partition_of_a_file_is_its_project_and_month(dataset):
    """A project may have any name."""
    path = dataset.add(fleet_report(0, project="a/b=c ü"))

    assert partition_of(path) == ("a/b=c ü", "2025-10")


def test_runs_of_the_same_id_do_not_replace_each_other(dataset):
    """Ids that people choose repeat; the same run, written again, replaces itself."""
    for number in (0, 1, 1):
        dataset.add(fleet_report(number, id="mine"))

    assert len(dataset.files()) == 2


def test_a_run_without_steps_has_no_file(dataset):
    """It would have no rows."""
    report = fleet_report(0)
    report.phases = []

    assert dataset.add(report) is None
    assert dataset.files() == []


@pytest.mark.process
def test_writers_do_not_disturb_each_other_or_a_reader(dataset):
    """Four processes write the same runs over and over; every file that is seen is whole, and no draft is left."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(dataset, 20)) for _ in range(4)]
    for writer in writers:
        writer.start()

    while any(writer.is_alive() for writer in writers):
        for path in dataset.files():
            assert pyarrow.parquet.ParquetFile(path).metadata.num_rows == 2 * len(PHASES_MS)

    assert [(writer.join(), writer.exitcode) for writer in writers] == [(None, 0)] * 4
    assert sorted(dataset.folder.rglob("*.parquet*")) == dataset.files()
    assert len(dataset.files()) == 3


def _write(dataset, times):
    for number in range(times):
        dataset.add(fleet_report(number % 3))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    """It names the file and the setting."""
    (tmp_path / "fleet").write_text("a file")

    with pytest.raises(TraceMLError, match=r"cannot write .*the setting fleet_dir"):
        FleetDataset(tmp_path / "fleet").add(fleet_report(0))


@pytest.fixture
def runs(tmp_path):
    """A run with a report, one with a pipe in its place, one that runs, one without steps, and a damaged one."""
    folder = tmp_path / "runs"
    store_run(folder / "reported", Job(steps=60))
    save_report(folder / "reported", build_report(folder / "reported"))
    store_run(folder / "stored", Job(steps=60))
    os.mkfifo(folder / "stored" / "report.json")
    store_run(folder / "running", Job(steps=60), facts={"state": "running", "ended": None})
    store_run(folder / "empty", Job(steps=0))
    (folder / "damaged").mkdir()
    (folder / "damaged" / "report.json").write_text("{")
    return folder


def test_an_update_adds_ended_runs_once(dataset, runs, monkeypatch):
    """Each is counted by what became of it; a report that was written again is taken again.

    Of a run that has none, as its aggregator was killed, the store's time counts.
    """
    done = dataset.update(runs)
    assert (done.added, done.known, done.without_steps) == (2, 0, 1)
    assert len(done.damage) == 1
    assert "damaged" in done.damage[0]
    assert {path.name.rpartition("-")[0] for path in dataset.files()} == {"reported", "stored"}

    save_report(runs / "empty", build_report(runs / "empty"))
    with monkeypatch.context() as patch:
        patch.setattr(fleet_dataset, "written_report", unreadable)
        done = dataset.update(runs)

    assert (done.added, done.known, done.without_steps, len(done.damage)) == (0, 2, 1, 1)
    newer = dataset.path_of(build_report(runs / "reported").run).stat().st_mtime_ns + 10**9
    os.utime(runs / "reported" / "report.json", ns=(newer, newer))
    os.utime(runs / "stored" / "store.db", ns=(newer, newer))
    assert dataset.update(runs).known == 0


def unreadable(run_dir: Path) -> None:
    raise StoreError(str(run_dir))


def test_a_run_of_merged_hosts_is_added_by_its_center(dataset, runs):
    """Each host has its part as a run of its own: the job would be there once per host, beside the whole."""
    (runs / "stored" / "upstream.json").write_text("{}")

    done = dataset.update(runs)

    assert (done.added, done.relayed) == (1, 1)
    assert [path.name.rpartition("-")[0] for path in dataset.files()] == ["reported"]


@pytest.mark.parametrize(
    ("command", "script"),
    [
        ("/a/b/train.py --config -m", "train.py"),
        (["python", "-u", "/a/main.py", "x.py"], "main.py"),
        ("traceml launch --hostnames a,b -m pkg.train --lr 1", "pkg.train"),
        ("/opt/bin/finetune --x -m 3", "finetune"),
        ("train.py 'cut off", "train.py"),
        ("", ""),
    ],
)
def test_the_script_is_known_by_its_name(command, script):
    """The folder and the arguments may differ between runs of the same script."""
    assert script_of(command) == script
