"""Traces and layouts that are damaged, incomplete, or do not fit together."""

from __future__ import annotations

import re

import pyarrow
import pyarrow.parquet
import pytest

from tests.whatif.generated_job import GeneratedJob
from traceml.errors import TraceEmptyError, TraceInvalidError, TraceNotFoundError
from traceml.whatif.simulation import Simulator
from traceml.whatif.straggler_cost import explain_job
from traceml.whatif.trace_loading import layout_differences, load_job, unknown_kinds


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
    with pytest.raises(TraceInvalidError, match="has no column gmc"):
        load_job(trace, meta)


def test_a_layout_without_a_size_is_named(job, tmp_path):
    """Not taken for 1, and then blamed on the trace."""
    trace, meta = job.write(tmp_path)
    meta.write_text("".join(line for line in meta.read_text().splitlines(keepends=True) if "dp_size" not in line))
    with pytest.raises(TraceInvalidError, match=r"has no dp_size: add the sizes"):
        load_job(trace, meta)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("duration", -0.5, "duration of row 7 is -0.5, expected seconds, 0 or more"),
        ("duration", float("nan"), "duration of row 7 is nan, expected seconds"),
        ("duration", None, "duration of row 7 is missing, expected seconds"),
        ("start_ts", float("inf"), "start_ts of row 7 is inf, expected a time"),
        ("optype", None, "optype of row 7 is missing, expected a kind of operation"),
        ("step", None, "step of row 7 is missing, expected an integer"),
        ("seq_id", 1.5, "seq_id of row 7 is 1.5, expected an integer"),
        ("seq_id", 1e300, "seq_id of row 7 is 1e+300, expected an integer"),
    ],
)
def test_a_wrong_value_is_refused_with_its_column_and_row(job, tmp_path, column, value, message):
    """It would make a step shorter, or an operation would wait for nothing."""
    trace, meta = job.write(tmp_path)
    kind = float if column == "seq_id" else lambda each: each
    rows = [row | {column: kind(row[column])} for row in job.rows]
    rows[7][column] = value
    write(rows, trace)
    with pytest.raises(TraceInvalidError, match=re.escape(f"{trace}: {message}")):
        load_job(trace, meta)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("duration", "0.5", "duration of row 0 is '0.5', expected a number, not string"),
        ("step", "first", "step of row 0 is 'first', expected a number, not string"),
        ("duration", True, "duration of row 0 is True, expected a number, not bool"),
    ],
)
def test_a_column_of_another_type_is_refused(job, tmp_path, column, value, message):
    trace, meta = job.write(tmp_path)
    write([row | {column: value} for row in job.rows], trace)
    with pytest.raises(TraceInvalidError, match=re.escape(message)):
        load_job(trace, meta)


def test_a_chunk_without_a_value_is_none(job, tmp_path):
    """Tables with missing integers are often stored as decimal numbers."""
    trace, meta = job.write(tmp_path)
    write([row | {"gmc": None if row["gmc"] == -1 else float(row["gmc"])} for row in job.rows], trace)
    assert {each.global_chunk for each in load_job(trace, meta).operations} == {-1, *range(4)}


@pytest.mark.parametrize(
    ("size", "differences"),
    [
        ("", []),
        ("world_size: 9\n", ["world_size 9, but its sizes give 8 ranks; the result does not depend on"]),
        ("vpp_size: 2\n", ["vpp_size 2, but workers of the trace have 1 chunks; these count"]),
    ],
)
def test_a_layout_that_differs_is_told(job, tmp_path, size, differences):
    trace, meta = job.write(tmp_path)
    meta.write_text(f"dp_size: 2\npp_size: 4\n{size}")
    told = layout_differences(load_job(trace, meta))
    assert [text[: len(expected)] for text, expected in zip(told, differences, strict=True)] == differences


