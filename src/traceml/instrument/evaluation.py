"""Evaluation in a loop without a DataLoader: models called in `eval()` without gradients between training calls.

After an epoch also in training mode. A *period* of evaluation begins at such a call of a model that is trained, and
ends at the next `Module.train()`, training forward, request to a loader or backward pass. Its time belongs to no step,
like that of evaluation batches.

A model that only computes targets (a teacher) is not trained, and rollouts of reinforcement learning are part of the
training: they are not evaluation. Targets are computed before the step on a loader's batch: what is called after it, as
averaged weights that sample images, evaluates. Between epochs it may be either, as a loader that prefetches a batch
has ended before its last one is trained on.
"""

from __future__ import annotations

import sys
from typing import Any

from traceml.database.schema import Phase
from traceml.instrument.divided_step import DividedStep
from traceml.instrument.open_step.ended_parts import time_since
from traceml.instrument.phase_timer import CHECK_FORWARD, ON_FORWARD

__all__ = ["EvaluationPeriod"]

_CHECKPOINT, _FORWARD = int(Phase.CHECKPOINT), int(Phase.FORWARD)
# Where one of these is loaded, calls without gradients choose actions. That they do it in `eval()` is usual.
_SIMULATORS = ("gymnasium", "gym", "pettingzoo", "envpool", "dm_env", "stable_baselines3", "torchrl", "tianshou")
_PREPARATION = 10  # a longer time, in evaluation calls, is preparation of the training
_USUAL = 3  # this many steps in a row with a period between batch and training: it is a part of the step


