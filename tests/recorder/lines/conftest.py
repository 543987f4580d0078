"""A flight file for sampled lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from traceml.database.flight.flight import FlightFile


@pytest.fixture
def flight(tmp_path: Path) -> Iterator[FlightFile]:
    """A flight file in a folder of its own."""
    made = FlightFile.create(tmp_path, {"rank": 0})
    yield made
    made.close(unlink=True)