def test_operations_of_an_unknown_kind_delay_no_others(job, tmp_path):
    """Traces of later versions have some, as `first-op`: the other ones give the same slowdown."""
    trace, meta = job.write(tmp_path)
    slowdown = explain_job(Simulator(load_job(trace, meta))).slowdown
    write([*job.rows, *(row | {"optype": "first-op"} for row in job.rows if row["optype"] == "optimizer")], trace)

    loaded = load_job(trace, meta)

    assert unknown_kinds(loaded) == ["first-op"]
    assert explain_job(Simulator(loaded)).slowdown == slowdown


def test_two_workers_of_one_place(job, tmp_path):
    trace, meta = job.write(tmp_path)
    write([*job.rows, job.rows[-1]], trace)
    with pytest.raises(TraceInvalidError, match="more than once in a step"):
        load_job(trace, meta)


def test_empty_trace(job, tmp_path):
    trace, meta = job.write(tmp_path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(job.rows).slice(0, 0), trace)
    with pytest.raises(TraceEmptyError, match="no operation"):
        load_job(trace, meta)


def test_files_that_are_something_else(job, tmp_path):
    trace, meta = job.write(tmp_path)
    with pytest.raises(TraceInvalidError, match="not a Parquet file"):
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
    with pytest.raises(TraceInvalidError, match=message):
        load_job(trace, meta)


def test_transfers_that_do_not_match(job, tmp_path):
    """A stage in the middle that lacks a receive is refused with the numbers."""
    trace, meta = job.write(tmp_path)
    write([row for row in job.rows if (row["optype"], row["stage"], row["seq_id"]) != ("forward-recv", 1, 7)], trace)
    with pytest.raises(TraceInvalidError, match="stage 1 has 7 forward-recv for 8 forward-compute"):
        explain_job(Simulator(load_job(trace, meta)))


@pytest.mark.parametrize(
    ("drops", "message"),
    [
        (lambda row: row["optype"].endswith(("send", "recv")), "stage 0 has no forward-send, but 8 forward-compute"),
        (lambda row: row["optype"].endswith("recv"), "has no (forward|backward)-recv, but 8 "),
        (lambda row: row["optype"] == "backward-compute", "stage 0 has no backward-compute"),
    ],
    ids=["transfers", "receives", "backward"],
)
def test_a_job_without_a_kind_of_operation_is_refused(job, tmp_path, drops, message):
    """Its stages would not wait for each other, and the slowdown would be another one."""
    trace, meta = job.write(tmp_path)
    write([row for row in job.rows if not drops(row)], trace)
    with pytest.raises(TraceInvalidError, match=message):
        explain_job(Simulator(load_job(trace, meta)))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mc": -1}, "mc -1 and gmc 0"), ({"gmc": -1}, "mc 0 and gmc -1"), ({"gmc": 99}, "mc 0 and gmc 99")],
)
def test_computations_without_a_chunk_are_refused(job, tmp_path, change, message):
    """Nothing says then which stage they send to."""
    trace, meta = job.write(tmp_path)
    write([row | (change if row["optype"].endswith("compute") else {}) for row in job.rows], trace)
    with pytest.raises(TraceInvalidError, match=f"-compute 0 of stage 0 has {message}: expected the model chunk"):
        explain_job(Simulator(load_job(trace, meta)))


def test_operations_without_time(job, tmp_path):
    trace, meta = job.write(tmp_path)
    write([row | {"duration": 0.0, "start_ts": 1.0 * at} for at, row in enumerate(job.rows)], trace)
    with pytest.raises(TraceEmptyError, match="durations are 0"):
        explain_job(Simulator(load_job(trace, meta)))


def test_a_damaged_file_is_named(job, tmp_path):
    trace, meta = job.write(tmp_path)
    content = trace.read_bytes()
    trace.write_bytes(content[:4] + bytes(500) + content[504:])
    with pytest.raises(TraceInvalidError, match=re.escape(f"{trace} is not a Parquet file")):
        load_job(trace, meta)
