"""Sends and receives in a stack, told with the rank at the other end."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from traceml.recorder.quiet.snapshot_maker import open_transfer

TORCH = "/site-packages/torch/distributed/distributed_c10d.py"
CODE = """
def send(tensor, dst=None, group=None):
    return here()

def recv(tensor, src=None, group=None):
    return here()

def recv_object_list(objects, src=None):
    return recv(objects, src)

def all_reduce(tensor):
    return here()
"""


def here() -> FrameType:
    return sys._getframe()


def is_test(frame: FrameType) -> bool:
    return frame.f_code.co_filename == __file__ and frame.f_code.co_name != "here"


def functions(file: str) -> dict[str, Any]:
    """Return functions that torch has too, of a file."""
    found: dict[str, Any] = {"here": here}
    exec(compile(CODE, file, "exec"), found)
    return found


@pytest.mark.parametrize(
    ("call", "arguments", "operation", "peer"),
    [
        ("send", (None, 1), "send", 1),
        ("recv", (None, 0), "recv", 0),
        ("recv", (None,), "recv", None),
        ("recv_object_list", ([], 3), "recv_object_list", 3),
    ],
)
def test_the_call_of_the_user_and_its_peer_are_reported(
    call: str, arguments: tuple[Any, ...], operation: str, peer: int | None
) -> None:
    """The outermost function of torch; any sender may be meant."""
    snapshot = open_transfer(functions(f"/venv{TORCH}")[call](*arguments), is_test)

    assert snapshot is not None
    assert (snapshot.operation, snapshot.peer, snapshot.is_p2p, snapshot.in_flight) == (operation, peer, True, True)


def test_a_function_of_that_name_elsewhere_is_no_transfer() -> None:
    """Nor is a collective, or a stack without either."""
    assert open_transfer(functions("/home/me/mail.py")["send"](None, 1), is_test) is None
    assert open_transfer(functions(f"/venv{TORCH}")["all_reduce"](None), is_test) is None
    assert open_transfer(None, is_test) is None
