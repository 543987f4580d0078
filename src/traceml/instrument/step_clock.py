"""Where one step ends and the next begins: the state machine behind all hooks.

A step is cut into *segments*, which begin where a data loader is asked for something. What a segment was (training,
evaluation, the next step already) is often known only later; so the clock keeps the accounts as they stood at the last
cut (`snap`), and can still give the time after it to whom it belongs.

The rules, and the loops that they were checked on, are told in `docs/steps.md`.
"""

from __future__ import annotations

from _thread import get_ident
from typing import TYPE_CHECKING, Any

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, Slot, StepFlag
from traceml.instrument.accumulator import (
    ASK,
    DEVICE,
    NOWHERE,
    ON_FORWARD,
    OTHER,
    StepAccumulator,
    StepListener,
)
from traceml.instrument.closure_cells import CellField

if TYPE_CHECKING:
    from traceml.database.flight import FlightFile

__all__ = ["FUSED", "StepClock"]

BACKWARD, OPTIMIZER, CHECKPOINT = int(Phase.BACKWARD), int(Phase.OPTIMIZER), int(Phase.CHECKPOINT)
FUSED = 1  # stands for all optimizers that step inside backward; no object has this id
_EXPLICIT, _INFERRED, _NO_LOADER = int(StepFlag.EXPLICIT), int(StepFlag.INFERRED), int(StepFlag.NO_LOADER)
_STEP_START, _STEP = int(Slot.STEP_START), int(Slot.STEP)
_SAMPLED_MASK = 3  # what costs more than the budget is measured on every 4th step
_SLOW_STEP_NS = 2_000_000  # ... and on every step when they are this long
_HELD_BATCHES = 64  # so many backward passes without any optimizer step: there is none


