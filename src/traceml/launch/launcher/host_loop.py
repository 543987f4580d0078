"""One loop over the channels of all hosts, in the thread of whoever called `launch`: no threads, no signal handlers."""

from __future__ import annotations

import contextlib
import select
import selectors
import time
from collections.abc import Callable
from typing import Any

from traceml.errors import AgentFailedError
from traceml.launch.launcher.job_host import Member
from traceml.launch.wire.channel import ChannelClosedError

__all__ = ["Loop"]

_TICK_S = 0.25
_CHECK_S = 1.0
_LAST_WORDS_S = 1.0
# An agent that says nothing for this long is lost. It is asked for a sign of life long before.
_SILENCE_S = 15.0
# One that was kept from an earlier launch and does not answer is rather started anew.
_WARM_SILENCE_S = 4.0


class Loop:
    """Reads and writes the channels of members while a condition is waited for. A context manager.

    Args:
        message: called with a member and a message of its agent.
        said: called with a member and what its ssh, srun or agent wrote to stderr.
        lost: called with a member and why, once its agent is out of reach.
        tick: called a few times a second.

    Attributes:
        selector: others may register descriptors, with a callable that takes the events as data.
    """

    def __init__(
        self,
        *,
        message: Callable[[Member, dict[str, Any]], None],
        said: Callable[[Member, bytes], None],
        lost: Callable[[Member, AgentFailedError], None],
        tick: Callable[[], None],
    ) -> None:
        self.selector = selectors.DefaultSelector()
        self._message, self._said, self._lost, self._tick = message, said, lost, tick
        self._members: list[Member] = []
        self._ticked_s = self._checked_s = time.monotonic()

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.selector.close()

    def add(self, member: Member) -> None:
        """Take care of a member's channel."""
        self._members.append(member)
        self._register(member)

    def remove(self, member: Member) -> None:
        """Take care of a member no more; its link stays as it is."""
        if member in self._members:
            self._members.remove(member)
            self._unregister(member)

    def until(self, condition: Callable[[], object], limit_s: float | None = None) -> bool:
        """Run until the condition holds.

        Args:
            condition: looked at after each round.
            limit_s: how long to wait at most; None for ever.

        Returns:
            Whether it holds; False when the time is over.
        """
        deadline_s = None if limit_s is None else time.monotonic() + limit_s
        self._flush()
        while not condition():
            wait_s = _TICK_S if deadline_s is None else min(_TICK_S, deadline_s - time.monotonic())
            if wait_s < 0:
                return False

            self._turn(wait_s)

        return True

    def breathe(self) -> None:
        """Do what can be done at once: for who is busy for longer."""
        self._flush()
        self._turn(0)

    def _turn(self, wait_s: float) -> None:
        registered = self.selector.get_map()
        for key, events in self.selector.select(wait_s):
            if registered.get(key.fd) is key:  # what came before it may have closed it
                key.data(events)

        now_s = time.monotonic()
        if now_s - self._ticked_s >= _TICK_S:
            self._ticked_s = now_s
            self._tick()

        if now_s - self._checked_s >= _CHECK_S:
            self._checked_s = now_s
            self._check()

        self._flush()

    def _check(self) -> None:
        for member in list(self._members):
            # ssh may take its time to connect, and has limits of its own; later there is no excuse
            limit_s = _WARM_SILENCE_S if member.warm else _SILENCE_S if member.hello else 0
            try:
                if member.hello:
                    member.link.channel.check(limit_s)
            except ChannelClosedError as error:
                self._lose(member, error.reason)

    def _flush(self) -> None:
        for member in list(self._members):
            channel = member.link.channel
            try:
                if channel.wants_write:
                    channel.flush()
            except ChannelClosedError as error:
                # what it said last is worth more than that it listens no more
                if not self._drain(member):
                    self._lose(member, error.reason)

                continue

            if channel.wants_write != member.watches_write:
                self._watch_write(member, channel.wants_write)

    def _drain(self, member: Member) -> bool:
        """Read on from an agent that does not listen any more; return whether its end was met and told."""
        deadline_s, link = time.monotonic() + _LAST_WORDS_S, member.link
        while member in self._members and member.link is link and time.monotonic() < deadline_s:
            if select.select([link.channel.read_fd], [], [], _TICK_S)[0]:
                self._receive(member)

        return member not in self._members or member.link is not link  # ended, or replaced by a new one

    def _receive(self, member: Member) -> None:
        try:
            messages = member.link.channel.receive()
        except ChannelClosedError as error:
            self._lose(member, error.reason)
            return

        for message in messages:
            if member not in self._members:  # a message before it has ended the member
                return

            self._message(member, message)

    def _read_errors(self, member: Member) -> None:
        data = member.link.read_errors()
        if data is None:
            self.selector.unregister(member.link.errors_fd)
        elif data:
            self._said(member, data)

    def _lose(self, member: Member, reason: str) -> None:
        if member not in self._members:
            return

        self.remove(member)
        if member.warm:
            member.link.close()
            member.link, member.warm = member.start(), False
            self.add(member)
            return

        member.lost = True
        self._lost(member, member.link.failure(reason))

    def _register(self, member: Member) -> None:
        link = member.link
        self.selector.register(link.channel.read_fd, selectors.EVENT_READ, lambda _: self._receive(member))
        self.selector.register(link.errors_fd, selectors.EVENT_READ, lambda _: self._read_errors(member))
        member.watches_write = False

    def _unregister(self, member: Member) -> None:
        self._watch_write(member, False)
        for fd in (member.link.channel.read_fd, member.link.errors_fd):
            with contextlib.suppress(KeyError):
                self.selector.unregister(fd)

    def _watch_write(self, member: Member, wanted: bool) -> None:
        if wanted == member.watches_write:
            return

        member.watches_write = wanted
        fd = member.link.channel.write_fd
        if wanted:
            self.selector.register(fd, selectors.EVENT_WRITE, lambda _: None)  # every round flushes
        else:
            self.selector.unregister(fd)
