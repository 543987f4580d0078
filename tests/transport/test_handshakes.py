from __future__ import annotations

import logging

import pytest

from traceml.transport import handshakes
from traceml.transport.handshakes import OpenHandshakes, RefusalLog


class Connection:
    """A connection that only knows whether it was cut."""

    deadline_s = 0.0
    is_cut = False

    def abort(self) -> None:
        self.is_cut = True


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> OpenHandshakes:
    """Room for three connections and ten bytes."""
    monkeypatch.setattr(handshakes, "MAX_HANDSHAKES", 3)
    monkeypatch.setattr(handshakes, "MAX_UNAUTHENTICATED_BYTES", 10)
    return OpenHandshakes()


def test_oldest_of_too_many_is_cut(small: OpenHandshakes) -> None:
    """A connection that is refused counts as new: it has its time to read the reason."""
    peers = [Connection() for _ in range(5)]
    for peer in peers[:3]:
        small.add(peer, 5.0)

    small.add(peers[0], 2.0)
    small.add(peers[3], 5.0)
    small.discard(peers[2])
    small.add(peers[4], 5.0)

    assert [peer.is_cut for peer in peers] == [False, True, False, False, False]
    assert (len(small), small.cut) == (3, 1)


def test_bytes_of_all_connections_are_bounded(small: OpenHandshakes) -> None:
    """The one that has held bytes for the longest goes; those without any stay."""
    silent, first, second = Connection(), Connection(), Connection()
    for peer in (silent, first, second):
        small.add(peer, 5.0)

    small.hold(first, 3)
    small.hold(second, 6)
    small.hold(first, 4)
    assert (small.held_bytes, small.cut) == (10, 0)
    small.hold(second, 7)

    assert (silent.is_cut, first.is_cut, second.is_cut) == (False, True, False)
    assert small.held_bytes == 7
    small.hold(second, 0)
    assert small.held_bytes == 0


def test_overdue_are_those_whose_time_is_over(small: OpenHandshakes) -> None:
    late, early = Connection(), Connection()
    small.add(late, -1.0)
    small.add(early, 60.0)

    assert small.overdue() == [late]


def test_thousands_of_refusals_are_a_number(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The first ones have their reasons; a full disk of log lines would help an attacker."""
    now_s = 1000.0
    monkeypatch.setattr(handshakes.time, "monotonic", lambda: now_s)
    log = RefusalLog()
    with caplog.at_level(logging.WARNING, "traceml"):
        for number in range(100):
            log.record(f"peer {number}", "garbage")

        now_s += 61
        log.flush()
        log.record("peer 100", "later")

    assert len(caplog.messages) == 22
    assert caplog.messages[0] == "refused peer 0: garbage"
    assert caplog.messages[-2:] == ["refused 80 more connections in the last minute", "refused peer 100: later"]


def test_a_refusal_that_comes_again_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A rank tries again several times a second, as long as the disk is full."""
    log = RefusalLog()
    with caplog.at_level(logging.WARNING, "traceml"):
        for _ in range(10):
            log.record("rank 10.0.0.1", "the disk is full")
            log.record("rank 10.0.0.2", "the disk is full")

    assert caplog.messages == ["refused rank 10.0.0.1: the disk is full", "refused rank 10.0.0.2: the disk is full"]
