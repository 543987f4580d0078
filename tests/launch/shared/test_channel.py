"""The control channel: frames, turns, credit, noise, silence."""

from __future__ import annotations

import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest

from traceml.errors import ProtocolError
from traceml.launch.shared import channel as module
from traceml.launch.shared.channel import Channel
from traceml.launch.shared.channel_frames import GREETING, ChannelClosedError
from traceml.launch.shared.channel_streams import STREAM_WINDOW_BYTES
from traceml.launch.shared.launch_messages import Idle, Message, Ping, Release, Reserve, Snapshot, StreamOpened


class Pair:
    """Two ends of a channel in one process, and a loop that moves what they have to say."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        a, b = ours.detach(), theirs.detach()
        self.launcher = Channel(a, os.dup(a), side="launcher")
        self.agent = Channel(b, os.dup(b), side="agent")
        self.heard: dict[Channel, list[Message]] = {self.launcher: [], self.agent: []}

    def run(self, until: Callable[[], bool]) -> None:
        """Run both loops until the condition holds."""
        deadline = time.monotonic() + 120
        with selectors.DefaultSelector() as selector:
            for each in self.heard:
                selector.register(each.read_fd, selectors.EVENT_READ, each)

            while not until():
                assert time.monotonic() < deadline, "the loop did not come to its end"
                for each in self.heard:
                    each.flush()

                for key, _ in selector.select(0.01):
                    self.heard[key.data] += key.data.receive()

    def close(self) -> None:
        self.launcher.close()
        self.agent.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def _repeat(*steps: Callable[[], object]) -> None:
    """Do the steps again and again, until one of them raises or far too often."""
    for _ in range(1000):
        for step in steps:
            step()


def _names(messages: list[Message]) -> list[str]:
    return [message.t for message in messages]


def _frame(**fields: Any) -> bytes:
    """Return the frame of a message with any fields."""
    body = msgpack.packb(fields)
    return struct.pack(">IBI", len(body), 0, 0) + bytes(body)


def test_messages_arrive_in_order_and_whole(pair: Pair) -> None:
    """Messages of any size travel both ways."""
    for i in range(100):
        pair.launcher.send(Reserve(job=str(i), address="x" * (i * 5000)))

    about = {"job": "a", "rank": 3, "pid": 7, "snapshot": {"raw": b"\x00\xff", "nothing": None}, "traced": {}}
    pair.agent.send(Snapshot(**about))
    pair.run(lambda: len(pair.heard[pair.agent]) == 100 and len(pair.heard[pair.launcher]) == 1)

    reserves = [message for message in pair.heard[pair.agent] if isinstance(message, Reserve)]
    assert [(m.job, len(m.address)) for m in reserves] == [(str(i), i * 5000) for i in range(100)]
    assert [message.to_map() for message in pair.heard[pair.launcher]] == [{"t": "snapshot", **about}]


def test_what_cannot_travel_is_refused(pair: Pair) -> None:
    """A field that msgpack does not know is an error of the sender, and nothing is sent."""
    with pytest.raises(ProtocolError, match="'reserve'"):
        pair.launcher.send(Reserve(job="a", address=object()))

    assert not pair.launcher.wants_write


def test_a_stream_arrives_as_it_was_written(pair: Pair) -> None:
    """Bytes of a stream far larger than its window come whole and in order, and its end is told once."""
    data = os.urandom(9_000_001)
    got, ends = bytearray(), []
    stream = pair.launcher.open_stream(StreamOpened(kind="payload", size=len(data)))
    stream.write(memoryview(data)[:5_000_000])
    stream.write(b"")
    stream.write(memoryview(data)[5_000_000:])
    stream.end()
    pair.run(lambda: bool(pair.heard[pair.agent]))
    about = pair.heard[pair.agent][0]
    assert isinstance(about, StreamOpened)
    pair.agent.accept(about.id, got.extend, ends.append, window_bytes=1 << 20)
    pair.run(lambda: bool(ends))

    assert about.to_map() == {"t": "stream", "id": stream.id, "kind": "payload", "size": len(data)}
    assert got == data
    assert ends == [None]


def test_a_stream_that_was_over_before_it_was_accepted_is_kept(pair: Pair) -> None:
    """Early bytes reach the sink, and so does the reason of a bad end."""
    stream = pair.agent.open_stream(StreamOpened(kind="log"))
    stream.write(b"last words")
    stream.end({"why": "the disk is full"})
    pair.run(lambda: bool(pair.heard[pair.launcher]) and not pair.agent.wants_write)
    pair.launcher.send(Release(job="j"))
    pair.run(lambda: bool(pair.heard[pair.agent]))
    got, ends = bytearray(), []
    pair.run(lambda: not pair.agent.wants_write)
    pair.launcher.accept(stream.id, got.extend, ends.append)

    assert got == b"last words"
    assert ends == [{"why": "the disk is full"}]


def test_an_empty_stream_has_an_end(pair: Pair) -> None:
    """A stream without a byte is told as complete."""
    ends: list[Any] = []
    stream = pair.agent.open_stream(StreamOpened(kind="log"))
    pair.run(lambda: bool(pair.heard[pair.launcher]))
    pair.launcher.accept(stream.id, lambda view: None, ends.append)
    stream.end()
    pair.run(lambda: bool(ends))

    assert ends == [None]


def test_a_slow_reader_holds_back_its_stream_only(pair: Pair) -> None:
    """Without credit one stream waits; another one and the messages go on."""
    slow, fast = pair.agent.open_stream(StreamOpened(kind="log")), pair.agent.open_stream(StreamOpened(kind="log"))
    slow.write(bytes(3_000_000))
    fast.write(bytes(3_000_000))
    fast.end()
    pair.run(lambda: len(pair.heard[pair.launcher]) == 2)
    kept, got, ends = [], [], []
    taken = pair.launcher.accept(slow.id, lambda view: kept.append(len(view)), ends.append, manual=True)
    pair.launcher.accept(fast.id, lambda view: got.append(len(view)), ends.append)
    pair.run(lambda: len(ends) == 1)
    pair.agent.send(Idle(job="a"))
    pair.run(lambda: len(pair.heard[pair.launcher]) == 3)

    assert sum(got) == 3_000_000
    assert sum(kept) == STREAM_WINDOW_BYTES
    assert slow.queued_bytes == 3_000_000 - STREAM_WINDOW_BYTES
    assert slow.writable_bytes == 0

    while sum(kept) < 3_000_000:
        before = sum(kept)
        taken.grant(before - sum(kept) or STREAM_WINDOW_BYTES)
        pair.run(lambda before=before: sum(kept) > before)

    assert sum(kept) == 3_000_000


def test_messages_overtake_streams(pair: Pair) -> None:
    """A message sent behind megabytes of a stream arrives before their end."""
    ends: list[int] = []
    stream = pair.launcher.open_stream(StreamOpened(kind="payload"))
    pair.run(lambda: bool(pair.heard[pair.agent]))
    pair.agent.accept(
        stream.id, lambda view: None, lambda error: ends.append(len(pair.heard[pair.agent])), window_bytes=64 << 20
    )
    pair.run(lambda: stream.writable_bytes > 32 << 20)
    stream.write(bytes(32 << 20))
    stream.end()
    pair.launcher.flush()
    pair.launcher.send(Release(job="j"))
    pair.run(lambda: bool(ends))

    assert ends == [2]
    assert _names(pair.heard[pair.agent]) == ["stream", "release"]


def test_the_owner_hears_when_more_may_be_written(pair: Pair) -> None:
    """`on_drain` comes when what was written has left and credit is there."""
    got, drains, rounds = bytearray(), [], 20
    stream = pair.agent.open_stream(StreamOpened(kind="log"))

    def more() -> None:
        drains.append(stream.writable_bytes)
        if len(drains) < rounds:
            stream.write(bytes(stream.writable_bytes))
        elif len(drains) == rounds:
            stream.end()

    stream.on_drain = more
    pair.run(lambda: bool(pair.heard[pair.launcher]))
    ends: list[Any] = []
    pair.launcher.accept(stream.id, got.extend, ends.append)
    stream.write(b"x")
    pair.run(lambda: bool(ends))

    assert len(got) == 1 + sum(drains[: rounds - 1])
    assert all(drains)


def test_noise_before_the_greeting_is_kept_apart(pair: Pair) -> None:
    """Output of a shell's start-up files before the greeting disturbs nothing."""
    read, write = os.pipe()
    launcher = Channel(read, os.dup(write), side="launcher", greeting=True)
    bytes_sent = b"Welcome to node 3\r\n\x00" + GREETING + _frame(t="package")
    messages: list[Message] = []
    for i in range(len(bytes_sent)):
        os.write(write, bytes_sent[i : i + 1])
        messages += launcher.receive()

    launcher.close()
    os.close(write)

    assert launcher.noise == b"Welcome to node 3\r\n\x00"
    assert _names(messages) == ["package"]


