"""Signals between the processes of a job on one host."""

from __future__ import annotations

import signal

__all__ = ["STACK_SIGNAL"]

STACK_SIGNAL = signal.SIGRTMAX - 3
"""Makes a worker's faulthandler write its Python stacks. SIGUSR1 and SIGUSR2 stay free for the user."""
