"""Client side of a connection: a recorder, an agent, or a command.

One thread owns a `Connection`. No call blocks longer than its timeout, and sending never blocks: bytes that the socket
does not take are kept and sent with the next call.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from traceml.clock import clock_pair, jittered, monotonic_ns
from traceml.clock import own_time as time
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError, ProtocolError, TraceMLError
from traceml.fail_open import failures
from traceml.fork_gate import fork_gate
from traceml.formatting import duration_text
from traceml.transport.client_handshake import (
    RECEIVE_BYTES,
    ClientHandshake,
    TemporaryRefusalError,
    client_tls,
    open_socket,
    refusal,
)
from traceml.transport.framing import Decoder, encode, rows_frame
from traceml.transport.hello import Hello
from traceml.trusted_files import GuardedDescriptor

if TYPE_CHECKING:
    from traceml.transport.tls import TlsLayer

__all__ = ["START_S", "ClockOffset", "Connection", "connect"]

START_S = 20.0
"""Time for an aggregator to start: a cold start on a slow disk; usually it is half a second."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_CLOCK_READINGS = 8

_log = logging.getLogger("traceml")


class ClockOffset(NamedTuple):
    """Offset of the aggregator's wall clock from this host's monotonic clock, by the fastest exchange."""

    offset_ns: int  # aggregator's epoch_ns minus this process's monotonic_ns at the same moment
    rtt_ns: int  # duration of that exchange; the offset is wrong by half of it at most
    shift_ns: int = 0  # aggregator's wall clock minus that of this host


