"""State machine that detects training steps from the calls that the hooks report.

`docs/steps.md` has the rules for users. Terms, here and in the classes that this one is built on (`DividedStep`, the
parts of a step; `PhaseTimer`, the times of its phases):

    step call        an outermost call of an optimizer's step
    training loader  the loader whose batches are trained on; its next batch request closes a step after a step call
    cut              at a request to a loader, or after a step call: what the step has so far is an ended *part*
    part             of a step, between two cuts; it may turn out to be evaluation, or the begin of the next step
    ready, done      a step that has its step call, and only has to be closed
    commit           to close the step: append its row, and begin the next; a *slow* commit takes all rules; the hooks
                     do the usual one themselves (`clock_implementations`)

The state is `closing_trigger`: the event that closes the open step, which hooks compare in each step.

    NOT_READY      none: the step has no step call, or a further one runs
    a loader       the next request to it
    ON_FORWARD     the next training forward
    CHECK_FORWARD  a training forward, if `forward_begins` finds that it begins a step

    event                                                    next state
    the trigger closes the step (`commit`)                   NOT_READY; after `commit_slow` CHECK_FORWARD
    a step call ends (`after_step`): with a loader           the training loader
      without one, forwards not known to separate steps      CHECK_FORWARD, and the step is cut
      without one, forwards known to separate them           ON_FORWARD
      the loader is at its end (`_await_forward`)            CHECK_FORWARD
      ... and another optimizer may follow                   the training loader; NOT_READY without one
    the training loader ends without a step (`exhausted`)    CHECK_FORWARD
    a step with a step call gets another (`repeat_step_call`)  NOT_READY, until that call ends
    workers of a left iterator end (`workers_end`)           a done step closes, if its loader is the trigger
    the loader's last iterator goes (`loader_left`)          CHECK_FORWARD, if it is the trigger
    a part is cut or is evaluation (`boundary`)              CHECK_FORWARD
    evaluation without a loader begins (`EvaluationPeriod`)  CHECK_FORWARD; the state before it, when it ends

In `trace_step()` only the end of a block closes a step.
"""

from __future__ import annotations

import threading
import weakref
from _thread import get_ident
from typing import TYPE_CHECKING, Any

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, Slot, StepFlag
from traceml.inspection.thread_frames import thread_stack
from traceml.inspection.user_files import is_standard_library
from traceml.instrument.divided_step import DividedStep, StepListener
from traceml.instrument.evaluation import EvaluationPeriod
from traceml.instrument.open_step.ended_parts import EndedParts
from traceml.instrument.phase_timer import (
    CHECK_FORWARD,
    FIRST_USER,
    NOT_READY,
    ON_FORWARD,
    OTHER,
    Began,
)
from traceml.instrument.values.last_step import is_overdue, usual_comm, usual_end, usual_saving

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile

__all__ = ["StepClock"]

_BACKWARD, _OPTIMIZER, _INPUT_WAIT = int(Phase.BACKWARD), int(Phase.OPTIMIZER), int(Phase.INPUT_WAIT)
_COMM, _CHECKPOINT = int(Phase.COMM), int(Phase.CHECKPOINT)
_FUSED = 1  # id that represents all optimizers inside backward; no object has it
_EXPLICIT, _INFERRED = int(StepFlag.EXPLICIT), int(StepFlag.INFERRED)
_STEP_START, _STEP = int(Slot.STEP_START), int(Slot.STEP)
_HELD_BATCHES = 64  # without an optimizer step in this many backward passes, there is no optimizer,
_HELD_FOR_OPTIMIZER = 512  # or one that is alive never steps: until then, it may add up the gradients of many batches
_HELD_NS = 1_000_000_000  # nor without one in this time, where none is alive at the first backward pass


