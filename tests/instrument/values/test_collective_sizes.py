"""Sizes of the tensors that collectives carry."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from traceml.instrument.values.collective_sizes import CollectiveSizes


def sizes_of(*calls: tuple[Any, ...], sequence: int) -> list[int]:
    """Return what is reported after some calls, of which the group has counted `sequence`."""
    found: list[int] = []
    sizes = CollectiveSizes(lambda row: found.append(row["elements"]))
    for args in calls:
        sizes.note(args)

    sizes.report(sequence)
    return found


@pytest.mark.parametrize(
    ("args", "elements"),
    [
        ((torch.zeros(()), "sum", None), 1),
        (([torch.zeros(3), torch.zeros(2)], torch.zeros(2)), 3),
        (([SimpleNamespace(tensor=torch.zeros(7), peer=1)],), 7),
    ],
)
def test_the_largest_tensor_of_a_call_is_reported(args: tuple[Any, ...], elements: int) -> None:
    """A tensor, lists of tensors, and operations of a batch; a barrier carries nothing."""
    assert sizes_of(args, (), sequence=2) == [elements]


def test_a_large_tensor_is_reported_at_once() -> None:
    """After it, nothing is looked at any more."""
    large = torch.zeros(65)

    assert sizes_of((torch.zeros(1),), (large,), (torch.zeros(100),), sequence=3) == [65]


def test_nothing_is_reported_where_a_collective_was_not_seen() -> None:
    """DDP's buckets are reduced in C++: the group has counted more collectives than were seen."""
    assert sizes_of((torch.zeros(1),), sequence=2) == []
