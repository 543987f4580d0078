"""The process above the agent, which outlives it: it ends what agent and zygote leave when both are killed at once."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from traceml.launch.wire.process_cleanup import become_subreaper, die_with_parent, find_leftovers, terminate_all

__all__ = ["fork_under_reaper"]


def fork_under_reaper() -> None:
    """Go on as a child of this process, which waits for its end; return in the child only.

    To be called while this process is small, as that is what stays of it.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the launcher may have held back some
    become_subreaper()
    parent, agent = os.getpid(), os.fork()
    if agent == 0:
        die_with_parent(parent, signal.SIGTERM)
        return

    _watch(agent)


def _watch(agent: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda which, _: os.kill(agent, which))

    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):  # the channel is the agent's: its end must be seen at the other side
        os.dup2(null, fd)

    ended, status = 0, 0
    while ended != agent:
        ended, status = os.waitpid(-1, 0)

    if not os.WIFSIGNALED(status):
        os._exit(os.WEXITSTATUS(status))

    # whatever the job started is below us: orphans became our children
    terminate_all(lambda: find_leftovers([os.getpid()], mark=None), grace_s=0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(128 + os.WTERMSIG(status))  # of a signal that does not end us
