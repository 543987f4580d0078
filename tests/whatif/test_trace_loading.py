"""Traces and layouts that are damaged, incomplete, or do not fit together."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest

from tests.whatif.generated_job import GeneratedJob
from traceml.errors import TraceEmptyError, TraceNotFoundError, UsageError
from traceml.whatif.simulation import Simulator
from traceml.whatif.straggler_cost import explain_job
from traceml.whatif.trace_loading import load_job


@pytest.fixture
def job():
    return GeneratedJob(steps=4).run()


def write(rows, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_steps_with_other_operations_are_left_out(job, tmp_path):
    trace, meta = job.write(tmp_path)
    whole = explain_job(Simulator(load_job(trace, meta)))
    rows = [row for row in job.rows if not (row["step"] == 17 and row["dp_rank"] == 1 and row["seq_id"] == 3)]
    write(rows, trace)
    result = explain_job(Simulator(load_job(trace, meta)))

    assert (result.steps, result.steps_left_out) == (3, 1)
    assert result.slowdown == pytest.approx(whole.slowdown)


def test_no_complete_step(job, tmp_path):
    trace, meta = job.write(tmp_path)
    write([row for row in job.rows if not (row["dp_rank"] == 1 and row["seq_id"] == 3)], trace)
    with pytest.raises(TraceEmptyError, match="no step in which every"):
        load_job(trace, meta)


def test_missing_column(job, tmp_path):
    trace, meta = job.write(tmp_path)
    write([{name: value for name, value in row.items() if name != "gmc"} for row in job.rows], trace)
    with pytest.raises(UsageError, match="has no column gmc"):
        load_job(trace, meta)


def test_a_layout_without_a_size_is_named(job, tmp_path):
    """Not taken for 1, and then blamed on the trace."""
    trace, meta = job.write(tmp_path)
    meta.write_text("".join(line for line in meta.read_text().splitlines(keepends=True) if "dp_size" not in line))
    with pytest.raises(UsageError, match=r"has no dp_size: add the sizes"):
        load_job(trace, meta)


def test_a_negative_duration_is_refused_with_its_row(job, tmp_path):
    """It would make a step shorter."""
    trace, meta = job.write(tmp_path)
    write([row | {"duration": -0.5} if number == 7 else row for number, row in enumerate(job.rows)], trace)
    with pytest.raises(UsageError, match=r"row 7 has a duration of -0\.5 s"):
        load_job(trace, meta)


def test_two_workers_of_one_place(job, tmp_path):
    trace, meta = job.write(tmp_path)
    write([*job.rows, job.rows[-1]], trace)
    with pytest.raises(UsageError, match="more than once in a step"):
        load_job(trace, meta)


def test_empty_trace(job, tmp_path):
    trace, meta = job.write(tmp_path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(job.rows).slice(0, 0), trace)
    with pytest.raises(TraceEmptyError, match="no operation"):
        load_job(trace, meta)


def test_times_that_are_not_numbers(job, tmp_path):
    trace, meta = job.write(tmp_path)
    write([{**row, "duration": float("nan")} for row in job.rows], trace)
    with pytest.raises(UsageError, match="without a start or a duration"):
        load_job(trace, meta)

    write([{**row, "step": "first"} for row in job.rows], trace)
    with pytest.raises(UsageError, match="column step does not consist of numbers"):
        load_job(trace, meta)


def test_files_that_are_something_else(job, tmp_path):
    trace, meta = job.write(tmp_path)
    with pytest.raises(UsageError, match="not a Parquet file"):
        load_job(meta, meta)

    with pytest.raises(TraceNotFoundError, match="no file"):
        load_job(tmp_path / "none.parquet", meta)

    with pytest.raises(TraceNotFoundError, match="--meta is the YAML file"):
        load_job(trace, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp_size: 3\npp_size: 4\n", "says dp_size 3 and pp_size 4"),
        ("dp_size: two\n", "dp_size is 'two', expected a positive integer"),
        ("- 1\n", "has no fields"),
        ("a: [1\n", "is not YAML"),
    ],
)
def test_layouts_that_do_not_fit(job, tmp_path, text, message):
    trace, meta = job.write(tmp_path)
    meta.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_job(trace, meta)


def test_transfers_that_do_not_match(job, tmp_path):
    """A stage in the middle that lacks a receive is refused with the numbers."""
    trace, meta = job.write(tmp_path)
    write([row for row in job.rows if (row["optype"], row["stage"], row["seq_id"]) != ("forward-recv", 1, 7)], trace)
    with pytest.raises(UsageError, match="stage 1 has 7 forward-recv for 8 forward-compute"):
        explain_job(Simulator(load_job(trace, meta)))
