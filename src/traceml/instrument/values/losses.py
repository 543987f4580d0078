"""The loss of each step, read from the tensor on which backward is called.

On the CPU that costs 1 us with warm caches, and 9 with cold ones. So it is read in every step, in every 16th where
steps take less than a millisecond, and in every 64th below a quarter of that: of a loss that is not finite the first
step is known to 16 milliseconds. A loss on a CUDA device is copied to pinned memory in every 16th step, and read once
the device has done so, without waiting for it.
GradScaler's factor is left out. Losses of several backward passes of a step are added.

Fast steps do not all have a row: there are at most 20 rows a second, besides the first ones, the last, and each change
between finite and not.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from traceml.clock import monotonic_ns
from traceml.database.flight.row_rings import Ring
from traceml.fail_open import fail_open
from traceml.instrument.device import level_of
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.step_clock import StepClock
from traceml.instrument.values.step_pace import SHORT_STEP_NS

__all__ = ["CudaLosses", "LossReader", "patch_scale"]

_EVERY_STEP, _SOME_STEPS, _FEW_STEPS = 0, 15, 63
_FIRST_ROWS = 16
_ROW_NS = 50_000_000
_PLACES = 8
_log = logging.getLogger("traceml")
_Origin = tuple[int, int]
"""Step of a loss, and the number of evaluations before it that had losses."""


class CudaLosses:
    """Losses on CUDA devices, copied to pinned memory."""

    def __init__(self) -> None:
        self._pinned: Any = None

    def has(self, tensor: Any) -> bool:
        """Whether a loss is on the device and may be copied now: no graph is captured."""
        return bool(tensor.is_cuda) and not torch.cuda.is_current_stream_capturing()

    def copy(self, tensor: Any, place: int) -> Any:
        """Begin to copy a loss to one of the 8 places; return an event whose `query` shows when it is there."""
        if self._pinned is None:
            self._pinned = torch.empty(_PLACES, dtype=torch.float32, device="cpu", pin_memory=True)

        with torch.no_grad():
            self._pinned[place].copy_(tensor.detach().reshape(()), non_blocking=True)

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        return event

    def value(self, place: int) -> float:
        """Return the loss that was copied to a place."""
        return float(self._pinned[place].item())


class LossReader:
    """Reads losses and appends their rows.

    Args:
        clock: has the step; its `loss_mask` decides which steps are read.
    """

    def __init__(self, clock: StepClock, losses: Ring, device: CudaLosses) -> None:
        self._clock, self._device = clock, device
        self._append = losses.appender("t_ns", "step", "loss")
        self._free = list(range(_PLACES))
        self._copies: deque[tuple[_Origin, int, Any]] = deque()  # (origin, place, event)
        self._origin: _Origin = (-1, 0)
        self._sum = 0.0
        self._was_finite = True
        self._rows = self._row_ns = 0
        self._scaled = self._broken = self._is_on_device = False
        clock.loss_mask = _EVERY_STEP

    def read(self, tensor: Any) -> None:
        """Read the loss of a backward pass, if the tensor is one."""
        try:
            if self._broken:
                return

            if self._scaled:
                self._scaled = False
            elif type(tensor) is not torch.Tensor or torch._C._len_torch_dispatch_stack() or tensor.numel() != 1:
                return
            elif tensor.is_cpu:  # with few calls of ours: the code of each is another place that is not in the caches
                self._add(self._origin_now(), tensor.item())
            else:
                self._read_device(tensor)
        except Exception as error:  # noqa: BLE001 - fail open
            self._fail(error)

    def read_unscaled(self, tensor: Any) -> None:
        """Read a loss that GradScaler is about to multiply; backward's tensor is not read then."""
        if not self._clock.rows & self._clock.loss_mask:
            self.read(tensor)
            self._scaled = True

    def plan(self, step_ns: int) -> None:
        """Decide which steps are read, given how long they take."""
        if not self._is_on_device:
            some = _SOME_STEPS if step_ns > SHORT_STEP_NS // 4 else _FEW_STEPS
            self._clock.loss_mask = _EVERY_STEP if step_ns > SHORT_STEP_NS else some

    def finish(self) -> None:
        """Append what is complete, at the end of the run."""
        try:
            self._collect()
            step, evaluated = self._origin
            if evaluated == self._clock.evaluated_losses or step != self._origin_now()[0]:  # else of an evaluation
                self._flush(is_last=True)
        except Exception as error:  # noqa: BLE001 - fail open
            self._fail(error)

    def _read_device(self, tensor: Any) -> None:
        if not self._device.has(tensor):
            return

        self._is_on_device = True
        self._clock.loss_mask = _SOME_STEPS
        self._collect()
        if self._free:
            place = self._free.pop()
            self._copies.append((self._origin_now(), place, self._device.copy(tensor, place)))

    def _origin_now(self) -> _Origin:
        """Return the step in training; the step before may still wait for its end, as after an epoch."""
        clock = self._clock
        return clock.rows + clock.before + clock.ended.may_be_step, clock.evaluated_losses

    def _collect(self) -> None:
        """Take the copies that are complete."""
        while self._copies and self._copies[0][2].query():
            origin, place, _ = self._copies.popleft()
            self._free.append(place)
            self._add(origin, self._device.value(place))

    def _add(self, origin: _Origin, loss: float) -> None:
        if origin != self._origin:
            if origin[0] != self._origin[0]:  # else those before are of an evaluation
                self._flush()

            self._origin, self._sum = origin, 0.0

        self._sum += loss

    def _flush(self, *, is_last: bool = False) -> None:
        """Append the row of the step that was read latest, unless there are many; that of the run's last one always."""
        step, _ = self._origin
        if step < 0:
            return

        now, is_finite = monotonic_ns(), self._sum - self._sum == 0
        if is_last or self._rows < _FIRST_ROWS or is_finite != self._was_finite or now - self._row_ns >= _ROW_NS:
            self._append(now, step, self._sum)
            self._rows += 1
            self._row_ns, self._was_finite = now, is_finite

        self._origin = (-1, 0)

    def _fail(self, error: Exception) -> None:
        """Read no further losses."""
        self._broken = True
        self._copies.clear()
        with fail_open(_log, "instrument", "losses are no longer read", level=level_of(error)):
            raise error


@uncounted
def patch_scale(patches: Patches, clock: StepClock, read_unscaled: Callable[[Any], None], scaler_type: Any) -> None:
    """Read losses before the method `scale` of a class of scalers multiplies them."""
    original = scaler_type.scale

    def scale(self: Any, outputs: Any) -> Any:
        if not is_dynamo_compiling() and self.is_enabled():
            try:
                read_unscaled(outputs)
            except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
                clock.fail(error)

        return original(self, outputs)

    patches.wrap(scaler_type, "scale", scale)
