"""Lines from arrays."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.runs.export.line_text import GAP, fill_lines


@pytest.mark.parametrize(
    "numbers",
    [
        [0, 1, 9, 10, 9_999, 10_000, 10_001, 99_990_000, 100_000_000, 2**63 - 1],
        [-1, 0, 7, -9_999, -10_000, -(2**63)],
        np.random.default_rng(0).integers(-(10**18), 10**18, 1_000),
        [],
    ],
)
def test_integers_are_written_in_full(numbers):
    """Signs, leading and inner zeros of numbers of any size."""
    text = fill_lines([GAP + b"\n"], np.zeros(len(numbers), np.intp), [np.array(numbers, np.int64)])

    assert text == b"".join(b"%d\n" % number for number in numbers)


def test_each_line_has_its_template_and_the_first_values():
    """Texts of any length; values without a gap are left out."""
    templates = [b"a " + GAP + b" to " + GAP + b";", b"none;", GAP + b" only;"]
    values = [np.array([1, 2, 30_000, 4]), np.array([b"five", b"", b"a text", b"x"])]

    assert fill_lines(templates, np.array([0, 1, 2, 0]), values) == b"a 1 to five;none;30000 only;a 4 to x;"
