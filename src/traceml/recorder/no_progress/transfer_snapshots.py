"""Facts of a call that the flight recorder of torch does not have: the peer of gloo's sends and receives, and roots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import FrameType

from traceml.database.snapshots import GroupSnapshot
from traceml.recorder.no_progress.library_waits import library_frames

__all__ = ["open_transfer", "with_root"]

_FILE = "/torch/distributed/distributed_c10d.py"
_PEERS = {"send": "dst", "recv": "src", "send_object_list": "dst", "recv_object_list": "src"}
_ROOTS = {"broadcast": "src", "scatter": "src", "reduce": "dst", "gather": "dst"}


def open_transfer(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> GroupSnapshot | None:
    """Return the operation that the user's code has called, with the rank at its other end if that is an argument.

    Args:
        frame: what the thread runs.
    """
    found = None
    for call in _calls(frame, is_user):
        name = call.f_code.co_name
        if name in _PEERS:
            found = GroupSnapshot(operation=name, in_flight=True, is_p2p=True, peer=_rank(call, _PEERS[name]))

    return found


def with_root(
    groups: Iterable[GroupSnapshot], frame: FrameType | None, is_user: Callable[[FrameType], bool]
) -> tuple[GroupSnapshot, ...]:
    """Return the operations, the one that the user's code has called with the root that it was given."""
    groups = tuple(groups)
    call = next((call for call in _calls(frame, is_user) if call.f_code.co_name in _ROOTS), None)
    if call is None:
        return groups

    name = call.f_code.co_name
    called = [group for group in groups if group.in_flight and group.operation == name]
    root = _rank(call, _ROOTS[name]) if len(called) == 1 else None
    return tuple(replace(group, peer=root) if group in called else group for group in groups)


def _calls(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> Iterator[FrameType]:
    """Return the open functions of torch.distributed below the user's code, the innermost first."""
    return (each for each in library_frames(frame, is_user) if each.f_code.co_filename.endswith(_FILE))


def _rank(call: FrameType, name: str) -> int | None:
    """Return the rank that a function was given; None where it was given none, or one of a group."""
    value = call.f_locals.get(name)
    return value if type(value) is int and value >= 0 else None
