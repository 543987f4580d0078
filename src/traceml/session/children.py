"""Trainings in child processes: one that creates an optimizer becomes a rank of its parent's run.

`torch.multiprocessing.spawn` and `multiprocessing.Process` start a function. It is wrapped in one that starts tracing
at the first optimizer of the child. Workers of data loaders and pools make none.
"""

from __future__ import annotations

import logging
import multiprocessing.process
import sys
from collections.abc import Callable
from typing import Any

from traceml.fail_open import fail_open
from traceml.ids import detect_rank

__all__ = ["ChildTarget", "at_first_optimizer", "watch_children"]

_OTHERS = ("torch.utils.data", "traceml")
_log = logging.getLogger("traceml")


class ChildTarget:
    """Function of a child process that is traced if it trains."""

    def __init__(self, target: Callable[..., object], start: Callable[[], None]) -> None:
        self._target, self._start = target, start

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        """Run the function, on the child's side."""
        with fail_open(_log, "session", "a child process trains without tracing"):
            at_first_optimizer(self._start)

        return self._target(*args, **kwargs)


def watch_children(start_child: Callable[[], None]) -> None:
    """Trace the trainings of processes that this one starts by `multiprocessing` from now on.

    Args:
        start_child: starts tracing in the child; a function of a module, as spawned children import it.
    """
    process_type: Any = multiprocessing.process.BaseProcess
    original = process_type.start
    if getattr(original, "_traceml_watches", False):
        return

    def start(process: Any) -> None:
        target: Any = getattr(process, "_target", None)
        traced = _may_train(target)
        if traced:
            process._target = ChildTarget(target, start_child)

        try:
            original(process)
        finally:
            if traced and "_target" in vars(process):  # a process that has started drops it
                process._target = target

    start._traceml_watches = True  # type: ignore[attr-defined]
    start.__doc__ = original.__doc__
    process_type.start = start


def _may_train(target: Any) -> bool:
    """Whether a child's training would be a rank: this process is not one of a launcher's, and records."""
    from traceml.recorder.current_recorder import current_recorder

    with fail_open(_log, "session", "a child process trains without tracing", once=True):
        recorder = current_recorder()
        if target is None or recorder is None or not recorder.enabled or detect_rank().source != "single process":
            return False

        return not str(getattr(target, "__module__", "")).startswith(_OTHERS)

    return False


def at_first_optimizer(start: Callable[[], None]) -> None:
    """Call `start` once, when the first optimizer of this process is made; does nothing without torch."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "optim"):
        return

    optimizer_type = torch.optim.Optimizer
    original = optimizer_type.__init__
    is_waiting = True

    def __init__(optimizer: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - name of the replaced method
        nonlocal is_waiting
        if not is_waiting:
            original(optimizer, *args, **kwargs)
            return

        is_waiting = False
        is_outermost = optimizer_type.__init__ is __init__
        if is_outermost:
            optimizer_type.__init__ = original
        with fail_open(_log, "session", "this process trains without tracing"):
            start()

        # `start` may have put a hook around the original
        (optimizer_type.__init__ if is_outermost else original)(optimizer, *args, **kwargs)

    optimizer_type.__init__ = __init__