class StepClock(DividedStep):
    """State machine that detects steps: it adds the rules for parts and for the end of a step."""

    last_optimizer: int  # id of the optimizer that stepped last
    failure: int  # id of the exception that left a hook in C last
    failed_in: int  # its phase
    usual_trigger: Any  # `closing_trigger` after the optimizer step of a usual step
    usual_loader: Any  # the first loader of a usual step

    def __init__(self, flight: FlightFile, listener: StepListener, *, thread: int | None = None) -> None:
        super().__init__(flight, listener, get_ident() if thread is None else thread)
        self.evaluation = EvaluationPeriod(self)
        self.blocks = 0  # nested trace_step() blocks
        self.paused_ns = 0  # since when nothing trains: a notebook's cell has ended, and no other has begun
        self.pause_ends_step = False  # whether no step is open in the pause
        self.warned_of_thread = False  # that another thread trains, too
        self.awaits_backward = True  # no backward pass has run yet
        self.cut_on_step = True  # without a loader: cut when an optimizer step ends
        self.fetched_ahead = False  # this step's batch came before the end of its loader
        self.inferred = False  # there is no optimizer: batches are the steps
        self.has_no_optimizer = False  # none was alive at the first backward pass: it may be made in the first step
        self.optimizers: dict[int, Any] = {}  # by id, weak references to those that have stepped and are alive
        self.optimizers_seen = 0  # number of all that have stepped
        self.optimizers_alive = 0  # number of all with parameters of a model, at the last search
        self.has_new_optimizer = False  # one was made after another had stepped, and has not stepped yet
        self.fuses = False  # optimizers step inside backward
        self.depth = 0  # 1 inside an optimizer step on the slow path
        self.inner_steps = 0  # optimizer steps inside the outermost one
        self.closure_calls = 0  # calls of its closure
        self.unmatched_batches: list[EndedParts] = []  # ends of batches before any optimizer step
        self.last_optimizer = self.failure = self.failed_in = 0
        self.usual_trigger = self.usual_loader = NOT_READY
        self.closing_trigger = CHECK_FORWARD  # a training forward may open the first step

    def phase_of(self, error: BaseException | None) -> int | None:
        """Return the phase that an exception has left through a hook in C; None if there was none."""
        return self.failed_in if error is not None and self.failure == id(error) else None

    @property
    def is_evaluating(self) -> bool:
        """Whether an evaluation runs, as far as is known: a batch of it has ended, or it needs no batch.

        With gradients, two batches were read. It continues until the model is trained again.
        """
        if self.evaluation.start or self._may_evaluate_with_gradients():
            return True

        return self.evaluating and (self._is_idle() or self._is_evaluation())

    def _may_evaluate_with_gradients(self) -> bool:
        """Whether models run on another loader's batches after the end of the training's, and are not trained yet."""
        loader = self._untrained_loader()
        if loader is None or loader is self.training_loader:
            return False

        # The first batch may be of the next training.
        return self.exhausted_loader is not None and self._batches_since_step() > 1

    @property
    def has_stepped(self) -> bool:
        """Whether an optimizer has stepped in the open step, so that the end of training closes it."""
        return bool(self.step_call)

    @property
    def loop_has_ended(self) -> bool:
        """Whether the training loader is at its end, and no part of another step has begun since."""
        loader = self.training_loader
        if loader is None or loader.is_read or self.batch is not None:
            return False

        return not (self.forward_ns or self.backwards or self.step_call)

    @property
    def step_is_done(self) -> bool:
        """Whether an optimizer has stepped in the open step, and no part of another step has begun since.

        With several optimizers another one may follow.
        """
        if self.is_evaluating:
            return self.has_stepped

        if self.ended.may_be_step:
            return self.batch is None and self._is_idle()

        return bool(self.step_call) and not self._may_step_again(self.step_call)

    def is_overdue(self) -> bool:
        """Whether the open step is done, and takes far longer than those before: a loop may be over."""
        began_ns: int = self.open_slots[_STEP_START]
        return began_ns > 0 and self.step_is_done and is_overdue(self.ring, monotonic_ns() - began_ns)

    def boundary(self, t: int, loader: Any) -> None:
        """Handle a request to a loader: decide what kind of part ends here.

        A training loop over one loader does not call this: its steps close by `closing_trigger`.
        """
        if self.evaluation.start:
            self._end_evaluation(t, is_between_epochs=loader is self.training_loader)

        if not self.open:
            self.begin_step(t)
            self.part_loader = loader
            return

        idle = self._is_idle() and (self.ended.may_be_step or not self.step_call)
        if loader is self.training_loader and self._is_evaluation_with_gradients():
            self._discard_with_gradients(t)
        elif idle and loader is self.part_loader:
            return  # after the creation of its iterator, or a skipped batch: one single wait
        elif self._is_evaluation():
            self._discard(t, batches=1, evaluating=True)
        elif idle and self.evaluating:
            self._discard(t, batches=0, evaluating=False)  # the time after the last evaluation batch
        elif self.ended.may_be_step and loader is not self.training_loader:
            return  # still unknown: already the next step, or part of this one

        self.part_loader = loader
        if not self.explicit:
            self._end_part(t, loader)
        elif not self.blocks:
            self._cut(t)

    def _end_part(self, t: int, loader: Any) -> None:
        if self.training_loader is None and self.backwards:
            self.training_loader = self.first_loader

        if self.step_call and loader is self.training_loader:
            if not self.ended.may_be_step:
                self.commit(t)
                return

            self._close_ended()

        if not self.optimizers_seen and self.backwards and not self.inferred:
            self._hold_batch(t)

        if self.part_start != t:
            self._cut(t)

    def _training_forward(self, t: int) -> None:
        """Handle a training forward, which may begin a step without a loader."""
        if not self.open:
            self.begin_step(t)
            return

        if self.evaluation.start and self.evaluation.may_be_targets:
            self.evaluation.forget()

        closes = self.step_call and (self.needs_no_loader or self.fetched_ahead) and not self.explicit
        if self._leave_evaluation(t) or not closes:
            return

        if self.batch is None or not self.ended.may_be_step:
            self.cut_on_step = False  # forwards separate the steps: no cut is needed at the optimizer step
            self.commit(t)
        elif not self._may_step_again(self.step_call):
            self._close_ended()  # the batch is the next step's

    def begin_training_mode(self) -> None:
        """Handle a model's change to training mode: evaluation ends there, and the next step has what follows.

        Except in what is known to be on a loader's batch, which may be evaluation as a whole.
        """
        if not self.is_training_thread():
            return

        t = monotonic_ns()
        if self.evaluation.start and self.batch is not None and self._is_evaluation_with_backward():
            self.evaluation.forget()  # it was on the loader's batch
        elif self.is_evaluating and (self.batch is None or self.backwards):
            self._leave_evaluation(t)

        if self._is_evaluation_with_backward():
            self._discard_with_gradients(t)

    def _is_evaluation_with_backward(self) -> bool:
        """Whether an evaluation has ended that called backward on models in `eval()`, as for attacks on them."""
        has_backward = self.backwards or (self.ended.micro_batches and not self.ended.may_be_step)
        return bool(has_backward) and self._is_evaluation_with_gradients()

    def _leave_evaluation(self, t: int) -> bool:
        """Handle the end of evaluation, and return True, if there is one."""
        if self.evaluation.start:
            self._train_again(t)
            return True

        if not self.evaluating or self.batch is not None or not self._is_idle():
            return False

        self._discard(t, batches=0, evaluating=False)
        if self.ended.may_be_step and self.training_loader is None:
            self._close_ended()

        return True

    def _train_again(self, t: int) -> None:
        """Handle the end of evaluation without a loader."""
        self.evaluation.end(t)
        if self.ended.may_be_step and self.first_loader is None and self.closing_trigger is CHECK_FORWARD:
            self.cut_on_step = False
            self._close_ended()

    def _end_evaluation(self, t: int, *, is_between_epochs: bool) -> None:
        """Handle the end of evaluation without a loader by a request to one, or by the end of the run."""
        if self.batch is None or (self.backwards and self._untrained_loader() is None):
            self.evaluation.end(t, is_between_epochs=is_between_epochs)
        else:
            self.evaluation.forget()  # it was on the loader's batch

    def exhausted(self, loader: Any, drain_ns: int) -> None:
        """Handle the end of a loader: training may continue without it, or on a prefetched batch.

        Args:
            drain_ns: time until the loader said so, in which its workers ended.
        """
        loader.end(self)
        self.exhausted_loader = loader
        if loader is self.batch:
            self.is_drained = self.needs_slow_commit = True

        self.drain_ns += drain_ns
        self.evaluated = False
        if self.batches and not (self.backwards or self._is_evaluation_with_gradients()):
            self.batches += 1

        is_untrained = loader is self.training_loader and not (self.step_call or self.backwards)
        if is_untrained:
            self.trained = None

        if self.evaluating or (is_untrained and not self.evaluation.collects):
            self.closing_trigger = CHECK_FORWARD  # the next call may be one of an evaluation

    def forward_begins(self, t: int, module: Any, *, trains: bool) -> None:
        """Handle a forward inside another phase, or in a part of unknown kind.

        Args:
            t: monotonic time in ns.
            trains: whether gradients are enabled.
        """
        in_closure = self.depth or self.current == _OPTIMIZER  # inside an optimizer step: no step begins here
        if not (trains or in_closure) and self.evaluation.begin(t, module):
            self.evaluated = self.batch is not None
        elif self.closing_trigger is ON_FORWARD and not in_closure:
            self.commit(t)
        elif self.closing_trigger is CHECK_FORWARD:
            if not trains:
                self.evaluated = True
                return

            if not in_closure:
                self._training_forward(t)

            self.trained = module

    def begin_step_call(self, optimizer: Any, t: int) -> Began:
        """Begin a step call; return a value for `end_step_call`."""
        previous: int = self.current
        ident = id(optimizer)
        if not self.open:
            self.begin_step(t)
        elif self.evaluation.start:
            self.evaluation.end(t)

        if ident != self.last_optimizer:
            self.register_optimizer(optimizer)

        if previous == _BACKWARD:  # all step calls inside one backward pass count as one, after it
            self.fused = self.fuses = self.needs_slow_commit = self.needs_slow_backward = True
        elif self.step_call:
            self.repeat_step_call(ident, t)

        self.inner_steps = self.closure_calls = 0
        self.depth = 1
        self.current = _OPTIMIZER
        self.open_slots[_OPTIMIZER] = t
        return previous, t

    def end_step_call(self, optimizer: Any, began: Began, *, failed: bool) -> None:
        """End an optimizer step call; one that raised does not count."""
        self.depth = 0
        self.leave(_OPTIMIZER, began)
        if began[0] != _BACKWARD and not failed:
            self.after_step(monotonic_ns(), id(optimizer))

    def repeat_step_call(self, ident: int, t: int) -> None:
        """Handle an optimizer step call in a step that has one already: it may begin another step."""
        self.closing_trigger = NOT_READY  # and no forward in the optimizer's closure closes a step
        known = ident == self.step_call or ident in self.later_step_calls or self._are_steppers_gone()
        self.has_new_optimizer &= not known  # else it steps in no step of the others
        if self.ended.may_be_step:
            if known:
                if self.batch is not None:
                    self._train_from(self.batch)  # a new loader replaced the last one

                self.split(ident)
                self._close_ended()
            else:
                self._merge(ident)
        elif known and not self.explicit and ident != _FUSED:
            if self.needs_no_loader:
                self.cut_on_step = True
                self.usual_loader = NOT_READY
                self.commit(t)
            else:
                self.repeated = self.batch is not None
        elif not known and not self.explicit and ident != _FUSED and self.may_begin_a_phase():
            self._cut(t)
            self._merge(ident)
            self.closing_trigger = NOT_READY

    def _are_steppers_gone(self) -> bool:
        """Whether no optimizer of this step is alive, as where the script makes one for each step."""
        return not any(
            ident == _FUSED or ident in self.optimizers for ident in (self.step_call, *self.later_step_calls)
        )

    def after_step(self, t: int, ident: int) -> None:
        """Handle the end of an optimizer step call: the step may close from here on."""
        if not self.open:
            self.begin_step(t)

        if self.step_call:
            self.later_step_calls.add(ident)
            self.needs_slow_commit = True
        else:
            self.step_call = ident

        if self.explicit or (self.repeated and self._hold_step_call(t)):
            return

        drained, self.exhausted_loader = self.exhausted_loader, None
        if self.first_loader is None:
            if self.training_loader is not None and drained is self.training_loader:
                self._was_fetched_ahead(ident)
            else:
                self._expect_forward(t, ident)

            return

        if self.training_loader is None:
            self._train_from(self.first_loader)

        if self.needs_no_loader:
            self._await_forward(ident)
            return

        self.closing_trigger = self.usual_trigger = self.training_loader
        self.usual_loader = self.first_loader

    def _expect_forward(self, t: int, ident: int) -> None:
        """Wait, without a loader, for the next training forward or a repeated optimizer step call to close the step."""
        several = self._may_step_again(ident)
        if several or self.cut_on_step:
            self._cut(t)

        if several:
            self.closing_trigger = NOT_READY if self.training_loader is None else self.training_loader
        elif self.cut_on_step:
            self.closing_trigger = CHECK_FORWARD
        else:
            self.closing_trigger = self.usual_trigger = ON_FORWARD
            self.usual_loader = None

    def _was_fetched_ahead(self, ident: int) -> None:
        """Handle a step on a prefetched batch after the end of the training loader, as with accelerate's loaders."""
        self.first_loader = self.training_loader
        self._await_forward(ident)

    def workers_end(self, loader: Any) -> Began | None:
        """Begin to end the workers of a dropped iterator; a step that is done closes before, as in a `break`.

        Returns:
            What `workers_ended` takes; None if the wait does not count.
        """
        try:
            if self.closing_trigger is loader and self.step_is_done and self.thread == get_ident():
                self.commit(monotonic_ns())
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)

        return self.enter(_INPUT_WAIT)

    def loader_left(self, loader: Any) -> None:
        """Handle the end of a loader's last iterator: a ready step may also close without a request to it."""
        try:
            if self.closing_trigger is loader and self.step_call and self.thread == get_ident():
                self._await_forward(self.step_call)
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)

    def _await_forward(self, ident: int) -> None:
        """Wait for a request to the training loader or a forward, unless another optimizer may follow."""
        self.needs_slow_commit = True
        self.usual_loader = NOT_READY
        self.fetched_ahead = not self._may_step_again(ident)
        self.closing_trigger = CHECK_FORWARD if self.fetched_ahead else self.training_loader

    def _may_step_again(self, ident: int) -> bool:
        """Whether another optimizer may follow in this step."""
        return ident != _FUSED and (len(self.optimizers) > 1 or self.optimizers_alive > 1 or self.has_new_optimizer)

    def _train_from(self, loader: Any) -> None:
        self.training_loader = loader
        self.usual_loader = NOT_READY

    def step_without_call(self, t: int, ident: int, flags: int = 0) -> None:
        """Handle a step that no call of an optimizer shows: inside backward, without an optimizer, or in a graph.

        Args:
            flags: of the step, as bits of `StepFlag`.
        """
        if self.step_call:
            self.repeat_step_call(ident, t)

        if flags:
            self.flags |= flags
            self.needs_slow_commit = True

        self.after_step(t, ident)

    def after_backward(self, t: int) -> None:
        """Handle the end of a backward pass on the slow path: it may be a step by itself."""
        if not self.optimizers_seen:  # whose constructors would tell
            self.listener.find_new_models()

        if self.fused:
            self.fused = False
            self.step_without_call(t, _FUSED)
        elif self.inferred:
            self.step_without_call(t, _FUSED, _INFERRED)
        elif not self.optimizers_seen and self.first_loader is None and self.open and not self.explicit:
            self._hold_batch(t)

    def plan_backward(self) -> None:
        """Decide whether backward passes take the slow path."""
        is_unusual = self.awaits_backward or self.fuses or not self.optimizers_seen
        self.needs_slow_backward = is_unusual or (self.is_grouped and self.is_detailed(self.step))

    def optimizer_made(self, *, trains_others: bool = False) -> None:
        """Handle a new optimizer: it may step in the open step, after another one.

        Args:
            trains_others: whether its parameters are not those of the optimizer before it.
        """
        self.prepares |= trains_others
        if self.optimizers_seen:
            self.has_new_optimizer = True
            self.usual_loader = NOT_READY
            self.last_optimizer = 0  # it may have the address of one that is gone

    def register_optimizer(self, optimizer: Any) -> None:
        """Note an optimizer that is not the one of the last step."""
        ident = id(optimizer)
        self.last_optimizer = ident
        if ident in self.optimizers:
            return

        self.optimizers[ident] = self._reference(optimizer)
        self.optimizers_seen += 1
        self.has_new_optimizer = self.inferred = False
        self.usual_loader = NOT_READY
        self.unmatched_batches.clear()
        self.plan_backward()
        self.listener.new_optimizer(optimizer)

    def _reference(self, optimizer: Any) -> Any:
        ident, alive = id(optimizer), self.optimizers
        try:
            return weakref.ref(optimizer, lambda _: alive.pop(ident, None))
        except TypeError:  # its class allows no weak references: it counts as alive
            return None

    def first_backward_begins(self) -> None:
        """Find models and optimizers before the first gradients exist."""
        self.awaits_backward = False
        alive = self.listener.first_backward()
        self.has_no_optimizer = not alive and not self.optimizers_seen
        self.inferred = self.has_no_optimizer and self.first_loader is not None

        if not self.open:
            self.begin_step(monotonic_ns())

    def claim_thread(self) -> bool:
        """Make the current thread, which trains, the training thread; return whether it may be.

        It may if no other thread has trained or is in a trace_step() block, if the training moved here with its
        context, as in `asyncio.to_thread`, or if the thread that trained has ended, or is one of a pool without a task.
        """
        if not self.thread:
            return False

        if not (self.awaits_backward and not self.blocks) and (
            self.current < OTHER or not (self.is_training_context() or self._has_thread_left())
        ):
            return False

        self.end_user_phases(monotonic_ns())
        self.current = OTHER
        self.thread = get_ident()
        return self.is_training_thread()

    def _has_thread_left(self) -> bool:
        """Whether the training thread has ended, or has nothing to return to: a pool's threads take the next step."""
        if all(thread.ident != self.thread for thread in threading.enumerate()):
            return True

        frames = thread_stack(self.thread)
        return bool(frames) and all(is_standard_library(frame.f_code.co_filename) for frame in frames)

    def begin_block(self) -> None:
        """Begin a trace_step() block; the first one turns step detection off."""
        self.blocks += 1
        if self.blocks > 1:
            return

        t = monotonic_ns()
        self.account_user_phases(t)
        if self.evaluation.start:
            self.evaluation.end(t)

        if not self.explicit:
            if self.ended.may_be_step:
                self._close_ended()
            elif self.step_call:
                self.commit(t)

            self.explicit = True
            self.usual_loader = NOT_READY
            self.begin_step(t)
        elif self.evaluating and self._is_idle():
            self._discard(t, batches=0, evaluating=False)

        if self.eval_ns:
            self._flush_evals()

    def end_block(self, *, failed: bool) -> None:
        """End a trace_step() block. After an exception it is not a step, and its time belongs to the next one."""
        self.blocks -= 1
        if self.blocks or failed:
            return

        t = monotonic_ns()
        self.account_user_phases(t)
        self.flags |= _EXPLICIT
        self.needs_slow_commit = True
        self.commit(t)

    def finish(self) -> None:
        """End training: the open step becomes a row if an optimizer stepped in it, else it is dropped."""
        self._end_last(self.paused_ns or monotonic_ns())
        self.stop()

    def pause_training(self) -> None:
        """End the open step as the last one is ended: until `resume_training` nothing trains, as between cells.

        A step that has begun, and in which no optimizer has stepped, continues in the next cell.
        """
        if not self.open or self.blocks or not self.is_training_thread():
            return

        self.paused_ns = monotonic_ns()
        has_begun = bool(self.forward_ns or self.backwards or self.step_call)
        self.pause_ends_step = self.explicit or self.is_evaluating or self.step_is_done or not has_begun
        if self.pause_ends_step:
            self._end_last(self.paused_ns)

    def resume_training(self) -> None:
        """Begin the next step after a pause, or continue the open one; the time of the pause is in no step.

        It is not shown as open, as this cell may not train: lines that are seen in it before its phases are in none.
        """
        if not self.paused_ns or not self.is_training_thread():
            return

        t = monotonic_ns()
        if self.pause_ends_step:
            self.begin_step(t)
            self.open_slots[_STEP_START] = 0
        else:
            self.part_start += t - self.paused_ns

        self.paused_ns = 0

    def _end_last(self, t: int) -> None:
        """Append the row of the open step if an optimizer stepped in it, and that of an evaluation."""
        self.account_user_phases(t)
        if self.evaluation.start:
            self._end_evaluation(self.evaluation.last_end(t), is_between_epochs=True)

        if self.open and not self.explicit:
            if self._is_evaluation():
                self._discard(self.usual_batch_end(t), batches=1, evaluating=False)
            elif self.evaluating and self._is_idle():
                self._discard(self.usual_rest_end(t), batches=0, evaluating=False)
            elif not self.step_call and self._is_evaluation_with_gradients():
                self._discard_with_gradients(self.usual_calls_end(t))

            if self.ended.may_be_step:
                self.split_last()
                self._close_ended()
            elif self.unmatched_batches and (self.has_no_optimizer or len(self.unmatched_batches) >= _HELD_BATCHES):
                self._append_batches(self.unmatched_batches[-1].end_ns)
            elif self.step_call:
                end = self._end_of_last(t)
                if self.device is not None and end < t:
                    self.device.discard()  # there, the step would end now

                self.commit(end)

        if self.eval_ns:
            self._flush_evals()

        self.open_slots[_STEP_START], self.open_slots[_STEP] = 0, -1

    def _end_of_last(self, t: int) -> int:
        """Return the end of the last step, whose waiting and saving after the loop is cut off."""
        times = self.times
        comm_ns, saving_ns = usual_comm(self.ring, times[_COMM]), usual_saving(self.ring, times[_CHECKPOINT])
        after = times[_COMM] - comm_ns + times[_CHECKPOINT] - saving_ns
        times[_COMM], times[_CHECKPOINT] = comm_ns, saving_ns
        self.times = times
        timed = sum(times[:OTHER]) + sum(times[FIRST_USER::2])
        return usual_end(self.ring, t - after, self._total_ns(t) - after, timed)

    def _clear(self, t: int) -> None:
        super()._clear(t)
        self.fetched_ahead = False
        self.repeated = False  # the optimizer steps again on the same batch
        self.repeats: list[EndedParts] = []  # ends of steps on the same batch

    def _hold_batch(self, t: int) -> None:
        """Save the end of a batch, which becomes a step if there turns out to be no optimizer."""
        self._hold(self.unmatched_batches, t)
        held_ns = t - self.unmatched_batches[0].end_ns if self.has_no_optimizer else 0
        most = _HELD_BATCHES if self.has_no_optimizer else _HELD_FOR_OPTIMIZER
        if len(self.unmatched_batches) >= most or held_ns > _HELD_NS:
            self._append_batches(t)

    def _append_batches(self, t: int) -> None:
        """Append the held batches as steps: there is no optimizer."""
        self.inferred = True
        self._append_held(self.unmatched_batches, _INFERRED, t)

    def _hold_step_call(self, t: int) -> bool:
        """Save the end of a repeated step on the same batch; return whether the repetitions have become steps."""
        self.repeated = False
        total = self._total_ns(t)
        if not self.repeats:  # the end of the first one was not saved: it has the wait, and half of the rest
            waited = self.times[_INPUT_WAIT]
            half = (total - waited) // 2
            times = [spent // 2 for spent in self.times]
            times[_INPUT_WAIT] = waited
            self.repeats.append(EndedParts(times, end_ns=t - half, total_ns=total - half))

        self._hold(self.repeats, t)
        if len(self.repeats) < _HELD_BATCHES:
            return False

        self._append_held(self.repeats, 0, t)
        self.cut_on_step = True
        self.usual_loader = NOT_READY
        return True
