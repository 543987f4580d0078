"""The command `profile` as a rank answers it, on a real training."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch

from tests.instrument.conftest import Traced, form, traced  # noqa: F401 - fixtures
from tests.instrument.test_step_clock import net, sgd
from tests.instrument.test_step_clock import train as train_step
from traceml.errors import TraceMLError
from traceml.recorder.profile_server import ProfileServer
from traceml.recorder.user_code import UserCode

OPEN = {"do": "open", "first": 8, "steps": 3, "limit_s": 60.0, "limit_bytes": 1 << 30}


@pytest.fixture
def server(traced: Traced) -> Iterator[ProfileServer]:  # noqa: F811
    made = ProfileServer(
        traced.flight,
        clock=lambda: traced.instrumentation.clock,
        thread=lambda: threading.main_thread().ident or 0,
        contains=UserCode().contains,
    )
    yield made
    made.abandon()
    made.close()


def _train_until(server: ProfileServer, *states: str) -> dict[str, Any]:
    model = net()
    optimizer = sgd(model)
    for _ in count():
        for (x,) in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 4)), batch_size=2):
            train_step(model, optimizer, x)

        told = server.answer({"do": "state"})
        if told["state"] in states:
            return told

    raise AssertionError


def test_a_trace_is_handed_out_in_pieces(server: ProfileServer) -> None:
    """With the sampled lines; closed, it is gone and another one can be opened."""
    assert server.answer({"do": "state"})["state"] == "none"
    server.answer(OPEN)
    told = _train_until(server, "recorded", "failed")
    assert (told["state"], told["steps"]) == ("recorded", 3)

    data = b""
    while len(data) < told["size"]:
        data += server.answer({"do": "read", "offset": len(data)})["data"]

    names = [each["name"] for each in json.loads(gzip.decompress(data))["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 3
    calls = server.answer({"do": "calls"})
    assert all(0 <= number < len(calls["places"]) for _, number in calls["samples"])

    with pytest.raises(TraceMLError, match="it is being profiled already"):
        server.answer(OPEN)

    server.answer({"do": "close"})
    _train_until(server, "failed")
    with pytest.raises(TraceMLError, match="there is no trace"):
        server.answer({"do": "read", "offset": 0})

    server.answer({**OPEN, "first": 0})
    assert _train_until(server, "recorded", "failed")["state"] == "recorded"


def test_a_trace_above_its_limit_is_not_kept(server: ProfileServer) -> None:
    """The words name both sizes."""
    server.answer({**OPEN, "limit_bytes": 1000})
    told = _train_until(server, "recorded", "failed")

    assert told["state"] == "failed"
    assert "and the limit is 1 KiB: profile fewer steps" in told["why"]


def test_a_window_that_never_begins_is_given_up(server: ProfileServer) -> None:
    """After its time; the next one can be opened."""
    server.answer({**OPEN, "first": 10**9, "limit_s": 0.2})
    told = _train_until(server, "failed")

    assert told["why"] == "its steps did not end within 0.2 s"
    server.answer({**OPEN, "first": 0})
    assert _train_until(server, "recorded", "failed")["state"] == "recorded"


def test_requests_that_make_no_sense_are_refused(server: ProfileServer, traced: Traced) -> None:  # noqa: F811
    """An unknown part, and a rank whose steps are not traced."""
    with pytest.raises(TraceMLError, match="known: state, open, calls, read, close"):
        server.answer({"do": "dance"})

    traced.instrumentation.clock.stop()
    with pytest.raises(TraceMLError, match="its steps are not traced"):
        server.answer(OPEN)
