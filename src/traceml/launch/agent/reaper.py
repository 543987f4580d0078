"""Parent process of the agent, which outlives it: it ends the job's processes if agent and zygote are both killed.

Process: the agent, until it forks; then its parent.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from traceml.launch.shared.process_cleanup import become_subreaper, find_leftovers, terminate_all
from traceml.process_ends import die_with_parent, ignore_slurm_warnings

__all__ = ["fork_under_reaper"]


def fork_under_reaper() -> None:
    """Continue in a child of this process, which waits for the child's end; return in the child only.

    Call it early: the parent keeps the memory that this process has now.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the launcher may have blocked some
    ignore_slurm_warnings()
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
    for fd in range(3):  # only the agent may hold the channel open
        os.dup2(null, fd)

    ended, status = 0, 0
    while ended != agent:
        ended, status = os.waitpid(-1, 0)

    if not os.WIFSIGNALED(status):
        os._exit(os.WEXITSTATUS(status))

    # orphans of the job became our children
    terminate_all(lambda: find_leftovers([os.getpid()], mark=None), grace_s=0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(128 + os.WTERMSIG(status))  # if the signal does not end us
