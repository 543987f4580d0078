"""Labels that people give to a run: tags, a note, archived. Stored in the run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from traceml.errors import StoreError, UsageError
from traceml.fail_open import writing
from traceml.run_folder import LABELS_NAME
from traceml.runs.json_document import read_keys
from traceml.trusted_files import replace_file

__all__ = ["RunLabels", "add_tags", "change_labels", "labels_time", "read_labels", "remove_tags", "write_labels"]

_MAX_TAG = 64


class RunLabels(msgspec.Struct, kw_only=True):
    """Labels of a run; an archived run is left out of lists, and a name is shown instead of the run's own."""

    tags: list[str] = []
    note: str = ""
    archived: bool = False
    name: str = ""


def read_labels(run_dir: Path) -> RunLabels:
    """Return the labels of a run; none where there are none, or where they cannot be read."""
    return read_keys(run_dir / LABELS_NAME, RunLabels) or RunLabels()


def labels_time(run_dir: Path) -> float:
    """Return the epoch seconds of the last change of a run's labels; 0 if it has none."""
    try:
        return (run_dir / LABELS_NAME).stat().st_mtime
    except OSError:
        return 0.0


def write_labels(run_dir: Path, labels: RunLabels) -> None:
    """Write the labels of a run, atomically.

    Raises:
        StoreError: the folder cannot be written.
    """
    path = run_dir / LABELS_NAME
    with writing(path, kind=StoreError):
        replace_file(path, msgspec.json.encode(labels))


def change_labels(run_dir: Path, change: Callable[[RunLabels], None]) -> RunLabels:
    """Change the labels of a run and return them. Of changes at once none is lost.

    Args:
        change: changes the labels that it is given.

    Raises:
        UsageError: the change is refused.
        StoreError: the folder cannot be written.
    """
    with _locked(run_dir.parent):
        labels, before = read_labels(run_dir), read_labels(run_dir)
        change(labels)
        if labels != before:
            write_labels(run_dir, labels)

    return labels


@contextlib.contextmanager
def _locked(runs_dir: Path) -> Iterator[None]:
    """Lock the folder of runs, if its filesystem can; the run's own folder is locked by its aggregator."""
    try:
        folder = os.open(runs_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # it may be written, but not read
        yield
        return

    try:
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)

        yield
    finally:
        os.close(folder)


def add_tags(labels: RunLabels, tags: list[str]) -> None:
    """Add tags that are not there yet.

    Raises:
        UsageError: a tag is empty, too long, or has a space or comma, which conditions use as separators.
    """
    for tag in tags:
        if not tag or len(tag) > _MAX_TAG or any(sign.isspace() or sign == "," for sign in tag):
            raise UsageError(f"not a tag: {tag!r}. A tag has 1 to {_MAX_TAG} characters, no spaces and no commas")

        if tag not in labels.tags:
            labels.tags.append(tag)


def remove_tags(labels: RunLabels, tags: list[str]) -> None:
    """Remove tags.

    Raises:
        UsageError: the run does not have one of them.
    """
    if missing := [tag for tag in tags if tag not in labels.tags]:
        raise UsageError(f"no such tag: {', '.join(missing)}. Tags of the run: {', '.join(labels.tags) or 'none'}")

    labels.tags = [tag for tag in labels.tags if tag not in tags]
