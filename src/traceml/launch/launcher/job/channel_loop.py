"""Event loop over the channels of all hosts, in the thread that called `launch`: no threads, no signal handlers."""

from __future__ import annotations

import contextlib
import logging
import select
import selectors
import time
from collections.abc import Callable

from traceml.errors import AgentFailedError
from traceml.launch.launcher.job.job_host import JobHost
from traceml.launch.shared.channel_frames import ChannelClosedError
from traceml.launch.shared.launch_messages import Message

__all__ = ["ChannelLoop"]

_TICK_S = 0.25
_CHECK_S = 1.0
_DRAIN_S = 1.0
# An agent that is silent for this long is lost. It is pinged long before.
_SILENCE_S = 15.0
# An agent that was kept from an earlier launch is replaced sooner.
_WARM_SILENCE_S = 4.0

_log = logging.getLogger("traceml.launch")


class ChannelLoop:
    """Reads and writes the channels of hosts until a condition holds. A context manager.

    Args:
        on_stderr: called with a host and output of its ssh, srun or agent.
        on_lost: called with a host and the reason, once its agent is out of reach.

    Attributes:
        selector: others may register descriptors, with a callable that takes the events as data.
    """

    def __init__(
        self,
        *,
        on_message: Callable[[JobHost, Message], None],
        on_stderr: Callable[[JobHost, bytes], None],
        on_lost: Callable[[JobHost, AgentFailedError], None],
        on_tick: Callable[[], None],
    ) -> None:
        self.selector = selectors.DefaultSelector()
        self._on_message, self._on_stderr, self._on_lost, self._on_tick = on_message, on_stderr, on_lost, on_tick
        self._hosts: list[JobHost] = []
        self._ticked_s = self._checked_s = time.monotonic()

    def __enter__(self) -> ChannelLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.selector.close()

    def add(self, host: JobHost) -> None:
        """Serve a host's channel."""
        self._hosts.append(host)
        self._register(host)

    def remove(self, host: JobHost) -> None:
        """Stop serving a host's channel; its connection stays open."""
        if host in self._hosts:
            self._hosts.remove(host)
            self._unregister(host)

    def run_until(self, condition: Callable[[], object], limit_s: float | None = None) -> bool:
        """Run until the condition holds.

        Args:
            condition: evaluated after each iteration.
            limit_s: longest wait; None: without limit.

        Returns:
            Whether it holds; False when the time is over.
        """
        deadline_s = None if limit_s is None else time.monotonic() + limit_s
        self._flush()
        while not condition():
            wait_s = _TICK_S if deadline_s is None else min(_TICK_S, deadline_s - time.monotonic())
            if wait_s < 0:
                return False

            self._iterate(wait_s)

        return True

    def run_once(self) -> None:
        """Run one iteration without waiting, for a caller that is busy for longer."""
        self._flush()
        self._iterate(0)

    def _iterate(self, wait_s: float) -> None:
        registered = self.selector.get_map()
        for key, events in self.selector.select(wait_s):
            if registered.get(key.fd) is key:  # an earlier callback may have closed it
                key.data(events)

        now_s = time.monotonic()
        if now_s - self._ticked_s >= _TICK_S:
            self._ticked_s = now_s
            self._on_tick()

        if now_s - self._checked_s >= _CHECK_S:
            self._checked_s = now_s
            self._check()

        self._flush()

    def _check(self) -> None:
        for host in list(self._hosts):
            # connecting has no limit here: ssh has limits of its own
            limit_s = _WARM_SILENCE_S if host.warm else _SILENCE_S if host.hello else 0
            try:
                if host.hello:
                    host.connection.channel.check(limit_s)
            except ChannelClosedError as error:
                self._lose(host, error.reason)

    def _flush(self) -> None:
        for host in list(self._hosts):
            channel = host.connection.channel
            try:
                if channel.wants_write:
                    channel.flush()
            except ChannelClosedError as error:
                # read first: the agent's last messages explain more than a closed pipe
                if not self._drain(host):
                    self._lose(host, error.reason)

                continue

            channel.watch_write(self.selector)

    def _drain(self, host: JobHost) -> bool:
        """Read what an agent that no longer listens has sent; return whether its end was reached and handled."""
        deadline_s, connection = time.monotonic() + _DRAIN_S, host.connection
        while host in self._hosts and host.connection is connection and time.monotonic() < deadline_s:
            if select.select([connection.channel.read_fd], [], [], _TICK_S)[0]:
                self._receive(host)

        return host not in self._hosts or host.connection is not connection  # ended, or replaced by a new one

    def _receive(self, host: JobHost) -> None:
        channel = host.connection.channel
        greeted, before = channel.greeted, host.activity
        try:
            messages = channel.receive()
        except ChannelClosedError as error:
            self._lose(host, error.reason)
            return

        if channel.greeted != greeted:
            _log.debug("%s: %s, was %s", host.name, host.activity, before)

        for message in messages:
            if host not in self._hosts:  # an earlier message has removed it
                return

            self._on_message(host, message)

    def _read_errors(self, host: JobHost) -> None:
        data = host.connection.read_errors()
        if data is None:
            self.selector.unregister(host.connection.errors_fd)
        elif data:
            self._on_stderr(host, data)

    def _lose(self, host: JobHost, reason: str) -> None:
        """Record a lost agent, or replace one that was kept from an earlier launch."""
        if host not in self._hosts:
            return

        self.remove(host)
        if host.warm:
            _log.debug("%s: the agent kept from an earlier launch is replaced: %s", host.name, reason)
            host.connection.close()
            host.connection, host.warm = host.start(), False
            self.add(host)
            return

        during = "while the job ran" if host.started else f"while its state was `{host.activity}`"
        host.lost = True
        self._on_lost(host, host.connection.failure(reason, during))

    def _register(self, host: JobHost) -> None:
        connection = host.connection
        self.selector.register(connection.channel.read_fd, selectors.EVENT_READ, lambda _: self._receive(host))
        self.selector.register(connection.errors_fd, selectors.EVENT_READ, lambda _: self._read_errors(host))

    def _unregister(self, host: JobHost) -> None:
        channel = host.connection.channel
        for fd in (channel.read_fd, channel.write_fd, host.connection.errors_fd):
            with contextlib.suppress(KeyError):  # it is not watched
                self.selector.unregister(fd)
