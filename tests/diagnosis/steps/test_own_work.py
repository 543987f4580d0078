"""Own work of ranks between sync points."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.diagnosis.steps.own_work import median_over_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 9, 1250])
def test_the_median_over_ranks_is_that_of_each_step(ranks):
    """To the last bit that numpy has, and the values stay as they are."""
    values = np.random.default_rng(ranks).lognormal(16, 1, (ranks, 7)).astype(np.float32)
    before = values.copy()

    found = median_over_ranks(values)

    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(np.median(before, axis=0).tolist(), rel=1e-6)
    assert np.array_equal(values, before)
