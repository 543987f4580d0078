"""Sums of rows: exact however the rows are split, of constant size, and stored."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from traceml.database.schema import (
    DEVICE_STEPS,
    GPU,
    HOST,
    PHASE_COLUMNS,
    PROCESS,
    SAMPLED_TABLES,
    STEPS,
    USER_PHASES,
    Log,
    StepFlag,
    Table,
    pack_bits,
)
from traceml.database.store.summaries import (
    LEVELS,
    MAX_BINS,
    STEP_TABLES,
    StepSums,
    TableSums,
    level_middle_ns,
    level_of,
    sum_rows,
)

RANDOM = np.random.default_rng(7)


def random_rows(table: Table | Log, count: int, first: int = 0) -> NDArray[np.void]:
    """Return rows as a rank appends them: steps grow, some values are missing."""
    assert isinstance(table, Table)
    rows = np.zeros(count, table.dtype)
    for name in table.names:
        rows[name] = RANDOM.integers(0, 10**9, count)
    for name in {"step", "t_ns", "t_end_ns"} & set(table.names):
        rows[name] = first + np.cumsum(RANDOM.integers(0 if table is USER_PHASES else 1, 3, count))
    for name in {"name_id", "index", "device", "resource", "first", "loader"} & set(table.names):
        rows[name] = RANDOM.integers(0, 3, count)
    if "backward_own_ns" in table.names:
        rows["backward_own_ns"][RANDOM.random(count) < 0.5] = -1
    if "bits" in table.names:
        rows["bits"] = RANDOM.choice([pack_bits(1, 0, 9), pack_bits(1, StepFlag.DEVICE, 9)], count)
    if table is GPU:
        rows["power_w"][RANDOM.random(count) < 0.3] = np.nan

    return rows


def sums_of(table: Table, rows: NDArray[np.void]) -> TableSums:
    return sum_rows(table.name, rows).get(0, TableSums.empty(table))


def assert_same(got: TableSums, wanted: TableSums) -> None:
    assert (got.table, got.width) == (wanted.table, wanted.width)
    assert got.bins.dtype == wanted.bins.dtype
    assert got.levels.tolist() == wanted.levels.tolist()
    for name in wanted.bins.dtype.names or ():
        np.testing.assert_allclose(got.bins[name], wanted.bins[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("table", [*STEP_TABLES, *SAMPLED_TABLES], ids=lambda table: table.name)
@pytest.mark.parametrize("count", [1, 50, 3_000])
def test_sums_do_not_depend_on_how_rows_are_split(table: Table, count: int) -> None:
    """Joining the sums of parts, in any order, gives the sums of all rows; there are never more than 64 bins."""
    rows = random_rows(table, count, first=int(RANDOM.integers(0, 100_000)))
    whole = sums_of(table, rows)
    cuts = np.sort(RANDOM.integers(0, count, 7))
    parts = [sums_of(table, part) for part in np.split(rows, cuts)]
    RANDOM.shuffle(parts)

    assert_same(parts[0].join(*parts[1:]), whole)
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = one_by_one.join(part)

    assert_same(one_by_one, whole)
    assert whole.rows == count
    assert whole.bins["bin"].max() - whole.bins["bin"].min() < MAX_BINS


def test_sums_are_those_of_the_rows() -> None:
    """Each bin has the exact integer sums of its steps, apart for steps with and without device times."""
    rows = random_rows(STEPS, 2_000, first=70)
    got = sums_of(STEPS, rows)
    flags = rows["bits"] >> 16 & StepFlag.DEVICE > 0
    for each in got.bins:
        inside = (rows["step"] // got.width == each["bin"]) & (flags == bool(each["group"]))
        mine = rows[inside]
        assert each["rows"] == len(mine)
        assert (each["first_step"], each["last_step"]) == (mine["step"].min(), mine["step"].max())
        assert each["begin_ns"] == (mine["t_end_ns"] - mine["total_ns"]).min()
        assert each["end_ns"] == mine["t_end_ns"].max()
        for name in (*PHASE_COLUMNS, "total_ns"):
            assert each[name] == mine[name].sum()

        measured = mine["backward_own_ns"][mine["backward_own_ns"] >= 0]
        assert (each["backward_own_ns"], each["backward_own_ns_rows"]) == (measured.sum(), len(measured))
        assert (each["total_ns_min"], each["total_ns_max"]) == (mine["total_ns"].min(), mine["total_ns"].max())


def test_every_measured_column_is_summed() -> None:
    """A new column of the schema is in the sums without a further line."""
    for table in (*STEP_TABLES, *SAMPLED_TABLES):
        fields = TableSums.empty(table).bins.dtype.names or ()
        left_out = set(table.names) - set(fields)
        assert left_out <= {
            "step",
            "t_ns",
            "t_end_ns",
            "bits",
            "name_id",
            "index",
            "device",
            "resource",
            "first",
            "loader",
        }


def test_samples_have_exact_extremes_per_device() -> None:
    """Peaks are those of all samples, and values that a device does not report are left out."""
    rows = random_rows(GPU, 500)
    got = sums_of(GPU, rows)
    assert got.bins["group"].tolist() == [0, 1, 2]
    for each in got.bins:
        mine = rows[rows["index"] == each["group"]]
        assert each["memory_used_bytes_max"] == mine["memory_used_bytes"].max()
        assert each["power_w_rows"] == np.count_nonzero(~np.isnan(mine["power_w"]))
        np.testing.assert_allclose(each["power_w"], np.nansum(mine["power_w"]))
        np.testing.assert_allclose(each["power_w_max"], np.nanmax(mine["power_w"]))


def test_counters_of_a_month_do_not_overflow() -> None:
    """Bytes since boot are summed as floats: 10**15 in each of 3 million samples exceeds an int64."""
    rows = np.zeros(3, HOST.dtype)
    rows["disk_read_bytes"] = 2**62
    assert sums_of(HOST, rows).bins["disk_read_bytes"][0] == pytest.approx(3 * 2.0**62)


def test_streams_are_summed_apart() -> None:
    """Rows of many streams at once give the same sums as one by one, each with a width of its own."""
    parts = {
        number: random_rows(STEPS, count, first) for number, count, first in ((3, 40, 5), (4, 4_000, 0), (9, 1, 7))
    }
    rows = np.concatenate([*parts.values()])
    streams = np.repeat([*parts], [len(part) for part in parts.values()])
    mixed = RANDOM.permutation(len(rows))
    order = mixed[np.argsort(rows["step"][mixed], kind="stable")]

    got = sum_rows(STEPS.name, rows[order], streams[order])
    assert set(got) == {3, 4, 9}
    for number, part in parts.items():
        assert_same(got[number], sums_of(STEPS, part))


@pytest.mark.parametrize("table", [STEPS, DEVICE_STEPS, PROCESS], ids=lambda table: table.name)
def test_stored_form_comes_back_the_same(table: Table) -> None:
    """The stored form is small: a few kilobytes for any number of rows."""
    sums = sums_of(table, random_rows(table, 20_000))
    data = sums.encoded()
    assert_same(TableSums.decoded(table.name, data), sums)
    assert len(data) < 24_000


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x95\x01\x90\x00\xc4\x01x\xc4\x00", b"\xc1"])
def test_damaged_form_is_refused(data: bytes) -> None:
    """Bytes that are no sums raise an error of the kind that the reader reports."""
    with pytest.raises(ValueError, match="sums of steps"):
        TableSums.decoded("steps", data)


def test_quantiles_are_those_of_all_steps() -> None:
    """Percentiles are accurate to one level, also when a rank has a few very long steps."""
    rows = np.zeros(50_000, STEPS.dtype)
    rows["step"] = np.arange(len(rows))
    rows["total_ns"] = 50e6 * RANDOM.lognormal(0, 0.3, len(rows))
    rows["total_ns"][::997] = 4_000_000_000
    halves = [StepSums.of({"steps": sums_of(STEPS, half)}) for half in np.array_split(rows, 2)]
    whole = halves[0].join(halves[1])

    shares = (0.0, 0.5, 0.95, 0.999, 1.0)
    wanted = np.quantile(rows["total_ns"], shares, method="inverted_cdf")
    np.testing.assert_allclose(whole.quantiles_ns(shares), wanted, rtol=0.0076)
    assert all(np.isnan(StepSums.of({}).quantiles_ns((0.5,))))


def test_steps_far_apart_fit() -> None:
    """A counter that jumps, also to a nonsensical step, widens the bins and loses nothing."""
    rows = np.zeros(3, STEPS.dtype)
    rows["step"] = [-5, 10, 2**62]
    rows["total_ns"] = [1, 2, 4]
    got = sums_of(STEPS, rows)
    assert got.bins["total_ns"].sum() == 7
    assert got.bins["bin"].max() - got.bins["bin"].min() < MAX_BINS


def test_the_middle_of_a_level_is_in_it() -> None:
    """Levels and their times are inverse; times beyond both ends are in the first and the last level."""
    levels = np.arange(LEVELS)

    assert level_of(level_middle_ns(levels)).tolist() == levels.tolist()
    assert level_of(np.array([-1, 0, 10**16])).tolist() == [0, 0, LEVELS - 1]
