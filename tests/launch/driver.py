"""The launcher's end of a channel for tests of the other end: a real agent on this machine, and what it says."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from traceml.launch.launcher.hosts import bootstrap
from traceml.launch.shared import payload
from traceml.launch.shared.channel import Channel
from traceml.launch.shared.channel_frames import ChannelClosedError
from traceml.launch.shared.launch_messages import (
    Message,
    PackageRequest,
    Ping,
    Prepare,
    Release,
    Reserve,
    Start,
    StopWorkers,
    StreamOpened,
)

DEADLINE_S = 120.0


class Driver:
    """Starts an agent as the launcher does, and keeps all that it says.

    Attributes:
        messages: all messages, in order, as they were sent.
        said: bytes of log streams by (rank, fd).
        parcels: received results, errors and flight files by (kind, rank).
        closed: why the channel has ended, or None.
    """

    def __init__(self, command: list[str] | None = None, *, program: bytes = b"", **popen: Any) -> None:
        program = program if command else bootstrap.local_program()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the driver
        self.process = subprocess.Popen(
            command or bootstrap.agent_command(sys.executable),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,
            **popen,
        )
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        self.channel = Channel(os.dup(stdout.fileno()), os.dup(stdin.fileno()), side="launcher", greeting=True)
        stdin.close()
        stdout.close()
        if program:
            self.channel.send_raw(program)

        self.messages: list[dict[str, Any]] = []
        self.said: dict[tuple[int, str], bytearray] = {}
        self.parcels: dict[tuple[str, int], bytearray] = {}
        self.ended: set[int] = set()
        self.closed: str | None = None
        self.job = ""
        self._jobs, self._pinged_s = 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.channel.close()
        try:
            self.process.wait(timeout=240)
        finally:
            self.process.kill()
            self.process.wait()
            words = self.words()
            self.errors.close()

        if error is not None:
            sys.stderr.write(f"--- agent's stderr:\n{words}\n--- {self.messages}\n{self.said}\n")

    def words(self) -> str:
        """Return what the agent and its zygote have written to stderr."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")

    def poll(self) -> None:
        """Read and write once."""
        if self.closed is not None:
            time.sleep(0.02)
            return

        try:
            self.channel.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self.channel.read_fd, selectors.EVENT_READ)
                if self.channel.wants_write:
                    selector.register(self.channel.write_fd, selectors.EVENT_WRITE)

                selector.select(0.05)

            if self.of("hello") and time.monotonic() - self._pinged_s > 0.25:
                self._pinged_s = time.monotonic()
                self.channel.send(Ping())

            for message in self.channel.receive():
                self._take(message)
        except ChannelClosedError as error:
            self.closed = error.reason

    def until(self, condition: Callable[[], Any]) -> Any:
        """Run until the condition holds; return it."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, "what was waited for did not come"
            assert self.process.poll() is None or self.closed is None or condition(), (
                f"the agent is gone: {self.closed}"
            )
            self.poll()

        return found

    def of(self, t: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the messages of this job with a name and values."""
        return [
            each
            for each in self.messages
            if each["t"] == t and each.get("job", self.job) == self.job and fields.items() <= each.items()
        ]

    def wait(self, t: str, count: int = 1, **fields: Any) -> dict[str, Any]:
        """Run until `count` such messages have come; return the last."""
        self.until(lambda: len(self.of(t, **fields)) >= count)
        return self.of(t, **fields)[-1]

    def prepare(self, **fields: Any) -> dict[str, Any]:
        """Have a zygote made for a new job; return what the agent tells of it."""
        self.until(lambda: self.of("hello"))  # before it an agent may read a package, and no messages
        self._jobs += 1
        self.job = f"job {self._jobs}"
        about: dict[str, Any] = {
            "env": dict(os.environ),
            "env_file": None,
            "cwd": str(Path.cwd()),
            "sys_path": [str(Path(__file__).parents[2])],
            "need_torch": False,
        }
        self.channel.send(Prepare(job=self.job, **{**about, **fields}))
        return self.wait("prepared")

    def start(
        self,
        func: Callable[..., Any] | None,
        *args: Any,
        workers: int = 1,
        backend: str | None = None,
        env: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> None:
        """Start workers that run a function, or a script."""
        self.channel.send(Reserve(job=self.job, address="127.0.0.1"))
        port = self.wait("reserved")["port"]
        stream = None
        if func is not None:
            parcel = payload.dump_call(func, args, {})
            stream = self.channel.open_stream(StreamOpened(kind="payload", job=self.job, size=parcel.size_bytes))
            for chunk in parcel.chunks():
                stream.write(chunk)

            stream.end()

        about: dict[str, Any] = {
            "payload": None if stream is None else stream.id,
            "script": None,
            "ranks": list(range(workers)),
            "world_size": workers,
            "group_rank": 0,
            "master_addr": "127.0.0.1",
            "master_port": port,
            "backend": backend,
            "timeout_s": 60,
            "env": dict(env or {}),
            "log_level": 20,
        }
        self.channel.send(Start(job=self.job, **{**about, **fields}))

    def run(self, func: Callable[..., Any], *args: Any, workers: int = 1, **fields: Any) -> list[Any]:
        """Run a function to its good end; return what the workers returned, by rank."""
        self.start(func, *args, workers=workers, **fields)
        self.wait("done", workers)
        self.release()
        return [self.result(rank) for rank in range(workers)]

    def release(self) -> None:
        """Let the workers end; return when nothing is left of them."""
        self.channel.send(Release(job=self.job))
        self.wait("idle")

    def stop(self, grace_s: float = 0.5, exit_s: float = 0) -> None:
        """End the workers; return when nothing is left of them."""
        self.channel.send(StopWorkers(job=self.job, grace_s=grace_s, exit_s=exit_s))
        self.wait("idle")

    def result(self, rank: int) -> Any:
        """Return what a worker returned."""
        assert self.of("done", rank=rank)
        return payload.load(self.parcels["result", rank])

    def error(self, rank: int) -> BaseException:
        """Return what a worker raised."""
        assert self.of("raised", rank=rank)
        found: BaseException = payload.load(self.parcels["error", rank])
        return found

    def text(self, rank: int, fd: str = "out") -> str:
        """Return what a worker wrote in this job."""
        return bytes(self.said.get((rank, fd), b"")).decode(errors="replace")

    def pid(self, rank: int) -> int:
        """Return the process of a worker."""
        pid: int = self.wait("started", rank=rank)["pid"]
        return pid

    def _take(self, message: Message) -> None:
        self.messages.append(message.to_map())
        if isinstance(message, PackageRequest):
            self.channel.send_raw(bootstrap.sent_package())

        if not isinstance(message, StreamOpened):
            return

        number = message.id
        if message.kind == "log":
            kept = self.said[message.rank, message.fd] = bytearray()
        else:
            kept = self.parcels[message.kind, message.rank] = bytearray()

        self.channel.accept(number, kept.extend, lambda _: self.ended.add(number), window_bytes=4 << 20)


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"

    return False