class StepClock(StepAccumulator):
    """An accumulator that knows where a step ends."""

    last_optimizer = CellField()  # id of the one that stepped last
    usual = CellField()  # what closes a step after its optimizer step ...
    usual_loader = CellField()  # ... when this is its first loader, and nothing else is special

    def __init__(self, flight: FlightFile, listener: StepListener, *, thread: int | None = None) -> None:
        super().__init__(flight, listener, get_ident() if thread is None else thread)
        self.open = False  # a step has begun, ever
        self.explicit = False  # trace_step() bounds the steps
        self.blocks = 0  # nested trace_step() blocks
        self.fresh = True  # no backward pass was seen yet
        self.cut_on_step = True  # without a loader: keep the accounts as they are when an optimizer step ends
        self.anchor: Any = None  # the loader whose batches are trained on
        self.origin: Any = None  # the loader that was asked where this segment began
        self.drained: Any = None  # the loader that had no more batches: one may have been fetched ahead, to be used yet
        self.fetched_ahead = False  # the loader had given this step's batch before it said that it has no more
        self.inferred = False  # there is no optimizer: batches bound the steps
        self.optimizers: set[int] = set()  # ids of all that ever stepped
        self.optimizers_alive = 0
        self.fuses = False  # optimizers step inside backward
        self.depth = 0  # 1 inside an optimizer step that needs care
        self.inner_steps = 0  # optimizer steps inside the one that counts
        self.unclaimed: list[tuple[int, list[int], int]] = []  # where batches ended before any optimizer step
        self.last_optimizer = 0
        self.usual = self.usual_loader = NOWHERE
        self.closes_at = ASK  # a training forward may open the first step

    def boundary(self, t: int, loader: Any) -> None:
        """A loader is asked for something: decide what the segment that ends here was.

        The training loop over one loader does not come here: its steps close by `closes_at`.
        """
        if not self.open:
            self._begin(t)
            self.origin = loader
            return

        idle = self._is_idle() and (self.pending or not self.attempt)
        if idle and loader is self.origin:
            return  # its iterator was made, or its last batch was skipped: all of it is one wait

        if self._is_evaluation():
            self._discard(t, batches=1, evaluating=True)
        elif idle and self.evaluating:
            self._discard(t, batches=0, evaluating=False)  # what followed the last evaluation batch
        elif self.pending and loader is not self.anchor:
            return  # still unknown: the next step already, or another part of this one

        self.origin = loader
        if not self.explicit:
            self._settle(t, loader)
        elif not self.blocks:
            self._cut(t)

    def _settle(self, t: int, loader: Any) -> None:
        if self.anchor is None and self.backwards:
            self.anchor = self.first_loader

        if self.attempt and loader is self.anchor:
            if not self.pending:
                self.commit(t)
                return

            self._close_prefix()

        if not self.optimizers and self.backwards and not self.inferred:
            self._hold(t)

        if self.seg_start != t:
            self._cut(t)

    def _training_forward(self, t: int) -> None:
        """Without a loader this may begin a step."""
        if not self.open:
            self._begin(t)
        elif self.evaluating and self.batch is None and self._is_idle():
            self._discard(t, batches=0, evaluating=False)
            if self.pending and self.anchor is None:
                self._close_prefix()
        elif self.attempt and (self.first_loader is None or self.fetched_ahead) and not self.explicit:
            self.cut_on_step = False  # forwards bound the steps here: no need to keep the end of the optimizer step
            self.commit(t)

    def exhausted(self, loader: Any) -> None:
        """A loader had no more batches: what follows may be training without one, or on a batch fetched ahead."""
        self.drained = loader
        self.evaluated = False
        if self.batches and not self.backwards:
            self.batches += 1

        if self.evaluating:
            self.closes_at = ASK

    def forward_begins(self, t: int, module: Any, *, trains: bool) -> None:
        """A forward begins inside another phase, or while it is not known what the segment is.

        Args:
            t: when.
            module: a weak reference to the module that is called.
            trains: whether gradients are on.
        """
        in_closure = self.depth or self.current == OPTIMIZER  # of the optimizer's step: no step begins there
        if self.closes_at is ON_FORWARD and not in_closure:
            self.commit(t)
        elif self.closes_at is ASK:
            if not trains:
                self.evaluated = True
                return

            if not in_closure:
                self._training_forward(t)

            self.trained = module

    def begin_attempt(self, optimizer: Any, t: int) -> int:
        """An outermost optimizer attempt begins; return the phase to go back to."""
        previous: int = self.current
        ident = id(optimizer)
        if not self.open:
            self._begin(t)

        if ident != self.last_optimizer:
            self.meet(optimizer)

        if previous == BACKWARD:  # all that step inside one backward pass count as one attempt, when it has ended
            self.fused = self.fuses = self.dirty = self.detail = True
        elif self.attempt:
            self.attempted_again(ident, t)

        self.inner_steps = 0
        self.depth = 1
        self.current = OPTIMIZER
        self.open_slots[OPTIMIZER] = t
        return previous

    def end_attempt(self, optimizer: Any, previous: int, start: int, *, failed: bool) -> None:
        """It ended; one that raised is none."""
        self.depth = 0
        self.leave(OPTIMIZER, previous, start)
        if previous != BACKWARD and not failed:
            self.after_step(monotonic_ns(), id(optimizer))

    def attempted_again(self, ident: int, t: int) -> None:
        """An optimizer steps while the open step has stepped already: is this another step?"""
        self.closes_at = NOWHERE  # and no forward in a closure of it closes one
        known = ident == self.attempt or ident in self.attempts
        if self.pending:
            if known:
                if self.batch is not None:
                    self._anchor_at(self.batch)  # a new loader took the place of the last one

                self._close_prefix()
            else:
                self._merge()
        elif known and self.first_loader is None and not self.explicit and ident != FUSED:
            self.cut_on_step = True
            self.usual_loader = NOWHERE
            self.commit(t)

    def after_step(self, t: int, ident: int) -> None:
        """An optimizer attempt ended: from here on the step may close."""
        if not self.open:
            self._begin(t)

        if self.attempt:
            self.attempts.add(ident)
            self.dirty = True
        else:
            self.attempt = ident

        if self.explicit:
            return

        drained, self.drained = self.drained, None
        if self.first_loader is None:
            if self.anchor is not None and drained is self.anchor:
                self._was_fetched_ahead(ident)
            else:
                self._expect_forward(t, ident)

            return

        if self.anchor is None:
            self._anchor_at(self.first_loader)

        self.closes_at = self.usual = self.anchor
        self.usual_loader = self.first_loader

    def _expect_forward(self, t: int, ident: int) -> None:
        """No loader took part: the next training forward closes the step, or an optimizer that steps again."""
        several = self._may_step_again(ident)
        if several or self.cut_on_step:
            self._cut(t)

        if several:
            self.closes_at = NOWHERE if self.anchor is None else self.anchor
        elif self.cut_on_step:
            self.closes_at = ASK
        else:
            self.closes_at = self.usual = ON_FORWARD
            self.usual_loader = None

    def _was_fetched_ahead(self, ident: int) -> None:
        """The anchor had no more batches, and here one was trained on: accelerate's loaders ask for one ahead."""
        self.first_loader = self.anchor
        self.dirty = True
        self.fetched_ahead = not self._may_step_again(ident)
        self.closes_at = ASK if self.fetched_ahead else self.anchor

    def _may_step_again(self, ident: int) -> bool:
        """Whether another optimizer may step in this step."""
        return ident != FUSED and (len(self.optimizers) > 1 or self.optimizers_alive > 1)

    def _anchor_at(self, loader: Any) -> None:
        self.anchor = loader
        self.usual_loader = NOWHERE

    def after_backward(self, t: int) -> None:
        """A backward pass ended that needed care: see whether it was a step by itself."""
        if self.fused:
            self.fused = False
            if self.attempt:
                self.attempted_again(FUSED, t)

            self.after_step(t, FUSED)
        elif self.inferred:
            self.flags |= _INFERRED
            self.dirty = True
            self.after_step(t, FUSED)
        elif not self.optimizers and self.first_loader is None and self.open and not self.explicit:
            self._hold(t)

    def is_detailed(self, step: int) -> bool:
        """Whether own backward and device time of a step are measured.

        By its number, hence the same steps on all ranks; every step once they are long enough not to notice.
        """
        return self.extras and (self.mean_ns > _SLOW_STEP_NS or not step & _SAMPLED_MASK)

    def plan(self) -> None:
        """Decide whether backward passes need care."""
        self.detail = self.fresh or self.fuses or not self.optimizers or self.is_detailed(self.rows)

    def meet(self, optimizer: Any) -> None:
        """An optimizer begins a step and is not the one that did so last."""
        ident = id(optimizer)
        self.last_optimizer = ident
        if ident in self.optimizers:
            return

        self.optimizers.add(ident)
        self.inferred = False
        self.usual_loader = NOWHERE
        self.unclaimed.clear()
        self.plan()
        self.listener.new_optimizer(optimizer)

    def first_backward_begins(self) -> None:
        """Find the models before their gradients are there, and whether there is an optimizer to wait for."""
        self.fresh = False
        alive = self.listener.first_backward()
        if not alive and not self.optimizers:
            self.inferred = True

        if not self.open:
            self._begin(monotonic_ns())

    def adopt_thread(self) -> bool:
        """A backward pass begins on another thread: that one trains, unless this one has done so already."""
        if not self.fresh or not self.thread:
            return False

        self.thread = get_ident()
        self.current = OTHER
        return self.is_here()

    def begin_block(self) -> None:
        """A trace_step() block begins; the first one turns inference off."""
        self.blocks += 1
        if self.blocks > 1:
            return

        t = monotonic_ns()
        self.settle(t)
        if not self.explicit:
            if self.pending:
                self._close_prefix()
            elif self.attempt:
                self.commit(t)

            self.explicit = True
            self.usual_loader = NOWHERE
            self._begin(t)
        elif self.evaluating and self._is_idle():
            self._discard(t, batches=0, evaluating=False)

        if self.eval_ns:
            self._flush_evals(self.rows)

    def end_block(self, *, failed: bool) -> None:
        """A trace_step() block ends; one that raised is no step, and its time belongs to the next."""
        self.blocks -= 1
        if self.blocks or failed:
            return

        t = monotonic_ns()
        self.settle(t)
        self.flags |= _EXPLICIT
        self.dirty = True
        self.commit(t)

    def finish(self) -> None:
        """Training ends: the open step is a row when it has stepped, else it is dropped."""
        t = monotonic_ns()
        self.settle(t)
        if self.open and not self.explicit:
            if self._is_evaluation():
                self._discard(t, batches=1, evaluating=False)
            elif self.evaluating and self._is_idle():
                self._discard(t, batches=0, evaluating=False)

            if self.pending:
                self._close_prefix()
            elif self.attempt:
                self.commit(t)

        if self.eval_ns:
            self._flush_evals(self.rows)

        self.open_slots[_STEP_START], self.open_slots[_STEP] = 0, -1
        self.stop()

    # ---- segments ----

    def _clear(self, t: int) -> None:
        super()._clear(t)
        self.fetched_ahead = False

    def _close_prefix(self) -> None:
        """Append the row of what lay before the cut; what lies after it is the next step."""
        acc, snap = self.acc, self.snap or self.zeros
        snap = snap + [0] * (len(acc) - len(snap))
        flags = self.base_flags | (_NO_LOADER if self.snap_first is None else 0)
        self.note_total(self.base)
        if self.device is not None and self.device.close_prefix(self.rows):
            flags |= DEVICE

        self.append_step(snap, self.snap_end, self.base, self.micro, flags, self.base_own)
        if self.eval_ns:
            self._flush_evals(self.rows)

        self.acc = [after - before for after, before in zip(acc, snap, strict=True)]
        self.first_loader = self.batch
        self.attempt = 0
        self.attempts.clear()
        self.closes_at = ASK
        self._drop_prefix()
        self.open_slots[_STEP_START], self.open_slots[_STEP] = self.seg_start, self.rows

    def _begin(self, t: int) -> None:
        self.open = True
        self.settle(t)
        self._clear(t)

    def _is_idle(self) -> bool:
        """Nothing was computed in this segment."""
        if self.trained is not None or self.evaluated or self.backwards:
            return False

        return self.snap is not None or not self.forward_ns

    def _is_evaluation(self) -> bool:
        """A batch on which a model was called without gradients (or as `eval()`), and which nothing was trained on."""
        if self.backwards or (self.attempt and not self.pending):
            return False

        if self.batch is None:
            return self.drained is not None and self.evaluated  # on one that was fetched ahead

        if self.trained is None:
            return self.evaluated

        module = self.trained()
        return module is not None and not module.training

    def _cut(self, t: int) -> None:
        """End a segment of this step: keep the accounts as they are now."""
        self.settle(t)
        self.snap = self.acc
        self.snap_first = self.first_loader
        self.base += t - self.seg_start
        self.snap_end = self.seg_start = t
        self.pending = bool(self.attempt) and not self.explicit
        self.closes_at = ASK
        self.micro += min(self.backwards, self.batches) if self.batches else self.backwards
        self.base_flags |= self.flags
        self.base_own += self.own
        self.own = self.flags = 0
        unused = max(self.batches - self.backwards, 0)
        self._clear_segment()
        self.batches = unused
        if self.device is not None:
            self.device.cut()

    def _clear_segment(self) -> None:
        self.backwards = self.batches = 0
        self.batch = None
        self.trained, self.evaluated = None, False
        self.dirty = True

    def _discard(self, t: int, *, batches: int, evaluating: bool) -> None:
        """Take the segment out of the step: it was evaluation. What was saved after it stays in the step."""
        snap = [] if self.snap is None else self.snap
        kept = snap + [0] * (len(self.zeros) - len(snap))
        saving = self.acc[CHECKPOINT] - kept[CHECKPOINT]
        kept[CHECKPOINT] += saving
        self.base += saving
        self.acc = kept
        if self.snap is not None:
            self.snap = kept.copy()

        self.eval_ns += t - self.seg_start - saving
        self.eval_batches += batches
        self.eval_end = self.seg_start = t
        self.drained = None
        self.closes_at = ASK
        self.first_loader = None if self.snap is None else self.snap_first
        self.evaluating = evaluating
        self._clear_segment()
        if self.device is not None:
            self.device.discard()

    def _merge(self) -> None:
        """What lies after the cut belongs to the same step."""
        self.snap = None
        self.pending = False

    def _hold(self, t: int) -> None:
        """Remember where a batch ended: it is a step of its own if it turns out that there is no optimizer."""
        self.unclaimed.append((t, self.acc, self.base + t - self.seg_start))
        if len(self.unclaimed) < _HELD_BATCHES:
            return

        self.inferred = True
        before, before_total = self.zeros, 0
        flags = _INFERRED | (_NO_LOADER if self.first_loader is None else 0)
        for end, acc, total in self.unclaimed:
            part = [b - a for b, a in zip(acc, before + [0] * (len(acc) - len(before)), strict=False)]
            self.note_total(total - before_total)
            self.append_step(part, end, total - before_total, 1, flags, -1)
            before, before_total = acc, total

        self.unclaimed.clear()
        if self.device is not None:
            self.device.close(-1)

        self._begin(t)
