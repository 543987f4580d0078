from __future__ import annotations

import pytest

from traceml.errors import ProtocolError
from traceml.transport.hello import Hello, schemas

GOOD = Hello(role="rank", run="job", rank=3, world_size=4).to_message(1, b"n" * 32, b"m" * 32)


def test_round_trip():
    """A hello arrives unchanged; unknown keys are ignored."""
    hello = Hello(role="rank", run="job", rank=3, world_size=4, flight="/dev/shm/x")

    assert Hello.from_message({**hello.to_message(1, b"", b""), "from_the_future": 1}) == hello


def test_fields_of_the_contract_are_there():
    """The message has the fields which the contract names."""
    contract = {
        "t",
        "v",
        "role",
        "run",
        "rank",
        "world_size",
        "local_rank",
        "host",
        "pid",
        "nonce",
        "mac",
        "schemas",
        "clock",
    }

    assert contract <= set(GOOD)
    assert GOOD["schemas"]["steps"][0] == ["step", "q"]
    assert schemas()["names"] == "msgpack"


def test_long_command_is_cut():
    """A command line of any length does not make the hello one that is refused."""
    message = Hello(command="x" * 100_000).to_message(1, b"", b"")

    assert 100 < len(message["command"]) < 100_000
    assert Hello.from_message(message).command == message["command"]


def test_restarts_left_come_from_torchrun(monkeypatch):
    """torchrun's variables tell how often the workers may still be started again."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")

    assert Hello().restarts_left == 2


@pytest.mark.parametrize(
    "wrong",
    [{"role": "boss"}, {"rank": "0"}, {"rank": -1}, {"rank": True}, {"rank": 4}, {"world_size": 2**40}, {"run": 7},
     {"world_size": 65_537}, {"run": "x" * 5000}, {"schemas": []}, {"clock": [1]}, {"clock": ["a", "b"]},
     {"pid": 2**63}],
)  # fmt: skip
def test_wrong_fields_are_named(wrong):
    """A hello that cannot be is refused with the name of the field."""
    with pytest.raises(ProtocolError, match=next(iter(wrong)).replace("world_size", "above the limit of 65,536")):
        Hello.from_message({**GOOD, **wrong})


@pytest.mark.parametrize("name", ["role", "run", "rank", "host", "pid", "schemas", "clock"])
def test_missing_fields_are_named(name):
    """A hello that lacks a field is refused with its name."""
    with pytest.raises(ProtocolError, match=name):
        Hello.from_message({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize("clock", [None, 1_795_166_895, 1795166895.5, {"epoch": 5}])
def test_a_peer_without_two_clocks_is_taken_in(clock):
    """A peer that sends its clock in another form is accepted; its clock is not known."""
    assert Hello.from_message({**GOOD, "clock": clock}).clock == (0, 0)