def test_an_opening_is_made_when_it_is_written_and_comes_first() -> None:
    """It costs nothing until the channel is flushed; messages that were sent before are behind it."""
    reading, writing = os.pipe()
    channel = Channel(os.dup(reading), writing, side="launcher")
    made: list[bytes] = []

    def make() -> bytes:
        made.append(b"program")
        return made[-1]

    channel.send(Ping())
    channel.open_with(make)
    assert (made, channel.wants_write) == ([], True)

    channel.flush()
    assert (made, channel.wants_write) == ([b"program"], False)
    assert os.read(reading, 100).startswith(b"program")
    channel.close()
    os.close(reading)


def test_endless_noise_is_no_agent() -> None:
    """A program that only prints is not waited for until memory ends."""
    read, write = os.pipe()
    launcher = Channel(read, os.dup(write), side="launcher", greeting=True)
    with pytest.raises(ChannelClosedError, match="no greeting"):
        _repeat(lambda: os.write(write, b"y\n" * 1000), launcher.receive)

    launcher.close()
    os.close(write)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"bash: python: command not found\n", "invalid frame"),
        (struct.pack(">IBI", 4, 0, 0) + b"\xc1\xc1\xc1\xc1", "not msgpack"),
        (struct.pack(">IBI", 1, 0, 0) + b"\x01", "not a map"),
        (struct.pack(">IBI", 1, 1, 2) + b"\x01", "not opened"),
        (struct.pack(">IBI", 1 << 20, 1, 2), "invalid frame"),
        (struct.pack(">IBI", 3, 2, 2) + b"abc", "credit of a wrong size"),
        (_frame(t="probe", job="a"), "'probe' without address, port"),
        (_frame(t="stream", kind="payload"), "invalid stream number 0"),
        (_frame(t="stream", id="2", kind="payload"), "invalid stream number '2'"),
    ],
)
def test_garbage_closes_the_channel(pair: Pair, data: bytes, match: str) -> None:
    """Bytes that are no frame are told as such, and nothing after them is believed."""
    os.write(pair.launcher.write_fd, data)
    with pytest.raises(ChannelClosedError, match=match):
        _repeat(pair.agent.receive)


