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


def rows(seconds: int, step: int, *lines: tuple[int, int]) -> np.ndarray:
    """Return rows of ten samples that were counted to a time: the open step, and phase and line of each."""
    made = np.zeros(len(lines), LINES.dtype)
    made["t_ns"], made["step"], made["samples"] = seconds * S, step, 10
    made["phase"], made["line_id"] = zip(*lines, strict=True)
    return made


@pytest.mark.parametrize("step", [65, 66, -1], ids=["between steps", "in a step", "at the end of the process"])
def test_what_runs_after_the_last_step_has_no_part_in_its_phases(step):
    """Step 65 ends after 8 s; of the five seconds in which it does, it is not known what was seen after it."""
    counts = LineCounts()
    for flushed in (rows(5, 30, (LINE_OTHER, 1)), rows(10, 65, (LINE_OTHER, 1), (LINE_OTHER, 2))):
        counts.add(0, flushed)

    for seconds in range(15, 500, 5):
        counts.add(0, rows(seconds, step, (LINE_OTHER, 2), (LINE_OUTSIDE, 3)))

    found = {(each.part, each.line): each.samples for each in counts.lines(NAMES, [8 * S])}

    assert found == {("other", 1): 20, ("other", 2): 10, ("outside", 3): 970}


def test_what_hangs_soon_after_samples_were_sent_has_no_part_in_the_steps():
    """Nearly all of the five seconds in which step 65 ended are after it."""
    counts = LineCounts()
    for flushed in (rows(5, 65, (LINE_OTHER, 1)), rows(10, 65, (LINE_OTHER, 2))):
        counts.add(0, flushed)

    assert [each.line for each in counts.lines(NAMES, [6 * S])] == [1]


def test_samples_of_a_step_count_when_the_next_one_has_begun():
    """Steps may take longer than it takes to send samples, which come in one call or in several."""
    counts = LineCounts()
    counts.add(0, np.concatenate([rows(5, 4, (LINE_OTHER, 1)), rows(10, 5, (LINE_OTHER, 1))]))
    counts.add(0, rows(15, 5, (LINE_OTHER, 1)))
    assert [each.samples for each in counts.lines(NAMES, [8 * S])] == [20]

    counts.add(0, rows(20, 6, (LINE_OTHER, 1)))
    assert [each.samples for each in counts.lines(NAMES, [18 * S])] == [40]


NAMES = {0: {number: f"/x/train.py:{number} step" for number in (1, 2, 3)}}