def connect(
    host: str,
    port: int,
    hello: Hello,
    token: str | None = None,
    *,
    timeout_s: float = 5.0,
    tries: int | None = None,
    tls: bool = False,
) -> Connection:
    """Connect, trying again until `timeout_s` has passed.

    Args:
        token: the secret to prove; by default the one that this user's aggregator on that port has published.
        timeout_s: time for all tries together.
        tries: give up after this many, even if time is left.

    Raises:
        AggregatorRefusedError: it answered and refused; trying again would not help.
        AggregatorUnavailableError: none answered in time.
    """
    began = time.monotonic()
    pause_s, number = _FIRST_PAUSE_S, 0
    while True:
        left_s = timeout_s - (time.monotonic() - began)
        number += 1
        try:
            return Connection.connect(host, port, hello, token, timeout_s=max(left_s, 0.05), tls=tls)
        except AggregatorUnavailableError as error:
            last = error

        left_s = timeout_s - (time.monotonic() - began)
        if left_s <= 0 or number == tries:
            waited_s = time.monotonic() - began
            raise AggregatorUnavailableError(host, port, waited_s, last.reason, refused=last.refused)

        # A thousand ranks that lost one aggregator must not reconnect in the same instant. The last try is at the end.
        with fork_gate.opened():
            time.sleep(min(jittered(pause_s), left_s))

        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class Connection:
    """A connection on which both sides have proved the token. Made by `connect`.

    Args:
        early: messages that came right behind the welcome.
    """

    def __init__(
        self,
        sock: socket.socket,
        decoder: Decoder,
        welcome: dict[str, Any],
        peer: tuple[str, int],
        early: list[dict[str, Any]],
        tls: TlsLayer | None = None,
    ) -> None:
        _log.debug("connected to the aggregator at %s:%d, which has stored %s", *peer, welcome.get("acked"))
        self.welcome = welcome
        self.acked: dict[str, int] = dict(welcome.get("acked", {}))
        """Per table the number of the next row that the aggregator wants; earlier rows are durable."""
        self.bytes_sent = 0
        self._sock = sock
        self._own = GuardedDescriptor(sock.fileno())
        self._decoder = decoder
        self._tls = tls
        self._peer = peer
        self._unsent = bytearray()
        self._inbox = early
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        sock.setblocking(False)

    @classmethod
    def connect(
        cls, host: str, port: int, hello: Hello, token: str | None = None, *, timeout_s: float = 5.0, tls: bool = False
    ) -> Self:
        """Connect by one try.

        Raises:
            AggregatorRefusedError: the aggregator refused, or does not know this token or version.
            AggregatorUnavailableError: none answered in time.
        """
        began = time.monotonic()
        try:
            sock = open_socket(host, port, timeout_s)
            try:
                shake = ClientHandshake(sock, host, port, began + timeout_s, client_tls() if tls else None)
                welcome = shake.run(hello, token)
            except BaseException:
                sock.close()
                raise
        except (OSError, ProtocolError) as error:
            if isinstance(error, (AggregatorRefusedError, AggregatorUnavailableError)):
                raise

            reason, refused = str(error) or type(error).__name__, isinstance(error, TemporaryRefusalError)
            raise AggregatorUnavailableError(host, port, time.monotonic() - began, reason, refused=refused) from error

        return cls(sock, shake.decoder, welcome, (host, port), shake.early, shake.tls)

    @property
    def address(self) -> str:
        """The aggregator's address, as host:port."""
        return f"{self._peer[0]}:{self._peer[1]}"

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the socket has not taken yet. While there are some, send no more rows: the peer is behind."""
        return len(self._unsent)

    def fileno(self) -> int:
        """Return the socket's descriptor, for `select`."""
        return self._sock.fileno()

    def send_rows(self, table: str, seq: int, n: int, data: bytes) -> int:
        """Send `n` rows of `table`, the first being number `seq`; return the bytes of the frame.

        Raises:
            ConnectionError: the connection is gone.
        """
        return self._send(rows_frame(table, seq, n, data))

    def send(self, message: dict[str, Any]) -> int:
        """Send a message; return the bytes of the frame.

        Raises:
            ConnectionError: the connection is gone.
            ProtocolError: it is too large.
        """
        return self._send(encode(message))

    def receive(self, timeout_s: float = 0.0) -> list[dict[str, Any]]:
        """Return the received messages, waiting up to `timeout_s` for the first; acks go to `acked` instead.

        Also returns after an ack, then perhaps with an empty list. Unsent bytes are sent meanwhile.

        Raises:
            AggregatorRefusedError: the aggregator ended the connection with a reason.
            ConnectionError: the connection is gone.
        """
        if self._inbox:
            timeout_s = 0.0

        if timeout_s <= 0:
            # No poll first: each system call releases the GIL, and a busy training thread takes it.
            self._flush()
            self._fill()

        deadline = time.monotonic() + timeout_s
        while timeout_s > 0:
            left_s = max(0.0, deadline - time.monotonic())
            with fork_gate.opened():
                events = self._poll.poll(left_s * 1000.0)

            if not events:
                break

            self._flush()
            if self._fill():
                break

        messages, self._inbox = self._inbox, []
        return messages

    def flush(self, timeout_s: float) -> bool:
        """Send the unsent bytes, for up to `timeout_s`; return whether all were sent."""
        deadline = time.monotonic() + timeout_s
        while self._unsent and (left_s := deadline - time.monotonic()) > 0:
            with fork_gate.opened():
                self._poll.poll(left_s * 1000.0)

            self._flush()
            self._fill()  # a peer that waits until we read would never read our bytes

        return not self._unsent

    def request(self, name: str, args: dict[str, Any] | None = None, *, timeout_s: float = 5.0) -> dict[str, Any]:
        """Send `command{id, name, args}` and return its `reply`; other messages are kept for `receive`.

        Raises:
            TraceMLError: the aggregator answered with an error.
            TimeoutError: no reply came in time.
            ConnectionError: the connection is gone.
        """
        return self.await_reply(self.send_command(name, args), name, timeout_s=timeout_s)

    def send_command(self, name: str, args: dict[str, Any] | None = None) -> int:
        """Send a command; return its number, for `await_reply`.

        Raises:
            ConnectionError: the connection is gone.
        """
        number = monotonic_ns()
        self.send({"t": "command", "id": number, "name": name, "args": args or {}})
        return number

    def await_reply(self, number: int, name: str, *, timeout_s: float) -> dict[str, Any]:
        """Return the reply to a command; other messages are kept. After a timeout it may be called again.

        Args:
            number: that of `send_command`.
            name: the command, for errors.

        Raises:
            TraceMLError: the aggregator answered with an error.
            TimeoutError: no reply came in time.
            ConnectionError: the connection is gone.
        """
        reply = self._await("reply", time.monotonic() + timeout_s, id=number)
        if reply is None:
            raise TimeoutError(f"the aggregator did not answer {name!r} within {duration_text(timeout_s)}")

        if "error" in reply:
            raise TraceMLError(f"the aggregator answers: {reply['error']}")

        return reply

    def measure_clock(self, *, timeout_s: float = 0.5, is_sent: bool = True) -> ClockOffset | None:
        """Read the aggregator's clock a few times, and send it the fastest result; None without any answer.

        Args:
            is_sent: whether to send it; for clients, which have no rows with stamps, it must not be.
        """
        best: ClockOffset | None = None
        deadline = time.monotonic() + timeout_s
        for _ in range(_CLOCK_READINGS):
            sent_ns = monotonic_ns()
            self.send({"t": "ping", "ns": sent_ns})
            answer = self._await("pong", deadline, ns=sent_ns)
            if answer is None:
                break

            rtt_ns = monotonic_ns() - sent_ns
            if best is None or rtt_ns < best.rtt_ns:
                best = ClockOffset(answer["epoch_ns"] - sent_ns - rtt_ns // 2, rtt_ns)

        if best is None:
            return None

        mono_ns, epoch_ns = clock_pair()
        if is_sent:
            self.send({"t": "clock", "offset_ns": best.offset_ns, "rtt_ns": best.rtt_ns, "pair": [mono_ns, epoch_ns]})

        return best._replace(shift_ns=best.offset_ns + mono_ns - epoch_ns)

    def close(self, reason: str | None = None) -> None:
        """Close; with a `reason`, send `bye{reason}` first, which makes the aggregator commit at once."""
        if reason is not None:
            with contextlib.suppress(OSError):
                self._send_bye(reason)
                self.flush(0.2)

        self._close_socket()

    def finish(self, reason: str, *, timeout_s: float) -> bool:
        """Send `bye` and wait until the aggregator has committed everything; return whether it has."""
        deadline = time.monotonic() + timeout_s
        try:
            self._send_bye(reason)
            return self._await("bye", deadline) is not None
        except ConnectionError:  # closed before its bye: the last acks are in `acked`
            return False
        finally:
            self._close_socket()

    def _check(self) -> None:
        try:
            self._own.check()
        except OSError as error:
            raise ConnectionAbortedError("the script has closed the connection's descriptor") from error

    def _close_socket(self) -> None:
        if self._sock.detach() >= 0:
            self._own.close()

    def _send_bye(self, reason: str) -> None:
        _log.debug("bye to the aggregator at %s:%d: %s", *self._peer, reason)
        handled = failures()
        self.send({"t": "bye", "reason": reason} | ({"failures": handled} if handled else {}))

    def _await(self, kind: str, deadline: float, **facts: int) -> dict[str, Any] | None:
        """Return the first message of a kind with these values, None if it is late; others are kept for `receive`."""
        kept: list[dict[str, Any]] = []
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                messages = self.receive(left_s)
                found = next((each for each in messages if each["t"] == kind and facts.items() <= each.items()), None)
                kept += [each for each in messages if each is not found]
                if found is not None:
                    return found
        finally:
            self._inbox[:0] = kept

        return None

    def _send(self, frame: bytes) -> int:
        if self._tls is not None:
            frame = self._tls.encrypt(frame)

        self.bytes_sent += len(frame)
        if self._unsent:
            self._unsent += frame
            self._flush()
            return len(frame)

        try:
            self._check()
            sent = self._sock.send(frame)
        except BlockingIOError:
            sent = 0

        if sent < len(frame):
            self._unsent += memoryview(frame)[sent:]
            self._poll.modify(self._sock, select.POLLIN | select.POLLOUT)

        return len(frame)

    def _flush(self) -> None:
        if not self._unsent:
            return

        try:
            self._check()
            sent = self._sock.send(self._unsent)
        except BlockingIOError:
            return

        del self._unsent[:sent]
        if not self._unsent:
            self._poll.modify(self._sock, select.POLLIN)

    def _fill(self) -> bool:
        """Read the available bytes; return whether a message was complete."""
        try:
            self._check()
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return False

        if not data:
            raise ConnectionResetError(f"the aggregator at {self._peer[0]}:{self._peer[1]} closed the connection")

        if self._tls is not None:
            data, _ = self._tls.receive(data)  # answers to keys of TLS go out with the next frame

        messages = self._decoder.feed(data)
        for message in messages:
            kind = message["t"]
            if kind == "ack":
                self.acked[message["table"]] = message["seq"]
            elif kind == "refused":
                raise refusal(message, *self._peer)
            else:
                self._inbox.append(message)

        return bool(messages)
