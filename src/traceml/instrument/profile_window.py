"""A torch.profiler over some steps of a running training, opened and closed at their boundaries."""

from __future__ import annotations

import gc
import logging
import sys
from _thread import get_ident
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml.clock import clock_pair
from traceml.database.profile_states import ProfileState
from traceml.database.schema import StepFlag
from traceml.fail_open import fail_open
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches

if TYPE_CHECKING:
    from traceml.instrument.step_clock import StepClock

__all__ = ["ProfileWindow"]

_log = logging.getLogger("traceml")

_PROFILED = int(StepFlag.PROFILED)


class ProfileWindow:
    """A profiler over a number of steps. Its methods run on the training thread, except `ask` and `cancel`.

    The profiler is set up in the step before the first one, so that its set-up is not in the trace. All steps in which
    it is set up, records or is stopped get the flag `PROFILED`, and so do those until `release`: the trace is written
    meanwhile, which takes a core.

    Args:
        first_step: the step to begin with, or the next possible one after it.
        with_stacks: record Python functions too, which takes several times as long.
    """

    def __init__(self, clock: StepClock, *, first_step: int, steps: int, with_stacks: bool = False) -> None:
        self.state = ProfileState.WAITING
        self.why = ""
        """Reason of a failure."""
        self.first_step, self.steps = first_step, steps
        self.clock_pair = (0, 0)
        """The monotonic and the wall clock at its start, in nanoseconds."""
        self._clock, self._with_stacks = clock, with_stacks
        self._profiler: Any = None
        self._mark: Any = None
        self._left = 0
        self._is_ours = False
        self._is_released = False
        self._patches = Patches()

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in either way."""
        return self.state in (ProfileState.RECORDED, ProfileState.FAILED)

    def ask(self) -> None:
        """Ask the training thread to open it. To be repeated while it waits: a step that ends now may miss it."""
        if self.state is ProfileState.WAITING:
            self._clock.call_at_boundary(self._cross)

    def cancel(self, why: str) -> None:
        """End it at the next boundary; one that has not begun ends now."""
        if not self.why:
            self.why = why
        if self.state is ProfileState.WAITING:
            self.state = ProfileState.FAILED

    def abandon(self, why: str) -> None:
        """Stop the profiler before its last step has ended."""
        if not self.is_over:
            self._end(why)

    def release(self) -> None:
        """Return the steps to their usual path, as the trace is written or will not be; on any thread."""
        self._is_released = True

    def save(self, path: Path) -> None:
        """Write the recorded trace as JSON, on any thread, and release it.

        Raises:
            OSError: it cannot be written.
        """
        profiler, self._profiler = self._profiler, None
        profiler.export_chrome_trace(str(path))

    def _cross(self) -> int:
        """Take the next step; return the flags of the step that begins."""
        if self.state is ProfileState.RECORDED and not self._is_released:
            return _PROFILED

        if self.is_over:
            self._clock.call_at_boundary(None)
            return 0

        try:
            return self._next_state()
        except Exception as error:  # noqa: BLE001 - whatever torch raises, the training continues
            _log.debug("the profiler failed", exc_info=error)
            self._end(f"torch.profiler failed: {type(error).__name__}: {error}")
            return _PROFILED

    def _next_state(self) -> int:
        if self.why:
            self._end(self.why)
        elif self.state is ProfileState.WAITING:
            if self._clock.step < self.first_step - 1:
                return 0

            self._set_up()
        elif not self._mark:
            self._start()
        else:
            self._next_step()

        return _PROFILED

    def _set_up(self) -> None:
        if why := _other_profiler():
            self._end(why)
            return

        import torch

        self._patch()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)

        self._profiler = torch.profiler.profile(activities=kinds, with_stack=self._with_stacks)
        self._as_ours(self._profiler.prepare_trace)
        self.state = ProfileState.OPEN

    def _start(self) -> None:
        self.clock_pair = clock_pair()
        self._as_ours(self._profiler.start_trace)
        self.first_step, self._left = self._clock.step, self.steps
        self._begin_mark()

    def _next_step(self) -> None:
        self._mark.__exit__(None, None, None)
        self._left -= 1
        if self._left:
            self._begin_mark()
        else:
            self._end("")

    def _begin_mark(self) -> None:
        """Mark the step in the trace, as torch's own profilers do."""
        import torch

        self._mark = torch.autograd.profiler.record_function(f"ProfilerStep#{self._clock.step}")
        self._mark.__enter__()

    def _end(self, why: str) -> None:
        """Stop the profiler; without a reason its trace is complete."""
        try:
            if self._profiler is not None and self.state is ProfileState.OPEN:
                self._stop()
        except Exception as error:  # noqa: BLE001 - whatever torch raises, the training continues
            why = why or f"torch.profiler failed: {type(error).__name__}: {error}"
        finally:
            self._patches.restore()
            self.why = why
            if why:
                self._profiler = None
                self._clock.call_at_boundary(None)

            self.state = ProfileState.FAILED if why else ProfileState.RECORDED

    def _stop(self) -> None:
        if not self._mark:  # it has been prepared only: a trace that is started can be stopped
            self._as_ours(self._profiler.start_trace)

        self._as_ours(self._profiler.stop_trace)

    def _as_ours(self, function: Callable[[], object]) -> None:
        self._is_ours = True
        try:
            function()
        finally:
            self._is_ours = False

    def _patch(self) -> None:
        """Give way to a profiler that the script starts: torch has one per thread, and raises for a second."""
        import torch

        for name in ("_prepare_profiler", "_enable_profiler"):
            if hasattr(torch.autograd.profiler, name):
                original = getattr(torch.autograd.profiler, name)
                self._patches.wrap(torch.autograd.profiler, name, self._giving_way(original))

    @uncounted
    def _giving_way(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._is_ours and not self.is_over and self._clock.thread == get_ident():
                with fail_open(_log, "instrument", "a profile could not be ended"):
                    self._end("the script started a profiler of its own meanwhile")

            return original(*args, **kwargs)

        return call


def _other_profiler() -> str:
    """Return why no profiler can be started now: the script has one; empty if it can."""
    import torch

    if torch.autograd._profiler_enabled():
        return "the script runs a profiler of its own"

    profile, action = torch.profiler.profile, torch.profiler.ProfilerAction.WARMUP
    made = [each for each in gc.get_objects() if type(each) is profile] if "torch.profiler" in sys.modules else []
    is_warming_up = any(each.profiler is not None and each.current_action is action for each in made)
    return "a profiler of the script warms up" if is_warming_up else ""
