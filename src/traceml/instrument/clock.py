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
from traceml.database.schema import StepFlag
from traceml.instrument.accounts import FIRST_USER, NOWHERE, OTHER, Accounts, Listener

if TYPE_CHECKING:
    from traceml.database.flight import FlightFile

__all__ = ["FIRST_USER", "FUSED", "OTHER", "StepClock"]

FUSED = 0  # stands for all optimizers that step inside backward; no object has this id
_EXPLICIT, _INFERRED, _NO_LOADER = int(StepFlag.EXPLICIT), int(StepFlag.INFERRED), int(StepFlag.NO_LOADER)
_DEVICE, _CALLBACK = int(StepFlag.DEVICE), int(StepFlag.CALLBACK)
_STEP_START, _STEP = 8, 9
_HELD_BATCHES = 64  # so many backward passes without any optimizer step: there is none


class StepClock(Accounts):
    """Accounts that know where a step ends."""

    open: bool  # a step has begun, ever
    explicit: bool  # trace_step() bounds the steps
    blocks: int  # nested trace_step() blocks
    fresh: bool  # no backward pass was seen yet
    watch_backward: bool  # no optimizer step was seen yet
    cut_on_step: bool  # without a loader: keep the accounts as they are when an optimizer step ends
    anchor: Any  # the loader whose batches are trained on
    inferred: bool  # there is no optimizer: batches bound the steps
    optimizers: set[int]  # ids of all that ever stepped
    optimizers_alive: int
    last_optimizer: int
    unclaimed: list[tuple[int, list[int], int]]  # where batches ended before any optimizer step
    origin: Any  # the loader that was asked where this segment began

    __slots__ = (
        "anchor",
        "blocks",
        "cut_on_step",
        "explicit",
        "fresh",
        "inferred",
        "last_optimizer",
        "open",
        "optimizers",
        "optimizers_alive",
        "origin",
        "unclaimed",
        "watch_backward",
    )

    def __init__(self, flight: FlightFile, listener: Listener, *, thread: int | None = None) -> None:
        super().__init__(flight, listener, get_ident() if thread is None else thread)
        self.open = self.explicit = self.inferred = False
        self.blocks = self.optimizers_alive = 0
        self.fresh = self.watch_backward = self.cut_on_step = True
        self.anchor = self.origin = None
        self.optimizers, self.last_optimizer = set(), FUSED
        self.unclaimed = []
        self.close_on_forward = True  # a training forward may open the first step

    def boundary(self, t: int, loader: Any) -> None:
        """A loader is asked for something: decide what the segment that ends here was.

        The training loop over one loader does not come here: its steps close by `closes_at`.
        """
        if not self.open:
            self._begin(t)
            self.origin = loader
            return

        idle = not (self.trained or self.evaluated or self.backwards) and (self.pending or not self.stepped)
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

        if self.stepped and loader is self.anchor:
            if not self.pending:
                self.commit(t)
                return

            self._close_prefix()

        if self.watch_backward and self.backwards and not self.inferred:
            self._hold(t)

        if self.seg_start != t:
            self._cut(t)

    def forward_boundary(self, t: int) -> None:
        """A training forward begins where that may begin a step: no loader takes part."""
        if self.depth:
            return  # a closure inside the optimizer's step

        if not self.open:
            self._begin(t)
        elif self.evaluating and not (self.trained or self.evaluated or self.backwards):
            self._discard(t, batches=0, evaluating=False)
            if self.pending and self.anchor is None:
                self._close_prefix()
        elif self.stepped and self.first_loader is None and not self.explicit:
            self.cut_on_step = False  # forwards bound the steps here: no need to keep the end of the optimizer step
            self.commit(t)

        self.close_on_forward = False

    def exhausted(self) -> None:
        """A loader had no more batches: what follows may be training without one."""
        if self.evaluating:
            self.close_on_forward = True

    def attempted_again(self, ident: int, t: int) -> None:
        """An optimizer steps while the open step has stepped already: is this another step?"""
        known = ident == self.attempt or ident in self.attempts
        if self.pending:
            if known:
                if self.batch is not None:
                    self.anchor = self.batch  # a new loader took the place of the last one

                self._close_prefix()
            else:
                self._merge()
        elif known and self.first_loader is None and not self.explicit and ident != FUSED:
            self.cut_on_step = True
            self.commit(t)

    def after_step(self, t: int, ident: int) -> None:
        """An optimizer attempt ended: from here on the step may close."""
        if not self.open:
            self._begin(t)

        if self.stepped:
            self.attempts.add(ident)
            self.dirty = True
        else:
            self.attempt = ident
            self.stepped = True

        if self.eval_ns:
            self._flush_evals(self.rows)

        if self.explicit:
            return

        if self.first_loader is not None:
            if self.anchor is None:
                self.anchor = self.first_loader

            self.closes_at = self.anchor
            return

        self.closes_at = NOWHERE if self.anchor is None else self.anchor
        several = ident != FUSED and (len(self.optimizers) > 1 or self.optimizers_alive > 1)
        if several or self.cut_on_step:
            self._cut(t)

        self.close_on_forward = not several

    def after_backward(self, t: int) -> None:
        """A backward pass ended while no optimizer has ever stepped, or one stepped inside it."""
        if self.fused:
            self.fused = False
            if self.stepped:
                self.attempted_again(FUSED, t)

            self.after_step(t, FUSED)
        elif self.inferred:
            self.flags |= _INFERRED
            self.after_step(t, FUSED)
        elif self.watch_backward and self.first_loader is None and self.open and not self.explicit:
            self._hold(t)

    def meet(self, optimizer: Any) -> None:
        """An optimizer begins a step and is not the one that did so last."""
        ident = id(optimizer)
        self.last_optimizer = ident
        if ident in self.optimizers:
            return

        self.optimizers.add(ident)
        self.watch_backward = self.inferred = False
        self.unclaimed.clear()
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
        self.current, self.mark = OTHER, monotonic_ns()
        return True

    def begin_block(self) -> None:
        """A trace_step() block begins; the first one turns inference off."""
        self.blocks += 1
        if self.blocks > 1:
            return

        t = monotonic_ns()
        self.switch(t)
        if not self.explicit:
            if self.pending:
                self._close_prefix()
            elif self.stepped:
                self.commit(t)

            self.explicit = True
            self._begin(t)
        elif self.evaluating and not (self.trained or self.evaluated or self.backwards):
            self._discard(t, batches=0, evaluating=False)

        if self.eval_ns:
            self._flush_evals(self.rows)

    def end_block(self, *, failed: bool) -> None:
        """A trace_step() block ends; one that raised is no step, and its time belongs to the next."""
        self.blocks -= 1
        if self.blocks or failed:
            return

        t = monotonic_ns()
        self.switch(t)
        self.flags |= _EXPLICIT
        self.commit(t)

    def finish(self) -> None:
        """Training ends: the open step is a row when it has stepped, else it is dropped."""
        t = monotonic_ns()
        self.switch(t)
        if self.open and not self.explicit:
            if self._is_evaluation():
                self._discard(t, batches=1, evaluating=False)
            elif self.evaluating and not (self.trained or self.evaluated or self.backwards):
                self._discard(t, batches=0, evaluating=False)

            if self.pending:
                self._close_prefix()
            elif self.stepped:
                self.commit(t)

        if self.eval_ns:
            self._flush_evals(self.rows)

        self.open_slots[_STEP_START], self.open_slots[_STEP] = 0, -1
        self.thread = 0

    # ---- segments ----

    def _close_prefix(self) -> None:
        """Append the row of what lay before the cut; what lies after it is the next step."""
        acc, snap, n = self.acc, self.snap or self.zeros, self.rows
        snap = snap + [0] * (len(acc) - len(snap))
        flags = self.base_flags | (_NO_LOADER if self.snap_first is None else 0)
        own = self.base_own if flags & _CALLBACK else -1
        user = self._write_users(snap) if self.users else 0
        sequence = self._read_extras(self.base) if self.extras else 0
        if self.device is not None and self.device.close_prefix(n):
            flags |= _DEVICE

        bits = self.micro & 0xFFFF | flags << 16 | sequence << 32
        row = self.offset + (n & self.mask) * self.row_bytes
        self.pack_into(self.buffer, row, n, self.snap_end, self.base, *snap[:7], user, own, bits)
        self.count[self.slot] = self.rows = n + 1
        if self.eval_ns:
            self._flush_evals(n + 1)

        self.acc = [after - before for after, before in zip(acc, snap, strict=True)]
        self.first_loader = self.batch
        self.stepped = False
        self.closes_at = NOWHERE
        self._drop_prefix()
        self.open_slots[_STEP_START], self.open_slots[_STEP] = self.seg_start, n + 1

    def _begin(self, t: int) -> None:
        self.open = True
        self._clear(t)
        self._clear_rest()

    def _is_evaluation(self) -> bool:
        """A batch on which a model was called without gradients (or as `eval()`), and which nothing was trained on."""
        if self.batch is None or not self.evaluated or self.trained or self.backwards:
            return False

        return self.pending or not self.stepped

    def _cut(self, t: int) -> None:
        """End a segment of this step: keep the accounts as they are now."""
        self.snap = self.acc.copy()
        self.snap[self.current] += t - self.mark
        self.snap_first = self.first_loader
        self.base += t - self.seg_start
        self.snap_end = self.seg_start = t
        self.pending = self.stepped and not self.explicit
        self.closes_at = NOWHERE
        self.micro += min(self.backwards, self.batches) if self.batches else self.backwards
        self.base_flags |= self.flags
        self.base_own += self.own
        self.own = self.flags = 0
        self._clear_segment()
        if self.device is not None:
            self.device.cut()

    def _clear_segment(self) -> None:
        self.backwards = self.batches = 0
        self.batch = None
        self.trained = self.evaluated = False
        self.dirty = True

    def _discard(self, t: int, *, batches: int, evaluating: bool) -> None:
        """Take the segment out of the step: it was evaluation."""
        self.eval_ns += t - self.seg_start
        self.eval_batches += batches
        self.eval_end = self.seg_start = t
        self.acc = self.zeros[:] if self.snap is None else self.snap + [0] * (len(self.zeros) - len(self.snap))
        self.mark = t
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
        self.unclaimed.append((t, self.acc.copy(), self.base + t - self.seg_start))
        if len(self.unclaimed) < _HELD_BATCHES:
            return

        self.inferred = True
        before, before_total = self.zeros, 0
        flags = _INFERRED | (_NO_LOADER if self.first_loader is None else 0)
        for end, acc, total in self.unclaimed:
            part = [b - a for b, a in zip(acc, before + [0] * (len(acc) - len(before)), strict=False)]
            n = self.rows
            row = self.offset + (n & self.mask) * self.row_bytes
            self.pack_into(
                self.buffer, row, n, end, total - before_total, *part[:7], sum(part[FIRST_USER::2]), -1, 1 | flags << 16
            )
            self.count[self.slot] = self.rows = n + 1
            before, before_total = acc, total

        self.unclaimed.clear()
        if self.device is not None:
            self.device.close(-1)

        self._begin(t)
