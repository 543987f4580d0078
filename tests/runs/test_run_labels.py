"""Labels of a run."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError

import pytest

from traceml.errors import StoreError, UsageError
from traceml.run_folder import LABELS_NAME
from traceml.runs.run_labels import RunLabels, add_tags, change_labels, read_labels, remove_tags, write_labels


def test_labels_are_read_back(tmp_path):
    """Tags, note and the archive flag are in the run's folder."""
    write_labels(tmp_path, RunLabels(tags=["baseline"], note="first\nsecond", archived=True))

    assert read_labels(tmp_path) == RunLabels(tags=["baseline"], note="first\nsecond", archived=True)
    assert [path.name for path in tmp_path.iterdir()] == [LABELS_NAME]


@pytest.mark.parametrize("text", [None, "", "{", '{"tags": 1}'])
def test_a_run_without_readable_labels_has_none(tmp_path, text):
    """A missing or damaged file does not keep a run from being listed."""
    if text is not None:
        (tmp_path / LABELS_NAME).write_text(text)

    assert read_labels(tmp_path) == RunLabels()


def test_tags_are_unique_words():
    """A tag is added once; a space or comma would end it in a condition; removing needs one that is there."""
    labels = RunLabels(tags=["a"])
    add_tags(labels, ["a", "b"])

    assert labels.tags == ["a", "b"]
    for tag in ("", "a b", "a,b", "x" * 65):
        with pytest.raises(UsageError, match="not a tag"):
            add_tags(labels, [tag])
    with pytest.raises(UsageError, match=r"no such tag: c\. Tags of the run: a, b"):
        remove_tags(labels, ["c"])
    remove_tags(labels, ["a"])
    assert labels.tags == ["b"]


def test_of_changes_at_once_none_is_lost(tmp_path):
    """As of a script that tags in a loop in the background, or of two people: each has read what the other wrote."""
    (tmp_path / "run").mkdir()
    both = Barrier(2)

    def tag(name: str) -> None:
        def change(labels: RunLabels) -> None:
            try:
                both.wait(0.3)  # until the other one has read, too
            except BrokenBarrierError:
                pass

            add_tags(labels, [name])

        change_labels(tmp_path / "run", change)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(tag, ["a", "b"]))

    assert sorted(read_labels(tmp_path / "run").tags) == ["a", "b"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """The error has the path."""
    with pytest.raises(StoreError, match=r"cannot write .*labels\.json"):
        write_labels(tmp_path / "none", RunLabels())


def test_a_pipe_in_place_of_the_labels_keeps_nobody_waiting(tmp_path):
    """A run's folder may come from elsewhere; such a run is labeled like any other."""
    os.mkfifo(tmp_path / LABELS_NAME)

    assert read_labels(tmp_path) == RunLabels()
    write_labels(tmp_path, RunLabels(note="x"))
    assert read_labels(tmp_path).note == "x"
