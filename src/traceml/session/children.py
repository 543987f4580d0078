"""Trainings in child processes: one that makes an optimizer becomes a rank of its parent's run.

`torch.multiprocessing.spawn` and `multiprocessing.Process` start a function. While they start it, it is replaced by one
that waits for the first optimizer of the child. Workers of data loaders and pools make none.
"""

from __future__ import annotations

import logging
import multiprocessing.process
import sys
from collections.abc import Callable
from typing import Any

from traceml.fail_open import fail_open
from traceml.ids import detect_rank

__all__ = ["ChildTarget", "watch_children"]

_OTHERS = ("torch.utils.data", "traceml")
_log = logging.getLogger("traceml")


class ChildTarget:
    """Function of a child process that is traced if it trains."""

    def __init__(self, target: Callable[..., object]) -> None:
        self._target = target

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        """Run the function, on the child's side."""
        with fail_open(_log, "session", "a child process trains untraced"):
            _await_optimizer()

        return self._target(*args, **kwargs)


def watch_children() -> None:
    """Trace the trainings of processes that this one starts by `multiprocessing` from now on."""
    process_type: Any = multiprocessing.process.BaseProcess
    original = process_type.start
    if getattr(original, "_traceml_watches", False):
        return

    def start(process: Any) -> None:
        target: Any = getattr(process, "_target", None)
        traced = _may_train(target)
        if traced:
            process._target = ChildTarget(target)

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
    from traceml.recorder.current import current_recorder

    with fail_open(_log, "session", "a child process trains untraced", once=True):
        recorder = current_recorder()
        if target is None or recorder is None or not recorder.enabled or detect_rank().source != "single process":
            return False

        return not str(getattr(target, "__module__", "")).startswith(_OTHERS)

    return False


def _await_optimizer() -> None:
    """Start tracing when the first optimizer of this process is made."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "optim"):
        return

    optimizer_type = torch.optim.Optimizer
    original = optimizer_type.__init__

    def __init__(optimizer: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - name of the replaced method
        if optimizer_type.__init__ is __init__:
            optimizer_type.__init__ = original
            with fail_open(_log, "session", "a child process trains untraced"):
                _start()

        optimizer_type.__init__(optimizer, *args, **kwargs)

    optimizer_type.__init__ = __init__


def _start() -> None:
    from traceml import settings
    from traceml.recorder.identity import settings_of_parent
    from traceml.session.startup import start

    config = settings.load(**{"on_missing": "warn", **settings_of_parent()})
    if config.enabled:
        start(config, wait=False)
