"""All targets of generated input."""

from __future__ import annotations

from tests.generated import (
    flight_targets,
    peer_targets,
    run_targets,
    settings_targets,
    store_targets,
    trace_targets,
    wire_targets,
)
from tests.generated.targets import Target

__all__ = ["ALL_TARGETS"]

ALL_TARGETS: tuple[Target, ...] = tuple(
    target
    for module in (
        wire_targets,
        peer_targets,
        flight_targets,
        store_targets,
        trace_targets,
        settings_targets,
        run_targets,
    )
    for target in module.TARGETS
)
