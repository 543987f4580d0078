"""Python stacks of spawned loader workers: forked ones inherit the handler of the rank, these register their own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from typing import Any

from traceml.fail_open import fail_open
from traceml.inspection.stack_signal import ReportingInit
from traceml.instrument.facts.descriptions import start_method
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches

__all__ = ["report_worker_stacks"]

_FAILED = "the stacks of spawned loader workers cannot be reported"
_log = logging.getLogger("traceml")


@uncounted
def report_worker_stacks(patches: Patches) -> None:
    """Let each loader worker that is started by spawn or forkserver report its stacks, before the user's code runs."""
    from torch.utils.data import dataloader

    iterator_type: Any = dataloader._MultiProcessingDataLoaderIter
    original = iterator_type.__init__

    def __init__(iterator: Any, loader: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - the replaced method
        with _reporting(loader):
            original(iterator, loader, *args, **kwargs)

    patches.wrap(iterator_type, "__init__", __init__)


@contextmanager
def _reporting(loader: Any) -> Iterator[None]:
    """Replace a loader's `worker_init_fn` while its workers are started."""
    ours = None
    with fail_open(_log, "instrument", _FAILED, once=True):
        if _inherits_nothing(loader):
            ours = ReportingInit(loader.worker_init_fn)
            loader.worker_init_fn = ours

    try:
        yield
    finally:
        with fail_open(_log, "instrument", _FAILED, once=True):
            if ours is not None and loader.worker_init_fn is ours:
                loader.worker_init_fn = ours.original


def _inherits_nothing(loader: Any) -> bool:
    """Whether its workers are new processes, which can import this package."""
    if sys.platform != "linux" or start_method(loader) in (None, "fork"):
        return False

    return not isinstance(loader.worker_init_fn, ReportingInit) and PathFinder.find_spec("traceml") is not None
