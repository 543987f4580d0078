"""Tracing without a line of code: `TRACEML=1 python train.py`, by torch's entry point for backends.

Every process that imports torch gets here, also launchers, their tools and workers of loaders. Launchers and helpers
are left alone. In any other process a recorder starts, but it asks for no aggregator and leaves no run until the
process creates an optimizer, joins a process group, ends a step or logs a value.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from traceml.fail_open import fail_open
from traceml.inspection.loaded_modules import imports_main_again, multiprocessing_parent
from traceml.installation import warn_of_foreign
from traceml.session.traceml_variable import is_switched_on

__all__ = ["start_if_wanted"]

_log = logging.getLogger("traceml")

# Modules and commands that start ranks or compile; none trains in its own process.
_LAUNCHERS = frozenset(
    (
        "torch.distributed.run",
        "torch.distributed.launch",
        "torchrun",
        "torchx",
        "torch._inductor.compile_worker",
        "accelerate",
        "accelerate-launch",
        "accelerate.commands.launch",
        "accelerate.commands.accelerate_cli",
        "deepspeed",
        "deepspeed.launcher.launch",
        "deepspeed.launcher.runner",
        "horovodrun",
        "ray",
        "ray.scripts.scripts",
    )
)
_OURS = ("traceml", "traceml_torch")
_LAUNCHED = frozenset((f"{_OURS[0]}.launch.agent", f"{_OURS[0]}.launch.worker"))  # programs of `traceml launch`
_SERVERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")


def start_if_wanted() -> None:
    """Trace this process if `TRACEML` is on or a traced job has started it; a failure is logged and never raised."""
    with fail_open(_log, "session", "this process is not traced"):
        in_job = bool(os.environ.get("TRACEML_ADDRESS"))  # of `traceml run` or `launch`, which trace their ranks
        if not (in_job or is_switched_on()) or not _may_train():
            return

        if in_job:
            _start_in_job()
        else:
            warn_of_foreign()
            _start()


def _may_train() -> bool:
    """Whether this process may train, and is not traced in another way."""
    from traceml.recorder.current_recorder import current_recorder

    if current_recorder() is not None:  # also a disabled one: the script has decided
        return False

    return _LAUNCHERS.isdisjoint(_program()) and not (_is_ours() or _serves_multiprocessing())


def _is_ours() -> bool:
    module, script = _program()
    return module.partition(".")[0] in _OURS or script in _OURS or not _LAUNCHED.isdisjoint(sys.modules)


def _program() -> tuple[str, str]:
    """Return the module given to `python -m`, "" without one, and the name of the script."""
    spec: Any = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = str(getattr(spec, "name", "") or _module_to_run()).removesuffix(".__main__")
    return name, Path(sys.argv[0]).name if sys.argv else ""


def _module_to_run() -> str:
    """Return the module of `python -m` while its packages are imported: torch itself, for torch.distributed.run."""
    return sys.orig_argv[-len(sys.argv)].removeprefix("-m") if sys.argv[:1] == ["-m"] else ""


def _serves_multiprocessing() -> bool:
    """Whether this is a process that only forks others or cleans up after them."""
    return sys.argv[:1] == ["-c"] and any(server in word for word in sys.orig_argv for server in _SERVERS)


def _start_in_job() -> None:
    """Trace a program that a rank has started, or has become by `exec`: the script may only prepare the training."""
    from traceml.recorder.identity import is_of_traced_job
    from traceml.session.children import at_training_setup
    from traceml.session.startup import start_in_child

    if is_of_traced_job():
        at_training_setup(start_in_child)


def _start() -> None:
    from traceml.session.children import at_training_setup
    from traceml.session.startup import start_held, start_in_child

    if imports_main_again() or multiprocessing_parent() is not None:
        at_training_setup(start_in_child)  # workers of loaders and pools neither join nor make any
    else:
        start_held()
