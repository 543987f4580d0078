"""Logged values as lines."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from tests.diagnosis.fabricated import Job
from tests.runs.fabricated_store import add_rank, rows_of, run_facts
from traceml.database.schema import METRICS
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.runs.rows.metric_series import MetricSeriesSet
from traceml.runs.rows.metrics import MetricSummary


def log(writer, stream, names, values):
    """Log values[name] over steps 0, 1, ... under each name."""
    for number, name in enumerate(names, 10):
        writer.append(stream, "names", writer.next_seq(stream, "names"), 1, msgpack.packb({"id": number, "name": name}))
        rows = np.zeros(len(values), METRICS.dtype)
        rows["step"], rows["name_id"], rows["value"] = np.arange(len(values)), number, values
        writer.append(stream, "metrics", writer.next_seq(stream, "metrics"), len(rows), rows.tobytes())


@pytest.fixture
def store(tmp_path):
    """A writer and the streams of two ranks."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        streams = [add_rank(writer, rank, rows) for rank, rows in enumerate(rows_of(Job(steps=5)))]
        yield writer, streams


def _lines(writer, lines=None):
    writer.commit()
    lines = lines or MetricSeriesSet()
    with StoreReader(writer.path) as reader:
        lines.update(reader)

    return {line.name: line for line in lines.lines()}


def test_a_short_line_is_all_its_values(store):
    """Up to a few hundred values are kept one by one, each rank under its own name."""
    writer, streams = store
    log(writer, streams[0], ["loss"], [3.0, 2.0, 1.0])
    log(writer, streams[1], ["loss"], [4.0])

    lines = _lines(writer)

    assert lines["loss"].steps.tolist() == [0, 1, 2]
    assert lines["loss"].values.tolist() == [3.0, 2.0, 1.0]
    assert lines["loss/rank_1"].values.tolist() == [4.0]


def test_a_long_line_is_thinned_and_keeps_its_extremes(store):
    """Of 10,000 values a few hundred means are kept, over all steps, and the single spike."""
    writer, streams = store
    values = np.linspace(5, 1, 10_000)
    values[7_777] = 99.0
    log(writer, streams[0], ["loss"], values)

    line = _lines(writer)["loss"]

    assert len(line.steps) <= 400
    assert line.steps[0] == 0
    assert line.steps[-1] > 9_900
    assert line.most.max() == 99.0
    assert line.least.min() == pytest.approx(1.0)
    assert np.all(np.diff(line.steps) > 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [10_000, 10_001])
def test_means_of_the_greatest_values_are_finite(store, count):
    """Their sum would be infinite, with a warning on the user's terminal; gaps do not count."""
    writer, streams = store
    values = np.full(count, 1e308)
    values[5:8] = np.nan
    log(writer, streams[0], ["loss"], values)

    line = _lines(writer)["loss"]

    assert line.values == pytest.approx(1e308)
    assert line.missing == 3


def test_what_is_no_number_is_a_gap_and_is_counted(store):
    """NaN and infinities break the line, and the line knows how many there were."""
    writer, streams = store
    log(writer, streams[0], ["loss"], [1.0, np.nan, np.inf, 4.0])

    line = _lines(writer)["loss"]

    assert np.isnan(line.values).tolist() == [False, True, True, False]
    assert line.missing == 2


def test_only_what_is_new_is_read(store):
    """Values that come later join those that were there."""
    writer, streams = store
    lines = MetricSeriesSet()
    log(writer, streams[0], ["loss"], [1.0, 2.0])
    _lines(writer, lines)
    log(writer, streams[0], ["loss"], [7.0, 8.0])

    assert sorted(_lines(writer, lines)["loss"].values.tolist()) == [1.0, 2.0, 7.0, 8.0]


def test_what_a_writer_merges_between_two_readings_counts_once(store):
    """Frames that were read are merged with new ones; the pass goes on over another reader, which a second one uses."""
    writer, (stream, _) = store
    lines, summary = MetricSeriesSet(), MetricSummary()
    log(writer, stream, ["loss"], [])
    rows = np.zeros(150, METRICS.dtype)
    rows["name_id"], rows["step"], rows["value"] = 10, np.arange(150), np.nan

    with StoreReader(writer.path) as reader:
        for seq in range(150):
            writer.append(stream, "metrics", seq, 1, rows[seq : seq + 1].tobytes())
            writer.commit(float(seq))
            writer.maintain(10.0, now_s=float(seq))
            if seq == 30:
                _lines(writer, lines)
            elif seq > 30:
                summary.update(reader)
                lines.update(reader)

        assert reader.frame_count("metrics") < 100

    assert [line.missing for line in lines.lines()] == [150]
    assert summary.figures()["loss"].number == 150


def test_a_line_that_is_followed_keeps_its_beginning(store):
    """Read in small parts for hours, it has points all over its steps, each of equally many values."""
    writer, streams = store
    lines = MetricSeriesSet()
    log(writer, streams[0], ["loss"], [])
    with StoreReader(writer.path) as reader:
        for first in range(0, 10_000, 20):
            rows = np.zeros(20, METRICS.dtype)
            rows["name_id"], rows["step"], rows["value"] = (
                10,
                np.arange(first, first + 20),
                np.arange(first, first + 20),
            )
            writer.append(streams[0], "metrics", first, 20, rows.tobytes())
            writer.commit()
            lines.update(reader)

    (line,) = lines.lines()

    assert np.diff(line.steps).max() <= 64
    assert len(line.steps) <= 400
    assert line.values == pytest.approx((line.least + line.most) / 2)


def test_very_many_names_are_bounded(store):
    """Of 600 names 500 are kept, and the others are counted."""
    writer, streams = store
    log(writer, streams[0], [f"m{number}" for number in range(600)], [1.0])
    lines = MetricSeriesSet()

    assert len(_lines(writer, lines)) == 500
    assert len(lines.hidden) == 100
