"""Rows of samples, summed by line."""

from __future__ import annotations

import numpy as np

from traceml.database.schema import LINE_OTHER, LINES, Phase
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
