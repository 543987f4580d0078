"""Program of an agent: its standard streams, its session, its description of this host, and its status."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from traceml.clock import boot_id
from traceml.inspection.kernel_state import process_info
from traceml.launch.agent.machine import addresses
from traceml.launch.shared.channel import Channel
from traceml.launch.shared.channel_frames import GREETING, ChannelClosedError
from traceml.launch.shared.launch_messages import AgentHello
from traceml.launch.shared.payload_buffer import can_reach
from traceml.launch.shared.process_cleanup import become_subreaper

__all__ = ["main"]

# A launcher whose loop runs sends something every few seconds.
_SILENCE_S = 20.0


def main(*, local: bool = False) -> NoReturn:
    """Serve the launcher at standard input and output.

    Args:
        local: whether the launcher runs on this host. Then the bootstrap has sent no greeting, and its end always
            closes the channel: it may be suspended for any time.
    """
    read_fd, write_fd = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)  # accidental output must not get between the frames
    os.close(null)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the launcher handles Ctrl-C of a terminal
    with contextlib.suppress(PermissionError):  # already a leader
        os.setsid()

    become_subreaper()
    channel = Channel(read_fd, write_fd, side="agent")
    if local:
        channel.send_raw(GREETING)

    status = 1
    try:
        reason = _serve(channel, silence_s=0 if local else _SILENCE_S)
        status = 0
        if reason.startswith("signal"):
            sys.stderr.write(f"traceml: the agent was ended by {reason}\n")
            status = 1
    except Exception:  # noqa: BLE001 - the launcher reads it from stderr
        import traceback

        traceback.print_exc()

    with contextlib.suppress(OSError):
        sys.stderr.flush()

    os._exit(status)


def _serve(channel: Channel, *, silence_s: float) -> str:
    """Introduce this host, and serve until the launcher is gone or ends the agent; return the reason."""
    mark = os.urandom(12).hex()
    channel.send(_hello(mark))
    with contextlib.suppress(ChannelClosedError):  # the agent's loop notices it
        channel.flush()

    # after the hello, which launchers wait for on all hosts: most modules are needed for workers alone
    from traceml.launch.agent.agent import Agent

    return Agent(channel, mark=mark, silence_s=silence_s).run()


def _hello(mark: str) -> AgentHello:
    """Return the description of this agent and its host."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    try:
        netns = str(Path("/proc/self/ns/net").readlink())
    except OSError:
        netns = ""

    return AgentHello(
        mark=mark,
        pid=os.getpid(),
        hostname=socket.gethostname(),
        python=sys.version.split()[0],
        executable=sys.executable,
        cores=len(os.sched_getaffinity(0)),
        address=connection[2] if len(connection) == 4 else None,
        peer=connection[0] if len(connection) == 4 else None,
        boot_id=boot_id(),
        netns=netns,
        addresses=list(addresses().values()),
        can_reach_launcher=(reaper := process_info(os.getppid())) is not None and can_reach(reaper.parent),
    )
