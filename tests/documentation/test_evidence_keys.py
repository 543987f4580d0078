"""docs/verdicts.md explains what the rules put into `evidence`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.renderers.test_all_kinds import CASES

PAGE = Path(__file__).parents[2] / "docs" / "verdicts.md"
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@cache
def _words_of_code() -> set[str]:
    spans = re.findall(r"`([^`\n]+)`", _FENCED.sub("", PAGE.read_text(encoding="utf-8")))
    return {word for span in spans for word in re.findall(r"\w+", span)}


@pytest.mark.parametrize("case", CASES)
def test_every_key_is_on_the_page(case):
    """In the section of its kind, in one that this leads to, or among those that mean the same in all kinds."""
    keys = {key for finding in CASES[case]() for key in finding.evidence}

    assert keys - _words_of_code() == set()
