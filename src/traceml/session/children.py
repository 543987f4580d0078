"""Trainings in child processes: one that joins a process group or makes an optimizer is a rank of its parent's run.

`torch.multiprocessing.spawn` and `multiprocessing.Process` start a function. It is wrapped in one that starts tracing
at the first of these. Workers of data loaders and pools do neither. What `os.fork` has made is not traced, and says so.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing.process
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from traceml.fail_open import fail_open
from traceml.ids import detect_rank
from traceml.inspection.loaded_modules import multiprocessing_parent
from traceml.recorder.current_recorder import is_enabled, state
from traceml.recorder.identity import inherit_settings
from traceml.session.task_workers import watch_pool_worker

__all__ = ["ChildTarget", "at_training_setup", "watch_children"]

_OTHERS = ("torch.utils.data", "traceml")
_log = logging.getLogger("traceml")


class ChildTarget:
    """Function of a child process that is traced if it trains.

    Args:
        settings: settings that the parent's `init` was given.
    """

    def __init__(self, target: Callable[..., object], start: Callable[[], None], settings: Mapping[str, Any]) -> None:
        self._target, self._start, self._settings = target, start, dict(settings)

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        """Run the function, on the child's side."""
        with fail_open(_log, "session", "a child process trains without tracing"):
            inherit_settings(self._settings)
            at_training_setup(self._start)
            watch_pool_worker(self._target, args)

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
        settings = _settings_of_training(target)
        if settings is not None:
            process._target = ChildTarget(target, start_child, settings)

        try:
            original(process)
        finally:
            if settings is not None and "_target" in vars(process):  # a process that has started drops it
                process._target = target

    start._traceml_watches = True  # type: ignore[attr-defined]
    start.__doc__ = original.__doc__
    process_type.start = start
    os.register_at_fork(after_in_child=_watch_forked)


def _watch_forked() -> None:
    if state.parent is not None:
        with fail_open(_log, "session", "a forked process trains without tracing", once=True):
            at_training_setup(_warn_untraced)


def _warn_untraced() -> None:
    if not is_enabled() and multiprocessing_parent() is None:
        _log.warning(
            "process %d was forked (os.fork) from a traced one and trains without tracing. Start it as a "
            "multiprocessing.Process, or call traceml.init() in it.",
            os.getpid(),
        )


def _settings_of_training(target: Any) -> dict[str, Any] | None:
    """Return the settings of a child whose training would be a rank; None if it is none.

    It is one if this process records and is not one of a launcher's.
    """
    from traceml.recorder.current_recorder import current_recorder

    with fail_open(_log, "session", "a child process trains without tracing", once=True):
        recorder = current_recorder()
        if target is None or recorder is None or not recorder.enabled or detect_rank().source != "single process":
            return None

        is_other = str(getattr(target, "__module__", "")).startswith(_OTHERS)
        return None if is_other else recorder.config.arguments

    return None


def at_training_setup(start: Callable[[], None]) -> None:
    """Call `start` once, before this process joins a process group or makes its first optimizer; nothing without torch.

    A rank whose group never forms has no optimizer.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "optim"):
        return

    setup = _SetupCalls(start)
    setup.watch("__init__", torch.optim.Optimizer)
    modules = [sys.modules.get(f"torch.distributed{name}") for name in ("", ".distributed_c10d")]
    if all(hasattr(each, "init_process_group") for each in modules):
        setup.watch("init_process_group", *modules)


class _SetupCalls:
    """Functions that a training calls at its start; before the first call of any of them, `start` is called."""

    def __init__(self, start: Callable[[], None]) -> None:
        self._start = start
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def watch(self, name: str, *owners: Any) -> None:
        """Watch a function that all the owners have under this name."""
        original = getattr(owners[0], name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            is_outermost = getattr(owners[0], name) is call
            self._begin()
            # `start` may have put a hook around the original; one that was around this function may have been undone
            outermost = getattr(owners[0], name)
            return (outermost if is_outermost and outermost is not call else original)(*args, **kwargs)

        for owner in owners:
            self._replaced.append((owner, name, original, call))
            setattr(owner, name, call)

    def _begin(self) -> None:
        replaced, self._replaced = self._replaced, []
        for owner, name, original, ours in replaced:
            if getattr(owner, name) is ours:
                setattr(owner, name, original)

        if replaced:
            with fail_open(_log, "session", "this process trains without tracing"):
                self._start()
