"""Rows of samples, summed by line."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.database.schema import LINE_OTHER, LINE_OUTSIDE, LINES, Phase
from traceml.diagnosis.facts.sampled_lines import LineCounts, SampledLine


def test_rows_are_summed_by_line():
    """Rows of one line and phase are added up; texts come from the rank's names."""
    rows = np.zeros(3, LINES.dtype)
    rows["phase"], rows["line_id"], rows["library_id"] = [LINE_OTHER, LINE_OTHER, Phase.FORWARD], [4, 4, 4], [-1, -1, 5]
    rows["samples"] = [3, 4, 1]
    counts = LineCounts()
    counts.add(1, rows)

    names = {1: {4: "/home/my project/train.py:12 Net.forward", 5: "/x/torch/nn/linear.py:3 Linear.forward"}}

    assert counts.lines(names) == (
        SampledLine(1, "other", "/home/my project/train.py", 12, "Net.forward", None, 7),
        SampledLine(1, "forward", "/home/my project/train.py", 12, "Net.forward", names[1][5], 1),
    )
    assert counts.lines({})[0].file is None  # a name that has not arrived


S = 1_000_000_000


def rows(*facts: tuple[int, int, int, int]) -> np.ndarray:
    """Return rows of ten samples: time in seconds, open step, phase, line."""
    made = np.zeros(len(facts), LINES.dtype)
    for row, (seconds, step, phase, line) in zip(made, facts, strict=True):
        row["t_ns"], row["step"], row["phase"], row["line_id"], row["samples"] = seconds * S, step, phase, line, 10

    return made


@pytest.mark.parametrize(("latest", "hung"), [(65, 0), (66, 30), (70, 30)])
def test_a_step_that_never_ends_has_no_share_in_the_phases(latest, hung):
    """The first rows of step 66 have samples of the steps before it; later ones are of a hang, until it is whole."""
    counts = LineCounts()
    counts.add(0, rows((1, 30, LINE_OTHER, 1), (2, 66, LINE_OTHER, 1), (2, 66, LINE_OTHER, 2)))
    for seconds in (3, 4, 5):
        counts.add(0, rows((seconds, 66, LINE_OTHER, 2), (seconds, 66, LINE_OUTSIDE, 3)))

    found = {(each.part, each.line): each.samples for each in counts.lines(NAMES, [latest])}

    assert found == {("other", 1): 20, ("other", 2): 10 + hung, ("outside", 3): 30}


def test_rows_of_a_step_count_when_the_next_one_has_begun():
    """Steps may take longer than it takes to send samples."""
    counts = LineCounts()
    counts.add(0, rows((1, 5, LINE_OTHER, 1), (2, 5, LINE_OTHER, 1)))
    assert [each.samples for each in counts.lines(NAMES, [4])] == [10]

    counts.add(0, rows((3, 6, LINE_OTHER, 1)))
    assert [each.samples for each in counts.lines(NAMES, [4])] == [30]


NAMES = {0: {number: f"/x/train.py:{number} step" for number in (1, 2, 3)}}
