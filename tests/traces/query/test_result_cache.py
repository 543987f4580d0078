"""Results are cached as long as the files are unchanged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from traceml.traces.query import result_cache
from traceml.traces.query.result_cache import ResultCache, cache_folder

ANSWER = {"groups": [{"name": "a", "sum_us": 2**70}]}


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACEML_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "trace.pfw"
    path.write_text("[]")
    os.utime(path, ns=(10**18, 10**18))
    return path


def test_an_answer_comes_back(trace: Path) -> None:
    """To the same query about the same file only."""
    assert ResultCache([trace], "by name").load() is None
    ResultCache([trace], "by name").store(ANSWER)

    assert ResultCache([trace], "by name").load() == ANSWER
    assert ResultCache([trace], "by cat").load() is None
    assert ResultCache([trace, trace], "by name").load() is None


@pytest.mark.parametrize("change", ["size", "time", "inode", "content"])
def test_a_changed_file_has_no_answer(trace: Path, change: str) -> None:
    """Any change of its identity invalidates the result."""
    ResultCache([trace], "by name").store(ANSWER)
    if change == "size":
        trace.write_text("[ ]")
        os.utime(trace, ns=(10**18, 10**18))
    elif change == "time":
        os.utime(trace, ns=(10**18, 10**18 + 1))
    elif change == "content":  # under the same time, as a copy that keeps times does
        trace.write_text("{}")
        os.utime(trace, ns=(10**18, 10**18))
    else:
        other = trace.with_name("other")
        other.write_text("[]")
        os.utime(other, ns=(10**18, 10**18))
        other.replace(trace)

    assert ResultCache([trace], "by name").load() is None


def test_nothing_is_kept_of_a_file_that_is_written_to(trace: Path) -> None:
    """Nothing is cached if the file changed in between, or is so new that it may change unnoticed."""
    answers = ResultCache([trace], "by name")
    os.utime(trace, ns=(10**18, 10**18 + 1))
    answers.store(ANSWER)
    assert ResultCache([trace], "by name").load() is None

    os.utime(trace)
    ResultCache([trace], "by name").store(ANSWER)
    assert ResultCache([trace], "by name").load() is None


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff\x00", b'{"files": 1'])
def test_a_damaged_entry_is_none(trace: Path, damage: bytes) -> None:
    """The query is computed again."""
    ResultCache([trace], "by name").store(ANSWER)
    (entry,) = cache_folder().iterdir()
    entry.write_bytes(damage)
    assert ResultCache([trace], "by name").load() is None

    ResultCache([trace], "by name").store(ANSWER)
    assert ResultCache([trace], "by name").load() == ANSWER


def test_a_cache_that_cannot_be_written_is_gone_without(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is in the place of the folder."""
    monkeypatch.setenv("TRACEML_CACHE_DIR", str(trace))
    ResultCache([trace], "by name").store(ANSWER)

    assert ResultCache([trace], "by name").load() is None
    assert trace.read_text() == "[]"


def test_the_cache_stays_small(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest entries are removed, and one that is too large is not kept."""
    monkeypatch.setattr(result_cache, "_MAX_ENTRIES", 3)
    monkeypatch.setattr(result_cache, "_MAX_ENTRY_BYTES", 10_000)
    for number in range(6):
        ResultCache([trace], f"query {number}").store(ANSWER)

    assert len(list(cache_folder().iterdir())) == 3
    assert ResultCache([trace], "query 5").load() == ANSWER
    ResultCache([trace], "large").store("x" * 20_000)
    assert ResultCache([trace], "large").load() is None
