"""The table of advice that is followed: each kind is in it, and each training and test that it names exists."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache

from tests.diagnosis.followed import FOLLOWED
from tests.documentation.pages import ROOT
from traceml.diagnosis.kinds import Kind


def rows() -> list[list[str]]:
    page = (ROOT / "docs" / "advice.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def names(cells: list[str]) -> Iterator[str]:
    for cell in cells:
        yield from re.findall(r"`([^`]+)`", cell)


@cache
def known() -> set[str]:
    """Return the names of all trainings and tests."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "accuracy"))
    from cases import CASES

    tests = (path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    found = {name for text in tests for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    return found | {case.name for case in CASES} | {advice.name for advice in FOLLOWED}


def test_each_kind_has_a_row() -> None:
    """A new kind says who follows its advice, and who refuses it."""
    assert {name for row in rows() for name in names(row[:1])} == {str(kind) for kind in Kind}


def test_each_name_exists() -> None:
    """Trainings and tests, in the last two columns; each advice is refused by one at least."""
    assert {name for row in rows() for name in names(row[2:])} <= known()
    assert all(len(row) == 4 and row[3] != "-" for row in rows())


def test_each_training_that_follows_is_in_the_table() -> None:
    """Those of `followed.py`."""
    assert {advice.name for advice in FOLLOWED} <= {name for row in rows() for name in names(row[2:3])}
