"""`load_run`: a run as an object."""

from __future__ import annotations

import io
import sys
import types

import numpy as np
import pytest

import traceml
from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.runs.fabricated_store import add_info, add_rank, run_facts, store_run
from tests.track.fabricated import START_NS, LoggedRun
from traceml.database.store.store import StoreWriter
from traceml.errors import RunNotFoundError
from traceml.run_folder import STORE_NAME
from traceml.runs.run import Run, load_run, runs


@pytest.fixture
def run(tmp_path):
    return load_run(store_run(tmp_path / "run", Job(steps=120, callback_every=4), adds("forward", 20, (1,))))


def test_it_is_what_traceml_offers(run):
    """`traceml.load_run` is this one, which notebooks can draw."""
    assert isinstance(traceml.load_run(run.path), Run)


def test_verdict_and_findings(run):
    """The verdict is the first of the findings."""
    assert run.verdict.kind == "COMPUTE_STRAGGLER"
    assert run.verdict.ranks == (1,)
    assert run.findings[0].kind == run.verdict.kind
    assert run.state == "finished"


def test_steps_are_a_numpy_array(run):
    """One row per rank and step; the parts add up, and flags are taken apart."""
    steps = run.steps()

    assert len(steps) == 240
    assert steps["rank"].tolist() == [0] * 120 + [1] * 120
    assert steps[steps["rank"] == 1]["forward_ns"].mean() == pytest.approx(24e6, rel=0.05)
    parts = sum(steps[f"{part}_ns"] for part in ("input_wait", "h2d", "forward", "backward", "optimizer", "comm",
                                                 "checkpoint", "user", "other"))  # fmt: skip
    assert (parts == steps["total_ns"]).all()
    assert set(steps["flags"].tolist()) == {0, 32}


def test_tables_have_the_rank_first(run):
    """Any packed table can be had, with the rank in place of the stream."""
    table = run.table("steps")

    assert table.dtype.names[0] == "rank"
    assert len(run.table("process")) == 0
    with pytest.raises(KeyError, match=r"^no table 'nothing' in"):
        run.table("nothing")


def test_logged_numbers_are_read_back(tmp_path):
    """Every value once, with its name, rank, step and time; as a data frame too."""
    logged = LoggedRun(tmp_path / "run")
    logged.metrics({"loss": [0.5, float("inf")], "acc": [0.25]}, first_step=3)
    logged.metrics({"loss": [0.125]}, rank=1, first_step=9)
    metrics = load_run(logged.end()).metrics()

    columns = ("name", "rank", "attempt", "step", "value")
    assert [tuple(row) for row in metrics[list(columns)].tolist()] == [
        ("loss", 0, 0, 3, 0.5),
        ("acc", 0, 0, 3, 0.25),
        ("loss", 0, 0, 4, float("inf")),
        ("loss", 1, 0, 9, 0.125),
    ]
    assert metrics["time"].tolist() == pytest.approx([START_NS / 1e9 + i / 1000 for i in range(4)])
    frame = metrics.to_pandas()
    assert frame[frame.name == "loss"].value.tolist() == [0.5, float("inf"), 0.125]
    assert len(load_run(LoggedRun(tmp_path / "empty").end()).metrics()) == 0


def test_an_earlier_attempt_can_be_asked_for(tmp_path):
    """Tables give the last attempt unless another is named."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        add_rank(writer, 0, rows_of(Job(ranks=1, steps=30))[0], attempt=0)
        stream = add_rank(writer, 0, rows_of(Job(ranks=1, steps=50))[0], attempt=1)
        add_info(writer, stream, kind="process", cores=2)

    run = load_run(tmp_path)

    assert (len(run.steps()), len(run.table("steps", attempt=0))) == (50, 30)
    assert run.log("info") == [{"rank": 0, "kind": "process", "cores": 2}]


def test_data_frames_come_from_the_library_that_is_there(run, monkeypatch):
    """Columns go to pandas or polars as plain arrays; without the library the error names it."""
    for name in ("pandas", "polars"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(DataFrame=dict))

    frame = run.steps().to_pandas()

    assert type(frame["step"]) is np.ndarray
    assert run.steps().to_polars().keys() == frame.keys()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pandas"):
        run.steps().to_pandas()


def test_show_tells_the_verdict(run):
    """A few lines: run, verdict, next, steps, phases."""
    out = io.StringIO()

    run.show(out)

    assert "COMPUTE_STRAGGLER (critical)" in out.getvalue()
    assert "Next: " in out.getvalue()
    assert "forward 4" in out.getvalue()


def test_a_running_run_gets_further(tmp_path):
    """The report is kept until `refresh`."""
    rows = rows_of(Job(ranks=1, steps=100, grouped=False))[0]
    writer = StoreWriter(tmp_path / STORE_NAME)
    writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
    stream = add_rank(writer, 0, rows[:50], state="running")
    writer.commit()
    run = load_run(tmp_path)

    assert run.report["steps"]["count"] == 50
    writer.append(stream, "steps", 50, 50, rows[50:].tobytes(), 50, 99)
    writer.commit()

    assert run.report["steps"]["count"] == 50
    run.refresh()
    assert run.report["steps"]["count"] == 100
    writer.close()


def test_a_run_that_is_not_there(tmp_path, monkeypatch):
    """The error names the id and the runs that exist."""
    monkeypatch.setenv("TRACEML_RUNS_DIR", str(tmp_path))
    store_run(tmp_path / "20260101-000000-train-abcd", Job(steps=30))

    with pytest.raises(RunNotFoundError, match=r"no run 'nope'.*20260101-000000-train-abcd"):
        load_run("nope")

    assert load_run("abcd").id == load_run().id == "20260101-000000-train-abcd"
    assert load_run(runs()[0]).id == load_run().id


def test_one_long_name_does_not_widen_each_row(tmp_path):
    """Memory goes with the rows and the names, not with their product."""
    logged = LoggedRun(tmp_path / "run")
    logged.metrics({"loss": [0.5] * 1000, "x" * 100_000: [1.0]})
    metrics = load_run(logged.end()).metrics()

    assert metrics.itemsize < 100
    assert metrics[metrics["name"] == "x" * 100_000]["value"].tolist() == [1.0]
