"""The agent: the launcher's process on each host.

It imports no torch and has one thread with one loop, so it always answers. It forwards the workers' output and results,
reports how they end, and when the launcher is gone, it ends them and everything that they have started.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from traceml.launch.agent.address_probe import AddressProbe
from traceml.launch.agent.machine import count_gpus
from traceml.launch.agent.worker_group import WorkerGroup
from traceml.launch.agent.zygote_client import ZygoteClient, ZygoteSpec
from traceml.launch.shared.channel import Channel
from traceml.launch.shared.channel_frames import ChannelClosedError
from traceml.launch.shared.descriptor_limit import raise_descriptor_limit
from traceml.launch.shared.launch_messages import (
    AskWorkers,
    ChildEnded,
    CollectStacks,
    FailedToFork,
    Forked,
    Idle,
    Message,
    Prepare,
    Prepared,
    Probe,
    Probed,
    Release,
    Reserve,
    Reserved,
    Stacks,
    Start,
    StopWorkers,
    StreamOpened,
    Tunnel,
    TunnelReady,
    ZygoteFailed,
    ZygoteReady,
)
from traceml.launch.shared.payload_buffer import PayloadBuffer
from traceml.launch.shared.process_cleanup import ended_children, find_leftovers, terminate_all
from traceml.launch.shared.tunnel import TunnelListener
from traceml.process_ends import end_of_status, in_slurm_job

__all__ = ["Agent"]

# An agent without work ends after this time: it holds the memory of torch.
_IDLE_S = 600.0
_LAST_GRACE_S = 1.0
# In a step of Slurm: its SIGTERM for all may have ended the launcher first, and Slurm sends SIGKILL 30 s after it.
_SLURM_GRACE_S = 25.0
_SLURM_DELAY_S = 1.0  # between the launcher's end and Slurm's SIGTERM here
_PAYLOAD_WINDOW_BYTES = 8 * 1024 * 1024
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class _EndAgent(Exception):  # noqa: N818 - control flow, not an error
    """Ends the agent's loop; the text is the reason."""


