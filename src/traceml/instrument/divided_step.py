"""The open step, divided into parts, and the rows that they become.

A step is cut at each request to a data loader. The kind of a part (training, evaluation, or already the next step)
is often known only later. So what the parts before a cut have is kept apart, and the part after it can still be
assigned to the right step. `StepClock` decides; this class keeps the parts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, Slot, StepFlag
from traceml.fail_open import fail_open
from traceml.instrument.open_step.detailed_steps import DetailedSteps
from traceml.instrument.open_step.ended_parts import EndedParts, time_since
from traceml.instrument.open_step.step_rows import StepRows
from traceml.instrument.phase_timer import CHECK_FORWARD, NO_ROW, Began, PhaseTimer

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.instrument.values.reductions import ReductionCounter

__all__ = ["MAINTENANCE_MASK", "DividedStep", "StepListener"]

_CHECKPOINT, _FORWARD, _INPUT_WAIT = int(Phase.CHECKPOINT), int(Phase.FORWARD), int(Phase.INPUT_WAIT)
_BACKWARD = int(Phase.BACKWARD)
# Plain ints: arithmetic on enum members costs a microsecond.
_DEVICE, _EPOCH, _CALLBACK = int(StepFlag.DEVICE), int(StepFlag.EPOCH), int(StepFlag.CALLBACK)
_STEP_START, _STEP = int(Slot.STEP_START), int(Slot.STEP)
MAINTENANCE_MASK = 63
_STEPS_ALONE = 8  # steps of one optimizer, after which another one may begin a second phase of the training
_FACTOR = 2  # the last evaluation may take this many times as long as usual
_log = logging.getLogger("traceml")


class StepListener:
    """Receiver of the rare events of a clock; this one does nothing."""

    def first_backward(self) -> bool:
        """Handle the start of the first backward pass; return whether a torch optimizer is alive."""
        return True

    def find_new_models(self) -> None:
        """Handle a backward pass where no optimizer has stepped: it may be of a model that was made since the last."""

    def new_optimizer(self, optimizer: Any) -> None:
        """Handle the first step of an optimizer."""

    def is_trained(self, module: Any) -> bool:  # noqa: ARG002 - where no optimizer is known, any model is
        """Return whether an optimizer has parameters of the module."""
        return True

    def maintain(self, forward_ns: int, backwards: int) -> None:
        """Handle the end of the first step, then of every 64th, given its forward time and backward passes."""


class StepDeviceTimer(Protocol):
    """Timer for the device time of the open step: see `device.DeviceTimes`."""

    def mark_own(self) -> None:
        """Mark the last local gradient."""

    def cut(self) -> None:
        """Mark a cut: what follows may belong to another step."""

    def discard(self) -> None:
        """Drop the step: what followed the cut was evaluation."""

    def close(self, step: int) -> bool:
        """End the step (-1: without a row); return whether a device row will follow."""

    def close_prefix(self, step: int) -> bool:
        """End the step at the cut; return whether a device row will follow."""

    def drain(self) -> None:
        """Read what is complete, at the end of the run."""

    @property
    def ns_per_step(self) -> int:
        """Cost of measuring on the host in ns, per step."""


class _FirstPart(NamedTuple):
    """The part of a step before its cut, which may become a step by itself."""

    joined_by: int  # id of the optimizer that steps after the cut
    is_first: bool  # whether no other optimizer has joined a step before
    parts: EndedParts


class DividedStep(PhaseTimer):
    """Parts of the open step: those that have ended, and the open one.

    `ended` has what the parts before the last cut have. The fields from `backwards` to `batch`, and from `trained` to
    `drain_ns` in `_clear`, describe the open part. The buckets of time cover both.
    """

    rows: int  # number of rows so far
    before: int  # steps before the first row, of the training that this one resumes
    part_start: int  # start of the part
    closing_trigger: Any  # the loader whose next request closes the step, or a sentinel
    step_call: int  # id of the optimizer of the step's first optimizer step call, 0 before one
    backwards: int
    batches: int
    samples: int  # of the inputs whose gradients were computed
    elements: int
    batch: Any  # the first loader that gave a batch in this part
    first_loader: Any  # the first loader that gave a batch in this step
    input_shape: Any  # shape of the input of the last forward; None: look at the next one
    input_samples: int
    input_elements: int
    inspects: bool  # the next batch gets a fingerprint
    loss_mask: int  # the loss is read in steps whose number has none of these bits
    sequence: Any  # returns the number of collectives that a group with several ranks has issued; None without one
    slow_row: int  # from this row on, closing a step takes all rules too
    needs_slow_backward: bool  # backward passes take the slow path: see `StepClock.plan_backward`

    commit: Callable[[int], None]  # closes the open step at a given time: appends the row and begins the next step

    def __init__(self, flight: FlightFile, listener: StepListener, thread: int) -> None:
        super().__init__(flight.open_slots, thread)
        self.listener = listener
        self.step_rows = StepRows(flight, self.users)
        self.ring = self.step_rows.ring
        self.rows, self.before = self.ring.appended, 0
        self.device: StepDeviceTimer | None = None
        self.group: Any = None  # the default process group once there is one
        self.sequence = None
        self.reductions: ReductionCounter | None = None  # once there is a parallel model
        self.is_grouped = False  # there is a process group with several ranks
        self.slow_commits = False  # there is a profile: every step needs a slow commit
        self.at_boundary: Callable[[], int] | None = None  # called at the end of a step; returns flags of the next one
        self.detailed = DetailedSteps()
        self.slow_row, self.needs_slow_backward = NO_ROW, True
        self.loss_mask = 0
        self.inspects, self.input_shape = False, None
        self.input_samples = self.input_elements = 0
        self.split_size = 0  # size of the loader's batches where each backward pass is on a part of one
        self.open = False  # the first step has begun
        self.explicit = False  # trace_step() bounds the steps
        self.part_loader: Any = None  # the loader whose request began this part
        self.training_loader: Any = None  # the loader whose batches are trained on
        self.exhausted_loader: Any = None  # its last batch may have been prefetched
        self.joined = 0  # row of the last step in which another optimizer stepped, too
        self.first_part: _FirstPart | None = None  # of a step that another optimizer has joined
        self.ended = EndedParts([])  # before the last cut
        self.eval_ns = self.eval_batches = self.eval_end = self.eval_input_ns = self.eval_forward_ns = 0
        self.longest_rest_ns = 0  # from the last batch of an evaluation to its end
        self.evaluates_gradients = False  # gradients were computed in an evaluation
        self.is_plain_evaluation = False  # models were evaluated without gradients, be it averaged weights
        self.evaluated_losses = 0  # evaluations with backward passes, whose losses are none of a step
        self.prepares = False  # another model is to be trained since the last evaluation call, as in the next fold
        self._clear(0)
        self.open_slots[_STEP] = -1  # no step is open yet

    @property
    def extras(self) -> bool:
        """Whether there is more to measure than times on the host: a device, or waiting for other ranks."""
        return self.is_grouped or self.device is not None

    @property
    def step(self) -> int:
        """Number of the open step."""
        number: int = self.rows + self.before
        return number

    def continue_at(self, step: int) -> bool:
        """Give the next step a number, and the steps after it those that follow; return whether that is possible.

        An open step that has been trained is the one before. Numbers never go back: steps would have the same.
        """
        before = step - self.rows - bool(self.step_call)
        if before < self.before:
            return False

        self.detailed.all_to += before - self.before
        self.before = before
        if self.open_slots[_STEP] >= 0:
            self.open_slots[_STEP] = self.step

        return True

    # ---- rows ----

    def commit_slow(self, t: int) -> None:
        """Close a step that has parts, rare phases, open user phases, flags, a group or a device."""
        sequence = self.issued()  # first: Ctrl-C may be raised in it
        self._add_part(t)
        if self.eval_ns:
            self._flush_evals()

        self._add_total(self.ended.total_ns)
        if self.device is not None and self.device.close(self.step):
            self.ended.flags |= _DEVICE

        self.ended.sequence = sequence
        self.append_step(self.ended)
        self._clear(t)
        self.plan_step()
        if self.at_boundary is not None:
            self.cross_boundary()

    def _close_ended(self) -> None:
        """Append the row of the parts before the cut; the part after it becomes the next step."""
        sequence = self.issued()  # first: Ctrl-C may be raised in it
        ended = self.ended
        self._add_total(ended.total_ns)
        if self.device is not None and self.device.close_prefix(self.step):
            ended.flags |= _DEVICE

        ended.sequence = sequence
        times = self.times
        if self.eval_ns and self.eval_end <= ended.end_ns:  # before this step
            self._flush_evals()

        self.append_step(ended)
        if self.eval_ns:
            self._flush_evals()

        self.times = time_since(times, ended.times)
        self.first_part = None
        self.first_loader = self.batch
        self.step_call = 0
        self.later_step_calls.clear()
        self.closing_trigger = CHECK_FORWARD
        self.ended = EndedParts([])
        self.open_slots[_STEP_START], self.open_slots[_STEP] = self.part_start, self.step
        if self.at_boundary is not None:
            self.cross_boundary()

    def append_step(self, parts: EndedParts) -> None:
        """Append the row of a step."""
        n = self.rows
        self.step_rows.append(self.step, parts)
        self.rows = n + 1
        if not n & MAINTENANCE_MASK:
            self.listener.maintain(parts.times[_FORWARD], parts.micro_batches)

    def append_user_phases(self) -> int:
        """Append the rows of a usual step's user phases, which all have ended; return their time."""
        total = self.step_rows.append_user_phases(self.step, self.rare_times)
        self.rare_times = self.zeros.copy()
        return total

    def _flush_evals(self) -> None:
        parts = self.eval_input_ns, self.eval_forward_ns
        self.step_rows.append_evaluation(self.step, self.eval_end, self.eval_ns, self.eval_batches, *parts)
        self.eval_ns = self.eval_batches = self.eval_input_ns = self.eval_forward_ns = 0

    def call_at_boundary(self, function: Callable[[], int] | None) -> None:
        """Call a function at the end of each step, on the training thread, or no longer call any.

        Another thread than the training repeats this until the first call: a step that ends meanwhile may miss it.

        Args:
            function: returns the `StepFlag`s of the step that begins.
        """
        self.at_boundary = function
        self.slow_commits = function is not None
        self.needs_slow_commit |= self.slow_commits

    def cross_boundary(self) -> None:
        """Call the function of `call_at_boundary`: a step has ended, and the next one has begun."""
        function = self.at_boundary
        if function is None:
            return

        with fail_open(_log, "instrument", "a profile is abandoned"):
            self.flags |= function()
            return

        self.call_at_boundary(None)

    def is_detailed(self, step: int) -> bool:
        """Whether own backward and device time of a step are measured."""
        return self.extras and step in self.detailed

    def _add_total(self, total_ns: int) -> None:
        if self.extras:
            self.detailed.add_total(total_ns)

    def plan_backward(self) -> None:
        """Decide whether backward passes take the slow path; `StepClock` has the rule."""

    def plan_step(self) -> None:
        """Decide what the step that begins measures, and which step is the next to need a slow commit.

        With a device or a group these are the steps that are measured, and each before one, at whose end that begins.
        """
        self.plan_backward()
        has_plan = self.extras and not self.slow_commits
        self.slow_row = self.rows + self.detailed.distance(self.step) if has_plan else NO_ROW

    def issued(self) -> int:
        """Return the number of collectives that the process group has issued; 0 without a group of several ranks."""
        return self.sequence() if self.sequence is not None else 0

    def use_device(self, device: StepDeviceTimer) -> None:
        """Measure device time too, from the next step."""
        self.device = device
        self._measure_first()

    def join_group(self, sequence: Callable[[], int] | None) -> None:
        """Measure own backward too: a process group has several ranks.

        Args:
            sequence: returns the number of collectives that it has issued; None if it has no counter.
        """
        self.is_grouped, self.sequence = True, sequence
        self.needs_slow_backward = True
        self._measure_first()

    def _measure_first(self) -> None:
        self.detailed.begin_at(self.step)
        self.needs_slow_commit = True

    # ---- parts ----

    def _clear(self, t: int) -> None:
        """Begin an empty step at `t`."""
        self.times = self.zeros
        self.part_start = t
        self.closing_trigger = CHECK_FORWARD
        self.step_call = self.backwards = self.batches = self.samples = self.elements = 0
        self.batch = self.first_loader = None
        self.trained: Any = None  # a weak reference to a module whose forward was called with gradients
        self.evaluated = False  # a module was called without gradients
        self.flags = self.own = self.fingerprint = 0
        self.create_ns = self.drain_ns = 0  # creating iterators, and the ends of others
        self.evaluating = False  # the previous part was evaluation
        self.fused = False  # an optimizer stepped inside backward
        self.is_drained = False  # the loader has ended after it gave batches: the step and those after it train on them
        self.later_step_calls: set[int] = set()  # ids of the optimizers of further step calls
        self.ended = EndedParts([])
        self.needs_slow_commit, self.has_user_phases = self.slow_commits, False
        self.open_slots[_STEP_START], self.open_slots[_STEP] = t, self.step

    def new_iterator(self, create_ns: int) -> None:
        """Handle a new iterator of a loader: the step that waits for its first batch begins an epoch."""
        self.create_ns += create_ns
        self.is_drained = False
        self.flags |= _EPOCH
        self.needs_slow_commit = True

    def workers_ended(self, began: Began) -> None:
        """Handle the end of a dropped iterator's workers: the row of the epoch that follows in this step has it."""
        try:
            self.drain_ns += monotonic_ns() - began[1]
            self.needs_slow_commit = True
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)

    def end_ready_part(self, t: int) -> None:
        """End the part of a ready step that belongs to it; the next request to any loader is one for the next step."""
        self._cut(t)
        self.part_loader = None

    def begin_step(self, t: int) -> None:
        """Begin a step, be it the first one."""
        self.open = True
        self.account_user_phases(t)
        self.first_part = None
        self._clear(t)

    def _is_idle(self) -> bool:
        """Whether no model ran in this part."""
        if self.trained is not None or self.evaluated or self.backwards:
            return False

        return bool(self.ended.times) or not self.forward_ns

    def _is_evaluation(self) -> bool:
        """Whether a model ran on the batch without gradients (or in `eval()`), and nothing was trained on it."""
        if self.backwards or (self.step_call and not self.ended.may_be_step):
            return False

        if self.batch is None:
            return self.exhausted_loader is not None and self.evaluated  # on a prefetched batch

        trained = self.trained  # read once, as the recorder's thread asks, too
        if trained is None:
            return self.evaluated

        module = trained()
        return module is not None and not module.training

    def _is_evaluation_with_gradients(self) -> bool:
        """Whether a validation without `torch.no_grad()` has ended, if no backward pass of the training follows.

        It has read another loader to its end, or several of its batches; or, after the training loader's end, that one
        once more to its end, or none.
        """
        loader = self._untrained_loader()
        if loader is None or loader.is_read:
            return False

        if loader is self.training_loader:
            return self.exhausted_loader is not None

        return self._batches_since_step() > 1 or loader is self.exhausted_loader

    def _batches_since_step(self) -> int:
        """Return the number of batches since the last step, as far as it is known to be done."""
        return self.batches + (0 if self.ended.may_be_step else self.ended.micro_batches)

    def _is_trained(self) -> bool:
        """Whether a backward pass ran in this part, but that of a model in `eval()`, as for an attack on it."""
        if not self.backwards:
            return False

        trained = self.trained  # read once, as the recorder's thread asks, too
        module = None if trained is None else trained()
        return module is None or bool(module.training)

    def _untrained_loader(self) -> Any:
        """Return the loader on whose batches models ran since the last step, and were not trained yet; else None.

        Without a loader since then, it is the one that has ended. Backward passes of models in `eval()` train nothing
        on another loader's batches, before an optimizer steps.
        """
        if self.explicit or self._is_trained():
            return None

        ended = self.ended  # read once, with its times, as the recorder's thread asks, too
        times = ended.times
        if ended.may_be_step:
            loader, before_ns = self.batch, times[_FORWARD] if times else 0
        elif self.step_call or ended.is_trained:
            return None
        elif (self.backwards or ended.micro_batches) and self.first_loader is self.training_loader:
            return None  # micro-batches at the end of an epoch
        else:
            with_gradients = self.trained is not None and not self.evaluated
            loader, before_ns = self.first_loader or (self.exhausted_loader if with_gradients else None), 0

        return loader if self.forward_ns > before_ns else None

    def _discard_with_gradients(self, t: int) -> None:
        """Move what an evaluation with gradients has, and no step before it, from the step to evaluation."""
        batches = max(self._batches_since_step(), 1)
        if self.backwards or self.ended.micro_batches:
            self.evaluated_losses += 1

        if not self.ended.may_be_step:
            self.part_start -= self.ended.total_ns
            self.ended = EndedParts([])

        self._discard(t, batches=batches, evaluating=False)

    def _cut(self, t: int) -> None:
        """End the part."""
        self.ended.is_trained |= self._is_trained()
        self._add_part(t)
        self.ended.may_be_step = bool(self.step_call) and not self.explicit
        self.part_start = t
        self.closing_trigger = CHECK_FORWARD
        self.own = self.flags = self.fingerprint = self.create_ns = self.drain_ns = 0
        unused = 0 if self.ended.may_be_step else max(self.batches - self.backwards, 0)
        self._clear_part()
        self.batches = unused
        if self.device is not None:
            self.device.cut()

    def _add_part(self, t: int) -> None:
        """Add the part, which ends, to those before it."""
        self.account_user_phases(t)
        ended = self.ended
        ended.times, ended.loader, ended.end_ns = self.times, self.first_loader, t
        ended.total_ns = self._total_ns(t)
        ended.flags |= self.flags
        ended.own_ns += self.own
        ended.create_ns += self.create_ns
        ended.drain_ns += self.drain_ns
        # After the loader's end, a batch that was fetched before it may be left.
        backwards, batches = self.backwards, self.batches or int(self.first_loader is not None)
        ended.micro_batches += min(backwards, batches) if batches else backwards
        if backwards:
            ended.fingerprint = ended.fingerprint or self.fingerprint

        # Several models that train on one batch, as in a GAN, do not make it larger. Nor do several optimizers without
        # a loader, as actor and critics: each has a part, and is taken to train on the same data.
        if not batches:
            ended.elements = max(ended.elements, self.elements)
            ended.samples = max(ended.samples, self.samples)
            return

        share = min(batches / backwards, 1) if backwards else 1
        if self.split_size and self.samples:
            share = min(batches * self.split_size / self.samples, 1)

        ended.elements += int(self.elements * share)
        ended.samples += int(self.samples * share)

    def _total_ns(self, t: int) -> int:
        """Time of the step until `t`."""
        return self.ended.total_ns + t - self.part_start

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
        ended, saving = self.ended, self._saving_ns()
        kept = (ended.times or self.zeros).copy()
        self.add_evaluated(time_since(self.times, kept))
        kept[_CHECKPOINT] += saving
        ended.total_ns += saving
        self.times = kept
        if ended.times:
            ended.times = kept

        spent = t - self.part_start - saving
        self.eval_ns += spent
        self.eval_batches += batches
        if self.evaluated and self.trained is None:
            self.is_plain_evaluation = True

        if not batches:
            self.longest_rest_ns = max(self.longest_rest_ns, spent)

        self.fingerprint = self.own = 0
        self.eval_end = self.part_start = t
        self.exhausted_loader = None
        self.closing_trigger = CHECK_FORWARD
        self.first_loader = ended.loader if ended.times else None
        self.evaluating = evaluating
        self.flags &= ~(_EPOCH | _CALLBACK)
        self.create_ns = self.drain_ns = 0
        self._clear_part()
        if self.device is not None:
            self.device.discard()

    def add_evaluated(self, times: list[int]) -> None:
        """Add what belongs to an evaluation, by bucket."""
        self.eval_input_ns += times[_INPUT_WAIT]
        self.eval_forward_ns += times[_FORWARD]
        if times[_BACKWARD]:
            self.evaluates_gradients = True

    def usual_rest_end(self, t: int) -> int:
        """Return when the work after the batches of an evaluation ended: as late as in those before.

        What the script does at its end, or before the training of another model, would belong to the evaluation.
        """
        return self._end_within(t, _FACTOR * self.longest_rest_ns)

    def usual_batch_end(self, t: int) -> int:
        """Return when the last batch of an evaluation that was left early ended: after the usual time of a batch."""
        return self._end_within(t, _FACTOR * (self.eval_ns // self.eval_batches if self.eval_batches else t))

    def usual_calls_end(self, t: int) -> int:
        """Return when an evaluation with gradients ended, before the end of the run: at its last request to a loader.

        Without one it is after twice the time of its calls: what the script does at its end may take longer.
        """
        return self._end_within(t, 0 if self.ended.times else _FACTOR * self.forward_ns)

    def _end_within(self, t: int, longest_ns: int) -> int:
        """Return when the part ended, at `t` at the latest, if it took at most `longest_ns` beside saving."""
        saving = self._saving_ns()
        return self.part_start + saving + min(t - self.part_start - saving, longest_ns)

    def _saving_ns(self) -> int:
        return self.rare_times[_CHECKPOINT] - (self.ended.times or self.zeros)[_CHECKPOINT]

    @property
    def needs_no_loader(self) -> bool:
        """Whether the step closes without a request to a loader: there is none, or it has given all batches."""
        return self.first_loader is None or self.first_loader.is_left or self.is_drained

    def _merge(self, ident: int) -> None:
        """Join the part after the cut with the step, in which another optimizer steps."""
        alone, is_first = self.may_begin_a_phase(), not self.joined
        self.joined = self.rows
        self.first_part = None
        if alone and self.ended.times:
            self.first_part = _FirstPart(ident, is_first, replace(self.ended, sequence=self.issued()))

        self.ended.times = []
        self.ended.may_be_step = False

    def may_begin_a_phase(self) -> bool:
        """Whether another optimizer, if it steps now, may begin a second phase of the training."""
        return self.needs_no_loader and self.rows - self.joined >= _STEPS_ALONE

    def split(self, ident: int) -> None:
        """Make two steps of one that two optimizers have, if the second one now steps again, and the first alone did.

        So begins the second phase of a script that trains with Adam first, and then with L-BFGS. The times of a device
        are not known for either.
        """
        part, ended = self.first_part, self.ended
        if part is None or part.joined_by != ident or not ended.times:
            return

        if self.device is not None:
            self.device.discard()

        first = part.parts
        self.append_step(first)
        self.times = time_since(self.times, first.times)
        ended.remove(first)

    def split_last(self) -> None:
        """Make two steps of the run's last one, if another optimizer has stepped in it for the first time.

        So ends a script that trains with Adam first, and then calls L-BFGS once with thousands of iterations.
        """
        if self.first_part is not None and self.first_part.is_first:
            self.split(self.first_part.joined_by)

    def _hold(self, held: list[EndedParts], t: int) -> None:
        """Keep what the step has until `t`: one of several steps may end there."""
        held.append(EndedParts(self.times, end_ns=t, total_ns=self._total_ns(t)))

    def _append_held(self, held: list[EndedParts], flags: int, t: int) -> None:
        """Append the rows of held steps, and begin the next one."""
        sequence = self.issued()
        ended, before = self.ended, EndedParts([])
        ended.flags = flags | (self.flags | ended.flags) & _EPOCH  # an epoch began with the first of them
        ended.create_ns += self.create_ns
        ended.drain_ns += self.drain_ns
        ended.micro_batches, ended.loader, ended.sequence = 1, self.first_loader, sequence
        ended.elements, ended.samples = self.input_elements, self.input_samples
        for each in held:
            ended.times, ended.end_ns = time_since(each.times, before.times), each.end_ns
            ended.total_ns = each.total_ns - before.total_ns
            self._add_total(ended.total_ns)
            self.append_step(ended)
            before, ended.flags, ended.fingerprint = each, flags, 0

        held.clear()
        if self.device is not None:
            self.device.close(-1)

        self.begin_step(t)
