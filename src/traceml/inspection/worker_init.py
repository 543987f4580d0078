"""Start of a loader worker that inherits nothing: it lets others ask for its Python stacks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from traceml.fail_open import fail_open
from traceml.inspection import stack_signal

__all__ = ["ReportingInit"]

_log = logging.getLogger("traceml")


class ReportingInit:
    """A `worker_init_fn` that registers the worker's stacks, then calls the user's own.

    Attributes:
        original: the user's; None without one.
    """

    def __init__(self, original: Callable[[int], object] | None) -> None:
        self.original = original

    def __call__(self, worker: int) -> None:
        """Set up the worker of this number, in its process."""
        with fail_open(_log, "inspection", "the stacks of a loader worker cannot be reported"):
            if not stack_signal.is_registered(os.getpid()):
                stack_signal.register(stack_signal.create_stack_file())

        if self.original is not None:
            self.original(worker)
