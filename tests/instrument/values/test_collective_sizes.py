"""Sizes of the tensors that collectives carry."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed

from traceml.instrument.patches import Patches
from traceml.instrument.timed_calls import patch_collectives
from traceml.instrument.values.collective_sizes import CollectiveSizes

CYCLE: list[Any] = []
CYCLE.append(CYCLE)  # an object that ranks exchange


def sizes_of(*calls: tuple[Any, ...], sequence: int) -> list[int]:
    """Return what is reported after some calls, of which the group has counted `sequence`."""
    found: list[int] = []
    sizes = CollectiveSizes(lambda _kind, **row: found.append(row["elements"]))
    for args in calls:
        sizes.record(args, {})

    sizes.report(sequence)
    return found


@pytest.mark.parametrize(
    ("args", "elements"),
    [
        ((torch.zeros(()), "sum", None), 1),
        (([torch.zeros(3), torch.zeros(2)], torch.zeros(2)), 3),
        ((torch.zeros(2), CYCLE), 2),
    ],
)
def test_the_largest_tensor_of_a_call_is_reported(args: tuple[Any, ...], elements: int) -> None:
    """A tensor, and lists of tensors; a barrier carries nothing."""
    assert sizes_of(args, (), sequence=2) == [elements]


def test_a_large_tensor_is_reported_at_once() -> None:
    """After it, nothing is looked at any more."""
    large = torch.zeros(65)

    assert sizes_of((torch.zeros(1),), (large,), (torch.zeros(100),), sequence=3) == [65]


def test_nothing_is_reported_where_a_collective_was_not_seen() -> None:
    """DDP's buckets are reduced in C++: the group has counted more collectives than were seen."""
    assert sizes_of((torch.zeros(1),), sequence=2) == []


def test_a_message_is_an_exchange_of_any_size() -> None:
    """Stages of a pipeline may send each other a few numbers only."""
    found: list[tuple[int, bool]] = []
    sizes = CollectiveSizes(lambda _kind, **row: found.append((row["elements"], row.get("messages", False))))
    sizes.record((torch.zeros(1),), {})
    sizes.record_message((torch.zeros(8), 1), {})
    sizes.record_message((torch.zeros(8), 1), {})
    sizes.report(1)

    assert found == [(65, True), (65, False)]


def test_calls_of_both_kinds_are_recorded() -> None:
    """Also with the tensor by name, and as an operation of a batch; here they fail for lack of a group."""
    found: list[tuple[str, int]] = []
    recording: Any = SimpleNamespace(
        record=lambda args, kwargs: found.append(("collective", len(args) + len(kwargs))),
        record_message=lambda args, kwargs: found.append(("message", len(args) + len(kwargs))),
    )
    patches, clock = Patches(), SimpleNamespace(enter=lambda _: None)
    patch_collectives(patches, clock, recording)  # type: ignore[arg-type]
    for call in ("all_reduce", "irecv"):
        with suppress(ValueError):
            getattr(torch.distributed, call)(tensor=torch.zeros(3))

    with suppress(IndexError, RuntimeError):
        torch.distributed.batch_isend_irecv([])

    patches.restore()

    assert found == [("collective", 1), ("message", 1), ("message", 1)]
