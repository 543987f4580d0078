"""Copies of data to a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.instrument.conftest import FEW_ROWS
from traceml.database.flight.flight import FlightFile
from traceml.instrument import install
from traceml.instrument.values.copy_style import CopyStyle


@pytest.mark.parametrize(
    ("args", "kwargs", "share"),
    [
        (("meta",), {}, 0.0),
        (("meta", torch.float16), {}, 0.0),
        (("meta",), {"non_blocking": True}, 1.0),
        (("meta", torch.float16, True), {}, 1.0),
        (("meta", torch.float16, False, True), {}, 0.0),  # copy=True
    ],
)
def test_the_first_copies_after_the_first_step_are_noted(
    args: tuple[Any, ...], kwargs: dict[str, Any], share: float, tmp_path: Path
) -> None:
    """Those of the model come before; the rest has no further cost."""
    facts: list[dict[str, Any]] = []
    flight = FlightFile.create(tmp_path, {}, capacities=FEW_ROWS)
    instrumentation = install(flight, on_info=facts.append, device_types=frozenset({"meta"}))
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(64):
        x = torch.randn(2, 4)
        x.to(*args, **kwargs) if step else x.to("meta", non_blocking=not share)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    instrumentation.close_open_step()
    instrumentation.uninstall()
    flight.close(unlink=True)

    told = [(each["pinned"], each["non_blocking"]) for each in facts if each["kind"] == "copies"]
    assert told == [(0.0, share)]
    assert instrumentation.clock.errors == 0


@dataclass
class Copied:
    """A tensor that may be pinned, which needs a device."""

    nbytes: int
    pinned: bool
    layout: torch.layout = torch.strided

    def is_pinned(self) -> bool:
        return self.pinned


def test_copies_count_by_their_bytes() -> None:
    """A large batch matters more than its labels."""
    found: dict[str, float] = {}
    style = CopyStyle(lambda _kind, **shares: found.update(shares), lambda: 1)
    while style.wants_more:
        style.record(Copied(96, pinned=True), ("cuda",), {"non_blocking": False})
        style.record(Copied(32, pinned=False), ("cuda",), {"non_blocking": True})

    assert found == {"pinned": 0.75, "non_blocking": 0.25}


def test_sparse_copies_are_counted_only() -> None:
    """They have no `nbytes`; a script may copy nothing else."""
    found: dict[str, float] = {}
    style = CopyStyle(lambda _kind, **shares: found.update(shares), lambda: 1)
    while style.wants_more:
        style.record(torch.eye(3).to_sparse(), ("cuda",), {})

    assert found == {"pinned": 0.0, "non_blocking": 0.0}
