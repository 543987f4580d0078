"""The list of the runs in a folder, also while it changes."""

from __future__ import annotations

import os
import shutil

from tests.diagnosis.fabricated import Job
from tests.runs.fabricated_store import store_run
from traceml.runs.run_labels import RunLabels, write_labels
from traceml.runs.runs_source import RunsSource

RUN = "20260101-000000-train-abcd"


def test_the_list_tells_what_changed(tmp_path):
    """Runs appear, end and disappear; an unchanged list is not returned again, and a missing folder is empty."""
    folder = tmp_path / "runs"
    source = RunsSource(folder)
    assert source.read().runs == ()
    assert source.read() is None
    store_run(folder / RUN, Job(ranks=2, steps=30))
    store_run(folder / "20260102-000000-b-ef01", Job(ranks=2, steps=30), facts={"started": 1.8e9, "ended": 1.8e9 + 5})

    assert [run.id for run in source.read().runs] == ["20260102-000000-b-ef01", RUN]
    assert source.read() is None
    shutil.rmtree(folder / RUN)
    assert len(source.read().runs) == 1


def test_a_later_visit_reads_no_old_run_again(tmp_path):
    """After a pause the whole list comes again, and of an ended run what was read before: its store is not opened."""
    folder = tmp_path / "runs"
    store = store_run(folder / RUN, Job(ranks=2, steps=30)) / "store.db"
    source = RunsSource(folder)
    before, written = source.read(), store.stat()
    source.close()
    store.write_bytes(b"no store")
    os.utime(store, ns=(written.st_atime_ns, written.st_mtime_ns))

    assert source.read() == before
    assert source.read() is None


def test_labels_are_those_of_the_moment(tmp_path):
    """Also of a run that has ended; archived runs are there for those who ask for them."""
    run_dir = store_run(tmp_path / RUN, Job(ranks=2, steps=60))
    source = RunsSource(tmp_path)
    assert [run.tags for run in source.read().runs] == [[]]

    write_labels(run_dir, RunLabels(tags=["baseline"], archived=True))
    assert [(run.tags, run.archived) for run in source.read().runs] == [(["baseline"], True)]

    write_labels(run_dir, RunLabels(tags=["baseline"], name="mine"))
    assert [(run.name, run.archived) for run in source.read().runs] == [("mine", False)]
    assert source.read() is None