class EvaluationPeriod:
    """The open period of evaluation of a clock.

    Attributes:
        start: its begin, monotonic time in ns; 0 outside.
        is_rollout: whether calls without gradients collect what is trained on: there is none then.
        is_play: the same of calls in training mode.
        may_be_targets: whether it is of a model that is not trained, on a batch that was fetched before its loader's
            end, if a training call follows.
    """

    def __init__(self, clock: DividedStep) -> None:
        self._clock = clock
        self.start = 0
        self.is_rollout = self.is_play = self.may_be_targets = False
        self._calls = self._last_call = 0
        self._longest_rest_ns = 0  # from the last call of a period to its end
        self._is_first = False  # before the first step
        self._in_training_mode = False
        self._times: list[int] = []  # the buckets at the begin
        self._closing_trigger: Any = None  # the clock's before it
        self._last_step = self._in_a_row = -1

    def begin(self, t: int, module: Any) -> bool:
        """Handle a call without gradients; return whether it is evaluation without a loader's batch.

        Args:
            t: monotonic time in ns.
        """
        if self.start:
            self._calls += 1
            self._last_call = t
            return True

        clock = self._clock
        called = module()
        if called is None or clock.explicit or (called.training and not self._may_sample()):
            return False

        is_trained = clock.listener.is_trained(called)
        if not (is_trained or self._has_no_batch()):
            return False

        if self.is_rollout or _has_simulator() or self._is_usual():
            return False

        self.may_be_targets = not is_trained
        self._open(t)
        self._in_training_mode = called.training
        return True

    def _has_no_batch(self) -> bool:
        """Whether no loader has one to train on: the step on the last batch is done, or the epoch."""
        clock = self._clock
        if not clock.step_call:
            return self._is_between_epochs()

        has_next = clock.ended.may_be_step and clock.batch is not None  # of another loader, as each epoch makes one
        return clock.first_loader is not None and not has_next

    def _is_between_epochs(self) -> bool:
        """Whether the loop over a loader has ended, and no model was called since that trains on a prefetched batch."""
        clock = self._clock
        if clock.step_call or clock.batch is not None or clock.exhausted_loader is None:
            return False

        called = None if clock.trained is None else clock.trained()
        return called is None or not called.training

    def _may_sample(self) -> bool:
        """Whether calls in training mode may be samples of the model, as those of a pipeline of `diffusers`.

        In the loop over a loader, such calls are parts of steps.
        """
        return self._is_between_epochs() and not self.is_play

    @property
    def collects(self) -> bool:
        """Whether the script collects by its models what it trains them on: reinforcement learning."""
        return self.is_rollout or self.is_play or _has_simulator()

    def _is_usual(self) -> bool:
        """Whether each step evaluates the model on its batch first, as for pseudo-labels."""
        clock = self._clock
        is_done = clock.step_call and not clock.joined  # of several optimizers, another one may follow
        if clock.batch is None or is_done or clock.rows == self._last_step:
            return False

        self._in_a_row = self._in_a_row + 1 if clock.rows == self._last_step + 1 else 0
        self._last_step = clock.rows
        return self._in_a_row >= _USUAL

    def _open(self, t: int) -> None:
        clock = self._clock
        self._is_first = not clock.open
        if self._is_first:
            clock.begin_step(t)
        elif clock.step_call and not clock.ended.may_be_step:
            if clock.closing_trigger is ON_FORWARD:
                clock.commit(t)
            else:
                clock.end_ready_part(t)

        clock.account_user_phases(t)
        clock.prepares = False
        self.start, self._calls, self._last_call = t, 1, t
        self._times, self._closing_trigger = clock.times, clock.closing_trigger
        clock.closing_trigger = CHECK_FORWARD
        clock.needs_slow_backward = True  # a backward pass ends it

    def end(self, t: int, *, is_between_epochs: bool = False) -> None:
        """End the period; take its time out of the step, except saving.

        Args:
            is_between_epochs: whether the loader is read again whose end was before it, or the run ends. Else calls in
                training mode were no evaluation: what they return may be the data of a new loader.
        """
        clock = self._clock
        if self._in_training_mode and not is_between_epochs:
            self.forget()
            return

        if self._is_first and not self._is_continuous(t):
            self.forget()
            clock.begin_step(t)
            return

        if clock.prepares:
            t = self.last_end(t)

        clock.prepares = False
        clock.account_user_phases(t)
        kept = self._times.copy()
        clock.add_evaluated(time_since(clock.times, kept))
        saving = clock.times[_CHECKPOINT] - kept[_CHECKPOINT]
        kept[_CHECKPOINT] += saving
        clock.times = kept
        spent = t - self.start - saving
        self._longest_rest_ns = max(self._longest_rest_ns, t - self._last_call - saving)
        clock.is_plain_evaluation = True
        clock.eval_ns += spent
        clock.eval_batches += self._calls
        clock.eval_end = t
        clock.part_start += spent
        clock.needs_slow_commit = True
        if clock.device is not None:
            clock.device.discard()

        self.forget()
        clock.plan_backward()

    def last_end(self, t: int) -> int:
        """Return when a period ended: if the script then does more than evaluate, after what is usual for a call.

        Or for the work after the last call, as long as in the periods before.
        """
        between_ns = (self._last_call - self.start) // max(self._calls - 1, 1)
        call_ns = (self._clock.forward_ns - self._times[_FORWARD]) // self._calls
        usual_ns = max(between_ns, call_ns)
        saving_ns = self._clock.times[_CHECKPOINT] - self._times[_CHECKPOINT]
        rest_ns = t - self._last_call - saving_ns
        if self._clock.prepares or rest_ns >= _PREPARATION * usual_ns:
            rest_ns = min(rest_ns, max(usual_ns, self._longest_rest_ns))

        return self._last_call + rest_ns + saving_ns

    def _is_continuous(self, t: int) -> bool:
        """Whether the training begins right after the last call: else the script tried the model, and prepares."""
        called_ns = self._last_call - self.start
        return self._calls > 1 and t - self._last_call < _PREPARATION * called_ns / (self._calls - 1)

    def forget(self) -> None:
        """Leave the period to the rules for batches: nothing was trained on the loader's batch."""
        self.start = 0
        self._clock.closing_trigger = self._closing_trigger


def _has_simulator() -> bool:
    return any(name in sys.modules for name in _SIMULATORS)
