"""torchrun's failures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from traceml.supervise.elastic import first_failure


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([(1, 100), (4, 100)], 4),  # os._exit cut the other rank's connection
        ([(1, 100), (-9, 101)], -9),
        ([(1, 100), (-15, 100)], 1),  # torchrun ended the other one
        ([(-15, 100), (1, 100)], -15),
        ([(1, 101), (1, 100)], 1),
        ([(3, 100), (-11, 100)], 3),
    ],
)
def test_an_exception_may_be_the_consequence_of_another_end(failures, first):
    """torchrun knows the second of each only."""
    known = [SimpleNamespace(exitcode=code, timestamp=second) for code, second in failures]

    assert first_failure(known).exitcode == first
