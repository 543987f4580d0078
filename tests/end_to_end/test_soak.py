"""The soak of `make soak`, in seconds: runs that come and go, torn connections, an aggregator that is killed."""

from __future__ import annotations

import pytest
from benchmarks.faults.soak import growth, soaked


@pytest.mark.timeout(240)
def test_rows_in_are_rows_stored_and_nothing_grows() -> None:
    """Every row is stored once; memory, threads, descriptors and files stay as they are after the first runs."""
    runs = soaked(minutes=0.1)

    assert [text for run in runs for text in run.wrong] == []
    assert list(growth(runs)) == []
    assert sum(run.lost_rows for run in runs) == 0
    assert runs[-1].restarts > 0
    assert min(run.steps for run in runs) > 0