class Agent:
    """Serves one launcher over one channel. Use `run` once.

    Args:
        mark: the job's processes have it in their environment; the launcher knows it from the hello.
        silence_s: longest silence of the launcher while it has work here; 0: without limit.
    """

    def __init__(self, channel: Channel, *, mark: str, silence_s: float) -> None:
        self._channel, self._mark, self._silence_s = channel, mark, silence_s
        self._descriptors = raise_descriptor_limit()
        self._selector = selectors.DefaultSelector()
        self._zygote: ZygoteClient | None = None
        self._group: WorkerGroup | None = None
        self._wanted: tuple[Prepare, ZygoteSpec] | None = None
        self._preparing = False
        self._listener: socket.socket | None = None
        self._probe: AddressProbe | None = None
        self._payloads: dict[int, PayloadBuffer] = {}
        self._listeners: dict[str, TunnelListener] = {}
        self._signals: set[int] = set()
        # before its end Slurm sends SIGTERM to all processes of a step, and workers may have time to save until SIGKILL
        self._spares, self._parent = in_slurm_job(), os.getppid()
        self._has_spared = False
        self._busy_s = time.monotonic()

    def run(self) -> str:
        """Serve until the launcher is gone or ends the agent; end everything and return the reason."""
        wakeup, poked = os.pipe()
        for fd in (wakeup, poked):
            os.set_blocking(fd, False)

        signal.set_wakeup_fd(poked, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda which, _: self._signals.add(which))

        self._selector.register(wakeup, selectors.EVENT_READ, lambda _: os.read(wakeup, 4096))
        self._selector.register(self._channel.read_fd, selectors.EVENT_READ, self._receive)
        try:
            while True:
                self._iterate()
        except _EndAgent as end:
            return str(end)
        except ChannelClosedError as error:
            return error.reason
        finally:
            self._end()

    def _iterate(self) -> None:
        wait_s = 1.0 if self._group is None else self._group.tick()
        self._channel.flush()
        self._channel.watch_write(self._selector)
        registered = self._selector.get_map()
        for key, events in self._selector.select(wait_s):
            if registered.get(key.fd) is key:  # an earlier callback may have closed it
                key.data(events)

        self._handle_signals()
        if self._probe is not None:
            self._probe.tick()

        now_s = time.monotonic()
        if self._group is not None and self._group.idle:
            self._group = None

        if self._group is not None or self._preparing:
            self._busy_s = now_s
            self._channel.check(self._silence_s)
            return

        self._channel.forget_silence()
        if now_s - self._busy_s > _IDLE_S:
            raise _EndAgent("nothing to do")

    def _handle_signals(self) -> None:
        if not self._signals:
            return

        signals, self._signals = self._signals, set()
        if self._spares and os.getppid() == self._parent and signal.SIGTERM in signals:
            signals.remove(signal.SIGTERM)
            self._has_spared = True

        if signals & {signal.SIGTERM, signal.SIGHUP}:
            raise _EndAgent(f"signal {signal.Signals(min(signals & {signal.SIGTERM, signal.SIGHUP})).name}")

        for pid, status in ended_children():
            if self._zygote is not None and pid == self._zygote.pid:
                self._zygote_ended(status)
            elif self._group is not None:
                self._group.ended(pid, status)

    def _end(self) -> None:
        """End all workers, the processes that they have started, and the zygote."""
        for number in (signal.SIGTERM, signal.SIGHUP):  # while Slurm's may still come, it is noted by the handler
            if not self._spares:
                signal.signal(number, signal.SIG_IGN)

        zygote, ask_s = self._zygote, time.monotonic() + self._delay_s
        terminate_all(
            lambda: find_leftovers([os.getpid()], mark=self._mark, spare=[] if zygote is None else [zygote.pid]),
            grace_s=_SLURM_GRACE_S if self._spares else _LAST_GRACE_S,
            asks=lambda: time.monotonic() >= ask_s and not self._is_slurm_ending(),
        )
        if zygote is not None:
            zygote.close()
            terminate_all(lambda: find_leftovers([os.getpid()], mark=self._mark), grace_s=0)

    @property
    def _delay_s(self) -> float:
        """The time until workers are sent SIGTERM: a second one of ours would come into a handler that saves."""
        return _SLURM_DELAY_S if self._spares else 0

    def _is_slurm_ending(self) -> bool:
        """Return whether Slurm has sent SIGTERM to all processes of the step."""
        return self._has_spared or (self._spares and signal.SIGTERM in self._signals)

    # --- messages of the launcher ------------------------------------------------------------------------------------

    def _receive(self, _events: int) -> None:
        self._busy_s = time.monotonic()  # a launcher that waits for other hosts pings us; one that keeps us does not
        for message in self._channel.receive():
            _HANDLERS[type(message)](self, message)

    def _on_prepare(self, message: Prepare) -> None:
        """Start a zygote that can make the job's workers, unless the present one can."""
        for job in [job for job in self._listeners if job != message.job]:
            self._listeners.pop(job).close()

        self._drop_leftovers()
        env_file, cwd = message.env_file, message.cwd
        if error := _folder_error(cwd):
            self._send_prepared(message.job, error={"kind": "cwd", "text": f"{cwd}: {error}"})
            return

        path = None if env_file is None else str(Path(cwd, Path(env_file).expanduser()))
        spec = ZygoteSpec(
            message.env, path, tuple(message.sys_path), message.need_torch, cwd, _stamp(path), message.is_whole
        )
        self._wanted = (message, spec)
        if self._zygote is not None and self._zygote.ready is not None and self._zygote.spec.serves(spec):
            self._send_prepared(message.job)
            return

        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

        self._preparing = True
        try:
            self._zygote = ZygoteClient(
                self._selector,
                spec,
                mark=self._mark,
                descriptors=self._descriptors,
                on_message=self._on_zygote,
                on_output=self._forward_output,
            )
        except OSError as error:
            self._send_prepared(message.job, error={"kind": "died", "text": str(error)})

    def _on_stream(self, message: StreamOpened) -> None:
        if message.kind == "payload":
            self._accept_payload(message.id, message.size, message.path)
        elif not any(listener.accept_answer(message) for listener in self._listeners.values()):
            self._channel.accept(message.id, lambda _: None, lambda _: None)  # of a closed connection

    def _accept_payload(self, number: int, size: int, path: str | None) -> None:
        """Receive the workers' call: as bytes, or as a memory file that a launcher on this host has filled."""
        sink: Callable[[memoryview], object] = len
        if path is None:
            self._payloads[number] = PayloadBuffer(size, shared=True)
            sink = self._payloads[number].feed

        self._channel.accept(
            number, sink, lambda error: self._payload_ended(number, path, error), window_bytes=_PAYLOAD_WINDOW_BYTES
        )

    def _payload_ended(self, number: int, path: str | None, error: dict[str, Any] | None) -> None:
        if path is not None and error is None:
            try:
                self._payloads[number] = PayloadBuffer.open_path(path)
            except OSError:  # the launcher has abandoned the job
                return

        if error is not None:
            if number in self._payloads:
                self._payloads.pop(number).close()
        elif number in self._payloads and self._group is not None and self._group.payload == number:
            self._group.send_payload(self._payloads.pop(number))

    def _on_reserve(self, message: Reserve) -> None:
        """Bind the port at which the ranks meet."""
        job, address = message.job, message.address
        try:
            family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((address, 0), family=family, backlog=2048)
        except OSError as error:
            self._channel.send(Reserved(job=job, error=f"{address}: {error.strerror or error}"))
            return

        self._channel.send(Reserved(job=job, address=address, port=self._listener.getsockname()[1]))

    def _on_probe(self, message: Probe) -> None:
        """Check that the ranks' port can be reached from here."""
        self._probe = AddressProbe(
            self._selector,
            message.address,
            message.port,
            lambda error: self._channel.send(Probed(job=message.job, error=error)),
        )

    def _on_start(self, message: Start) -> None:
        assert self._wanted is not None
        assert self._zygote is not None
        prepare, spec = self._wanted
        listener, self._listener = self._listener, None
        if listener is not None:
            _drop_connections(listener)

        self._group = WorkerGroup(
            self._selector,
            self._channel,
            self._zygote,
            message,
            prepare=prepare,
            variables=self._zygote.worker_variables(spec),
            listener=listener,
        )
        number = message.payload
        if number in self._payloads and self._payloads[number].complete:
            self._group.send_payload(self._payloads.pop(number))

    def _on_release(self, _message: Release) -> None:
        if self._group is not None:
            self._group.release()

    def _group_of(self, job: str) -> WorkerGroup | None:
        return self._group if self._group is not None and self._group.job == job else None

    def _on_ask(self, message: AskWorkers) -> None:
        if (group := self._group_of(message.job)) is not None:
            group.ask(self._delay_s, self._is_slurm_ending)

    def _on_stop(self, message: StopWorkers) -> None:
        if (group := self._group_of(message.job)) is not None:
            group.stop(message.grace_s, message.exit_s)
        else:
            self._drop_leftovers()
            self._channel.send(Idle(job=message.job))

    def _on_collect_stacks(self, message: CollectStacks) -> None:
        if (group := self._group_of(message.job)) is not None:
            group.request_stacks()
        else:
            self._channel.send(Stacks(job=message.job, ranks={}))

    def _on_tunnel(self, message: Tunnel) -> None:
        job = message.job
        try:
            listener = self._listeners[job] = TunnelListener(self._selector, self._channel, job=job)
        except OSError as error:
            self._channel.send(TunnelReady(job=job, port=0, error=str(error)))
            return

        self._channel.send(TunnelReady(job=job, port=listener.port))

    # --- messages of the zygote --------------------------------------------------------------------------------------

    def _on_zygote(self, message: Message) -> None:
        if isinstance(message, ZygoteReady):
            self._send_prepared(self._wanted_job)
        elif isinstance(message, ZygoteFailed):
            self._send_prepared(self._wanted_job, error={"kind": message.kind, "text": message.text})
        elif isinstance(message, Forked) and self._group is not None:
            self._group.forked(message.rank, message.pid)
        elif isinstance(message, FailedToFork) and self._group is not None:
            self._group.fork_failed(message.rank, message.text)
        elif isinstance(message, ChildEnded) and self._group is not None:
            self._group.ended(message.pid, message.status)

    @property
    def _wanted_job(self) -> str:
        return "" if self._wanted is None else self._wanted[0].job

    def _zygote_ended(self, status: int) -> None:
        zygote, self._zygote = self._zygote, None
        assert zygote is not None
        how = end_of_status(os.waitstatus_to_exitcode(status))
        zygote.close()
        if self._preparing:
            kind = "died" if zygote.up or zygote.spec.env_file is None else "env_file"
            text = zygote.output.decode("utf-8", "replace") + f"the process {how}"
            self._send_prepared(self._wanted_job, error={"kind": kind, "text": text})

        if self._group is not None:
            self._group.zygote_lost(how)

    def _send_prepared(self, job: str, *, error: dict[str, str] | None = None) -> None:
        self._preparing = False
        ready = None if self._zygote is None else self._zygote.ready
        gpus = count_gpus(self._workers_environ(ready), None if ready is None else ready.gpus)
        output = "" if self._zygote is None else self._zygote.output.decode("utf-8", "replace")
        self._channel.send(Prepared(job=job, gpus=gpus, error=error, env_file_log=output))

    def _workers_environ(self, ready: ZygoteReady | None) -> dict[str, str]:
        """Return the variables of the job's workers, as far as they decide which GPUs these see."""
        if self._wanted is None:
            return dict(os.environ)

        _, spec = self._wanted
        environ = spec.environ
        if spec.env_file is not None and ready is not None:
            environ.pop(_VISIBLE_GPUS, None)
            if ready.cuda_visible_devices is not None:
                environ[_VISIBLE_GPUS] = ready.cuda_visible_devices

        return environ

    def _forward_output(self, data: bytes) -> None:
        """Forward output of the zygote or env_file to stderr, which the launcher reads."""
        with contextlib.suppress(OSError):
            os.write(2, data)

    def _drop_leftovers(self) -> None:
        """Close what an earlier job has requested and not used."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

        for receiver in self._payloads.values():
            receiver.close()

        self._payloads.clear()


_HANDLERS: Mapping[type[Message], Callable[[Agent, Any], None]] = {
    Prepare: Agent._on_prepare,
    StreamOpened: Agent._on_stream,
    Tunnel: Agent._on_tunnel,
    Reserve: Agent._on_reserve,
    Probe: Agent._on_probe,
    Start: Agent._on_start,
    Release: Agent._on_release,
    CollectStacks: Agent._on_collect_stacks,
    AskWorkers: Agent._on_ask,
    StopWorkers: Agent._on_stop,
}


def _drop_connections(listener: socket.socket) -> None:
    """Accept and close what has connected so far: the probes of other hosts."""
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()

    listener.setblocking(True)


def _folder_error(folder: str) -> str | None:
    """Return why a folder cannot be a working directory, or None."""
    try:
        os.close(os.open(folder, os.O_PATH | os.O_DIRECTORY))
    except OSError as error:
        return error.strerror

    return None if os.access(folder, os.X_OK) else "no permission"


def _stamp(path: str | None) -> tuple[int, ...]:
    """Return numbers that change when a file changes."""
    try:
        facts = Path(path).stat() if path is not None else None
    except OSError:
        return (0,)

    return () if facts is None else (facts.st_mtime_ns, facts.st_size, facts.st_ino)
