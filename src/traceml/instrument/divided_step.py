"""The open step, divided into parts.

A step is cut at each request to a data loader. The kind of a part (training, evaluation, or already the next step)
is often known only later. So the buckets are saved at each cut (`times_at_cut`), and the time after it can still be
assigned to the right step. `StepClock` decides; this class keeps the parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from traceml.database.schema import Phase, Slot, StepFlag
from traceml.instrument.phase_timer import CHECK_FORWARD, PhaseTimer, StepListener, StepRow

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile

__all__ = ["DividedStep"]

_CHECKPOINT = int(Phase.CHECKPOINT)
_NO_LOADER, _DEVICE, _EPOCH = int(StepFlag.NO_LOADER), int(StepFlag.DEVICE), int(StepFlag.EPOCH)
_STEP_START, _STEP = int(Slot.STEP_START), int(Slot.STEP)
_STEPS_ALONE = 8  # steps of one optimizer, after which another one may begin a second phase of the training
_FACTOR = 2  # the last evaluation may take this many times as long as usual


class _FirstPart(NamedTuple):
    """The part of a step before its cut, which may become a step by itself."""

    joined_by: int  # id of the optimizer that steps after the cut
    is_first: bool  # whether no other optimizer has joined a step before
    row: StepRow


class DividedStep(PhaseTimer):
    """Times of the open step before and after its last cut, and the rows that the parts become."""

    def __init__(self, flight: FlightFile, listener: StepListener, thread: int) -> None:
        super().__init__(flight, listener, thread)
        self.open = False  # the first step has begun
        self.explicit = False  # trace_step() bounds the steps
        self.part_loader: Any = None  # the loader whose request began this part
        self.exhausted_loader: Any = None  # its last batch may have been prefetched
        self.joined = 0  # row of the last step in which another optimizer stepped, too
        self.first_part: _FirstPart | None = None  # of a step that another optimizer has joined
        self.longest_rest_ns = 0  # from the last batch of an evaluation to its end
        self.prepares = False  # another model is to be trained since the last evaluation call, as in the next fold

    def _close_prefix(self) -> None:
        """Append the row of the part before the cut; the part after it becomes the next step."""
        sequence = self.issued()  # first: Ctrl-C may be raised in it
        times, times_at_cut = self.times, self.times_at_cut or self.zeros
        times_at_cut = times_at_cut + [0] * (len(times) - len(times_at_cut))
        flags = self.committed_flags | (_NO_LOADER if self.loader_at_cut is None else 0)
        self.note_total(self.committed_ns)
        if self.device is not None and self.device.close_prefix(self.step):
            flags |= _DEVICE

        before_cut = self.cut_ns, self.committed_ns, self.micro_batches
        self.append_step(
            StepRow(times_at_cut, *before_cut, flags, sequence, self.committed_own_ns, self.committed_data)
        )
        if self.eval_ns:
            self._flush_evals(self.step)

        self.times = [after - before for after, before in zip(times, times_at_cut, strict=True)]
        self.first_part = None
        self.first_loader = self.batch
        self.step_call = 0
        self.later_step_calls.clear()
        self.closing_trigger = CHECK_FORWARD
        self._drop_prefix()
        self.open_slots[_STEP_START], self.open_slots[_STEP] = self.part_start, self.step
        if self.at_boundary is not None:
            self.cross_boundary()

    def begin_first_step(self, t: int) -> None:
        """Begin the first step."""
        self._begin(t)

    def end_ready_part(self, t: int) -> None:
        """End the part of a ready step that belongs to it; the next request to any loader is one for the next step."""
        self._cut(t)
        self.part_loader = None

    def _begin(self, t: int) -> None:
        self.open = True
        self.account_user_phases(t)
        self.first_part = None
        self._clear(t)

    def _is_idle(self) -> bool:
        """Whether no model ran in this part."""
        if self.trained is not None or self.evaluated or self.backwards:
            return False

        return self.times_at_cut is not None or not self.forward_ns

    def _is_evaluation(self) -> bool:
        """Whether a model ran on the batch without gradients (or in `eval()`), and nothing was trained on it."""
        if self.backwards or (self.step_call and not self.pending):
            return False

        if self.batch is None:
            return self.exhausted_loader is not None and self.evaluated  # on a prefetched batch

        trained = self.trained  # read once, as the recorder's thread asks, too
        if trained is None:
            return self.evaluated

        module = trained()
        return module is not None and not module.training

    def _cut(self, t: int) -> None:
        """End a part of this step and save its buckets."""
        self.account_user_phases(t)
        self.times_at_cut = self.times
        self.loader_at_cut = self.first_loader
        self.committed_ns += t - self.part_start
        self.cut_ns = self.part_start = t
        self.pending = bool(self.step_call) and not self.explicit
        self.closing_trigger = CHECK_FORWARD
        self.add_part()
        self.committed_flags |= self.flags
        self.committed_own_ns += self.own
        self.add_iterators()
        self.own = self.flags = 0
        unused = max(self.batches - self.backwards, 0)
        self._clear_part()
        self.batches = unused
        if self.device is not None:
            self.device.cut()

    def _clear_part(self) -> None:
        self.backwards = self.batches = self.samples = self.elements = 0
        self.batch = None
        self.trained, self.evaluated = None, False
        self.needs_slow_commit = True

    def _discard(self, t: int, *, batches: int, evaluating: bool) -> None:
        """Move the part from the step to evaluation; its checkpoint time stays in the step.

        Without batches it is the time after them, of which set-up for another model is no part.
        """
        if self.prepares and not batches:
            t = self.usual_rest_end(t)

        self.prepares = False
        times_at_cut = [] if self.times_at_cut is None else self.times_at_cut
        kept = times_at_cut + [0] * (len(self.zeros) - len(times_at_cut))
        saving = self._saving_ns()
        kept[_CHECKPOINT] += saving
        self.committed_ns += saving
        self.times = kept
        if self.times_at_cut is not None:
            self.times_at_cut = kept.copy()

        spent = t - self.part_start - saving
        self.eval_ns += spent
        self.eval_batches += batches
        if not batches:
            self.longest_rest_ns = max(self.longest_rest_ns, spent)

        self.fingerprint = 0
        self.eval_end = self.part_start = t
        self.exhausted_loader = None
        self.closing_trigger = CHECK_FORWARD
        self.first_loader = None if self.times_at_cut is None else self.loader_at_cut
        self.evaluating = evaluating
        self.flags &= ~_EPOCH
        self.create_ns = self.drain_ns = 0
        self._clear_part()
        if self.device is not None:
            self.device.discard()

    def usual_rest_end(self, t: int) -> int:
        """Return when the work after the batches of an evaluation ended: as late as in those before.

        What the script does at its end, or before the training of another model, would belong to the evaluation.
        """
        saving = self._saving_ns()
        return self.part_start + saving + min(t - self.part_start - saving, _FACTOR * self.longest_rest_ns)

    def usual_batch_end(self, t: int) -> int:
        """Return when the last batch of an evaluation that was left early ended: after the usual time of a batch."""
        saving, usual = self._saving_ns(), self.eval_ns // self.eval_batches if self.eval_batches else t
        return self.part_start + saving + min(t - self.part_start - saving, _FACTOR * usual)

    def _saving_ns(self) -> int:
        before = 0 if self.times_at_cut is None else self.times_at_cut[_CHECKPOINT]
        saving: int = self.times[_CHECKPOINT] - before
        return saving

    @property
    def needs_no_loader(self) -> bool:
        """Whether the step closes without a request to a loader: there is none, or it has given all batches."""
        return self.first_loader is None or self.first_loader.is_left or self.is_drained

    def _merge(self, ident: int) -> None:
        """Join the part after the cut with the step, in which another optimizer steps."""
        alone, is_first = self.may_begin_a_phase(), not self.joined
        self.joined = self.rows
        self.first_part = None
        if alone and self.times_at_cut is not None:
            flags = self.committed_flags | (_NO_LOADER if self.loader_at_cut is None else 0)
            at_cut = self.times_at_cut, self.cut_ns, self.committed_ns, self.micro_batches
            row = StepRow(*at_cut, flags, self.issued(), data=self.committed_data)
            self.first_part = _FirstPart(ident, is_first, row)

        self.times_at_cut = None
        self.pending = False

    def may_begin_a_phase(self) -> bool:
        """Whether another optimizer, if it steps now, may begin a second phase of the training."""
        return self.needs_no_loader and self.rows - self.joined >= _STEPS_ALONE

    def split(self, ident: int) -> None:
        """Make two steps of one that two optimizers have, if the second one now steps again, and the first alone did.

        So begins the second phase of a script that trains with Adam first, and then with L-BFGS. The times of a device
        are not known for either.
        """
        part = self.first_part
        if part is None or part.joined_by != ident or self.times_at_cut is None:
            return

        if self.device is not None:
            self.device.discard()

        row = part.row
        self.append_step(row)
        first = row.times + [0] * (len(self.zeros) - len(row.times))
        self.times_at_cut = [after - before for after, before in zip(self.times_at_cut, first, strict=True)]
        self.times = [after - before for after, before in zip(self.times, first, strict=True)]
        self.committed_ns -= row.total_ns
        self.micro_batches -= row.micro_batches
        self.committed_flags &= ~row.flags
        self.committed_fingerprint = 0

    def split_last(self) -> None:
        """Make two steps of the run's last one, if another optimizer has stepped in it for the first time.

        So ends a script that trains with Adam first, and then calls L-BFGS once with thousands of iterations.
        """
        if self.first_part is not None and self.first_part.is_first:
            self.split(self.first_part.joined_by)

    def _hold(self, held: list[tuple[int, list[int], int]], t: int) -> None:
        held.append((t, self.times, self.committed_ns + t - self.part_start))

    def _append_held(self, held: list[tuple[int, list[int], int]], flags: int, t: int) -> None:
        """Append the rows of held steps, and begin the next one."""
        sequence = self.issued()
        before, before_total = self.zeros, 0
        epoch = (self.flags | self.committed_flags) & _EPOCH  # began with the first of them
        self.add_iterators()
        data = (self.input_elements, self.input_samples)
        for end, times, total in held:
            part = [b - a for b, a in zip(times, before + [0] * (len(times) - len(before)), strict=False)]
            self.note_total(total - before_total)
            self.append_step(StepRow(part, end, total - before_total, 1, flags | epoch, sequence, data=data))
            before, before_total, epoch = times, total, 0

        held.clear()
        if self.device is not None:
            self.device.close(-1)

        self._begin(t)
