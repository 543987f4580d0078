"""A run as tables."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.runs.export.exported import BOOT_NS, STEPS, S, rich_run
from traceml.database.schema import GPU, METRICS
from traceml.database.store.store import StoreWriter
from traceml.errors import UsageError
from traceml.run_folder import STORE_NAME
from traceml.runs.export.exporter import export_run
from traceml.runs.export.table_columns import TABLES
from traceml.runs.run import Run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return rich_run(tmp_path_factory.mktemp("runs") / "rich")


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_table_is_a_file(run_dir, tmp_path):
    """Each documented table is there with its documented columns, in both formats, with the same rows."""
    export_run(run_dir, "parquet", tmp_path / "p")
    export_run(run_dir, "csv", tmp_path / "c")

    assert {path.name for path in (tmp_path / "p").iterdir()} == {f"{name}.parquet" for name in TABLES}
    for name, table in TABLES.items():
        rows = pq.read_table(tmp_path / "p" / f"{name}.parquet")
        plain = read_csv(tmp_path / "c" / f"{name}.csv")
        assert [(field.name, str(field.type).replace("double", "float64")) for field in rows.schema] == [
            (column.name, column.kind) for column in table.columns
        ]
        assert len(plain) == rows.num_rows > 0, name
        for ours, text in zip(rows.to_pylist(), plain, strict=True):
            assert {key: "" if value is None else str(value) for key, value in ours.items()} == text


def test_steps_are_those_of_the_run(run_dir, tmp_path):
    """Phases and `other_ns` add up, missing values are null, and timestamps are dates on one time line."""
    export_run(run_dir, "parquet", tmp_path / "p")
    steps = pq.read_table(tmp_path / "p" / "steps.parquet").to_pandas()
    ours = Run(run_dir).steps()

    assert len(steps) == 2 * STEPS
    for name in ("total_ns", "forward_ns", "other_ns", "micro_batches", "flags"):
        assert steps.sort_values(["rank", "step"])[name].tolist() == ours[name].tolist(), name

    assert steps["backward_own_ns"].isna().sum() == (ours["backward_own_ns"] < 0).sum() > 0
    last = steps[steps["step"] == STEPS - 1]["end_epoch_ns"].tolist()
    assert abs(last[0] - last[1]) < S // 10
    assert last[0] > BOOT_NS


def test_a_negative_number_that_means_unknown_is_null(tmp_path):
    """A logged value and its step may be negative; a figure that a device does not offer is -1 in the store."""
    run_dir = rich_run(tmp_path / "rich")
    with StoreWriter(run_dir / STORE_NAME) as writer:
        gpu, metric = np.zeros(1, GPU.dtype), np.zeros(1, METRICS.dtype)
        gpu["power_w"], gpu["sm_clock_mhz"], gpu["temperature_c"], metric["value"] = -1.0, -1, 40.0, -2.5
        metric["step"] = -5
        for table, row in ((GPU, gpu), (METRICS, metric)):
            writer.append(1, table.name, writer.next_seq(1, table.name), 1, row.tobytes())

    export_run(run_dir, "parquet", tmp_path / "p")
    last = pq.read_table(tmp_path / "p" / "gpu.parquet").to_pylist()[-1]
    values = pq.read_table(tmp_path / "p" / "metrics.parquet").to_pylist()

    assert (last["power_w"], last["sm_clock_mhz"], last["temperature_c"]) == (None, None, 40.0)
    assert (-5, -2.5) in [(row["step"], row["value"]) for row in values]


def test_names_are_resolved(run_dir, tmp_path):
    """Metrics and user phases have their names and sources."""
    export_run(run_dir, "parquet", tmp_path / "p")
    metrics = pq.read_table(tmp_path / "p" / "metrics.parquet").to_pylist()
    phases = pq.read_table(tmp_path / "p" / "user_phases.parquet").to_pylist()

    assert [(row["rank"], row["name"], row["step"], row["source"]) for row in metrics[:3]] == [
        (0, "loss", 0, "user"), (0, "grad", 1, "user"), (0, "loss", 2, "user"),
    ]  # fmt: skip
    assert np.isnan(metrics[1]["value"])
    assert metrics[3]["time_epoch_ns"] == BOOT_NS
    assert {row["name"] for row in phases} == {"augment"}


def test_an_earlier_export_is_replaced(run_dir, tmp_path):
    """Other files in the folder are kept, and no draft is left."""
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for _ in range(2):
        export_run(run_dir, "csv", folder)

    assert {path.name for path in folder.iterdir()} == {"notes.txt", *(f"{name}.csv" for name in TABLES)}


def test_a_file_in_the_way_is_reported(run_dir, tmp_path):
    (tmp_path / "c").write_text("")

    with pytest.raises(UsageError, match="is a file"):
        export_run(run_dir, "csv", tmp_path / "c")


def test_parquet_without_pyarrow_says_how_to_get_it(run_dir, tmp_path, monkeypatch):
    """The error names the extra, and the format without requirements."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"traceml-torch\[parquet\].*--format csv"):
        export_run(run_dir, "parquet", tmp_path / "p")

    assert not (tmp_path / "p").exists()
    assert export_run(run_dir, "csv", tmp_path / "c").rows > 0
