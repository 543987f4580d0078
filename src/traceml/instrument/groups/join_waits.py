"""Waits of ranks that have left `with Join(...)` for those that still have data: they answer their collectives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.phase_timer import PhaseTimer

__all__ = ["patch_join"]

MODULE = "torch.distributed.algorithms.join"


@uncounted
def patch_join(patches: Patches, clock: PhaseTimer, report: Callable[[dict[str, Any]], None]) -> None:
    """Report the step that has the wait at the end of each `with Join(...)`."""

    def reporting(original: Callable[..., Any]) -> Callable[..., Any]:
        def exit_(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if clock.is_training_thread():
                report({"kind": "joined", "step": clock.step})

            return result

        return exit_

    join = sys.modules[MODULE].Join
    patches.wrap(join, "__exit__", reporting(join.__exit__))