def test_more_than_was_allowed_closes_the_channel(pair: Pair) -> None:
    """A peer that ignores the credit cannot fill the memory of this side."""
    stream = pair.launcher.open_stream(StreamOpened(kind="payload"))
    stream._credit_bytes = 1 << 40
    stream.write(bytes(STREAM_WINDOW_BYTES + 1))
    with pytest.raises(ChannelClosedError, match="more than it was allowed"):
        pair.run(lambda: False)


def test_the_end_of_the_other_side_is_reported(pair: Pair) -> None:
    """End of file is an end, on the reading and on the writing side."""
    pair.agent.close()
    with pytest.raises(ChannelClosedError, match="the other side closed it"):
        pair.launcher.receive()

    with pytest.raises(ChannelClosedError, match="cannot write"):
        _repeat(lambda: pair.launcher.send(Ping()), pair.launcher.flush)


def test_silence_is_noticed_and_a_living_peer_is_not_silent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time counts as silence only while the loop runs; a ping is answered by the other side's channel."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    launcher, agent = pair.launcher, pair.agent
    launcher._checked_s = now[0]
    now[0] += 3600  # suspended for an hour
    launcher.check(10)
    for _ in range(60):
        now[0] += 1
        launcher.check(10)
        launcher.flush()
        if agent.receive() == [] and agent.wants_write:
            agent.flush()
            assert launcher.receive() == []

    def wait_a_second() -> None:
        now[0] += 1

    with pytest.raises(ChannelClosedError, match="nothing was received"):
        _repeat(wait_a_second, lambda: launcher.check(10))


def test_a_message_larger_than_the_pipe_does_not_block() -> None:
    """`flush` writes what fits and returns."""
    read, write = os.pipe()
    other_read, other_write = os.pipe()
    launcher = Channel(other_read, write, side="launcher")
    launcher.send(Reserve(job="a", address="x" * 5_000_000))
    launcher.flush()

    assert launcher.wants_write

    launcher.close()
    os.close(read)
    os.close(other_write)
