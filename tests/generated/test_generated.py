"""Properties of the parts that read input from outside; `make fuzz` checks them with other seeds."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.generated.all_targets import ALL_TARGETS
from tests.generated.targets import Target


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, id=target.name, marks=[pytest.mark.process] if target.starts else [])
        for target in ALL_TARGETS
    ],
)
def test_property_holds(target: Target) -> None:
    """The same inputs each time, so that a failure is that of a change; in `make check`, the first of them."""
    holds = given(target.inputs)(target.run)
    settings(
        max_examples=target.examples * settings.default.max_examples // 100,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(holds)()


def test_names_of_targets_differ() -> None:
    """`make fuzz --only NAME` names one of them."""
    assert len({target.name for target in ALL_TARGETS}) == len(ALL_TARGETS)
