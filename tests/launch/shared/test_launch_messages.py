"""Messages of a launch: each has a handler, and what is no such message is refused or ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import pytest

from traceml.errors import ProtocolError
from traceml.launch.agent import agent
from traceml.launch.agent.worker_group import WORKER_MESSAGES
from traceml.launch.agent.worker_state import STACK_MESSAGES
from traceml.launch.agent.zygote_client import ZYGOTE_MESSAGES
from traceml.launch.launcher.job import job_state
from traceml.launch.shared.launch_messages import FROM_AGENT, FROM_LAUNCHER, Message, Ping, Pong, Probe, Start, decode


@pytest.mark.parametrize(
    ("kinds", "handlers"),
    [(FROM_LAUNCHER, agent._HANDLERS), (FROM_AGENT, job_state._HANDLERS)],
    ids=["agent", "launcher"],
)
def test_each_message_of_the_channel_has_the_handler_that_takes_it(
    kinds: Sequence[type[Message]], handlers: Mapping[type[Message], Callable[..., None]]
) -> None:
    """Pings are answered by the channel itself."""
    taken = {kind: get_type_hints(handler) for kind, handler in handlers.items()}

    assert {*handlers, Ping, Pong} == set(kinds)
    assert [kind.t for kind, hints in taken.items() if kind not in hints.values()] == []


@pytest.mark.parametrize("kinds", [FROM_LAUNCHER, FROM_AGENT, ZYGOTE_MESSAGES, WORKER_MESSAGES, STACK_MESSAGES])
def test_names_differ_where_they_are_told_apart(kinds: Sequence[type[Message]]) -> None:
    """In one direction of a connection a name means one message."""
    assert len({kind.t for kind in kinds}) == len(kinds)


def test_a_message_arrives_with_the_fields_that_it_declares() -> None:
    """Fields that are left out have their default; a field that is not known is ignored."""
    probe = decode({"t": "probe", "job": "a", "address": "b", "port": 1, "new": 2}, FROM_LAUNCHER)

    assert isinstance(probe, Probe)
    assert probe.to_map() == {"t": "probe", "job": "a", "address": "b", "port": 1}
    assert Start.received(dict.fromkeys(Start.required, 0)).cpu_affinity


@pytest.mark.parametrize("fields", [{}, {"t": None}, {"t": "odd"}, {"t": ["probe"]}, {"t": "hello"}])
def test_an_unknown_message_is_none(fields: dict[str, Any]) -> None:
    """So is one of the other direction."""
    assert decode(fields, FROM_LAUNCHER) is None


def test_a_message_without_a_field_is_named_with_it() -> None:
    """The error says what is missing of which message."""
    with pytest.raises(ProtocolError, match="'probe' without address, job"):
        decode({"t": "probe", "port": 1}, FROM_LAUNCHER)
