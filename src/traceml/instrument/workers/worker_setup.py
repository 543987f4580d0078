"""Set-up of loader workers, before the user's code runs in them: their stacks, and the samples of their lines.

Forked workers inherit the rank's handler for stacks; spawned ones register their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from typing import Any

from traceml.fail_open import fail_open
from traceml.inspection.stack_signal import ReportingInit
from traceml.instrument.facts.descriptions import start_method
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches

__all__ = ["set_up_stateful_workers", "set_up_workers"]

_FAILED = "spawned loader workers cannot report stacks and lines"
_log = logging.getLogger("traceml")


@uncounted
def set_up_workers(patches: Patches, start: Callable[[], object] | None) -> None:
    """Let each loader worker report its stacks, and call a function there.

    Args:
        start: called in each worker, without raising; it is pickled for workers that are not forked. None for nothing.
    """
    from torch.utils.data import dataloader

    _replace_init_fn(patches, dataloader._MultiProcessingDataLoaderIter, start, _inherits_nothing)
    if start is not None:
        _start_in_forked(patches, start)


@uncounted
def set_up_stateful_workers(patches: Patches, iterator_type: Any, start: Callable[[], object] | None) -> None:
    """Do the same for torchdata's `StatefulDataLoader`, whose iterator and workers are not torch's."""

    def is_replaced(loader: Any) -> bool:
        return _inherits_nothing(loader) or (start is not None and start_method(loader) == "fork")

    _replace_init_fn(patches, iterator_type, start, is_replaced)


@uncounted
def _replace_init_fn(
    patches: Patches, iterator_type: Any, start: Callable[[], object] | None, is_replaced: Callable[[Any], bool]
) -> None:
    """Replace the `worker_init_fn` of some loaders while an iterator of this type starts their workers."""
    original = iterator_type.__init__

    def __init__(iterator: Any, loader: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - the replaced method
        with _reporting(loader, start, is_replaced):
            original(iterator, loader, *args, **kwargs)

    patches.wrap(iterator_type, "__init__", __init__)


@uncounted
def _start_in_forked(patches: Patches, start: Callable[[], object]) -> None:
    """Call a function in each forked worker. Others unpickle torch's function by its name, so not ours."""
    from torch.utils.data._utils import worker

    original = worker._worker_loop

    def _worker_loop(*args: Any, **kwargs: Any) -> Any:
        start()
        return original(*args, **kwargs)

    patches.wrap(worker, "_worker_loop", _worker_loop)


@contextmanager
def _reporting(loader: Any, start: Callable[[], object] | None, is_replaced: Callable[[Any], bool]) -> Iterator[None]:
    ours = None
    with fail_open(_log, "instrument", _FAILED, once=True):
        if not isinstance(loader.worker_init_fn, ReportingInit) and is_replaced(loader):
            ours = ReportingInit(loader.worker_init_fn, start)
            loader.worker_init_fn = ours

    try:
        yield
    finally:
        with fail_open(_log, "instrument", _FAILED, once=True):
            if ours is not None and loader.worker_init_fn is ours:
                loader.worker_init_fn = ours.original


def _inherits_nothing(loader: Any) -> bool:
    """Whether its workers are new processes, which can import this package."""
    return start_method(loader) not in (None, "fork") and PathFinder.find_spec("traceml") is not None
