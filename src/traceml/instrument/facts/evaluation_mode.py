"""Training in `eval()`, in which dropout and batch normalization do not work as in training.

As after an evaluation without `model.train()`, or of a model that `from_pretrained` has returned.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.instrument.search.discovery import is_inside

if TYPE_CHECKING:
    from traceml.instrument.step_clock import StepClock

__all__ = ["EvaluationMode"]

_LEAST_UPDATES = 20  # what is trained in fewer steps in a row is trained so on purpose
_MOST = 4  # models in `eval()` that are watched, and classes of layers that are reported


class EvaluationMode:
    """Counts the steps in which models were trained in `eval()`.

    Each update of a parameter in place raises its version: that of a model that is only evaluated, or kept as it is
    while another one is trained, stays the same. Averaged weights are updated in place, too, but by no optimizer.

    Args:
        is_trained: whether an optimizer has a model's parameters, and the model is no part of a larger one.
        report: appends a row of `info`.
    """

    def __init__(self, clock: StepClock, is_trained: Callable[[Any], bool], report: InfoSender) -> None:
        self._clock, self._is_trained, self._report = clock, is_trained, report
        self._watched: list[_WatchedModel] = []
        self._first: int | None = None
        self._steps = self._next_step = 0
        self._counted = 0  # steps of this process up to the last one that counts: other models may be in `eval()`, too

    def begin(self, model: Any) -> None:
        """Note a model that changes to evaluation as a whole."""
        trainable = (each for each in model.parameters() if each.requires_grad and not each.is_inference())
        parameter = next(trainable, None)
        self.end(model)  # what was watched of it, as the model inside a wrapper
        self._watched = [each for each in self._watched if each.model() is not None]
        if parameter is not None and len(self._watched) < _MOST:
            since = self._clock.step + self._has_step_without_row
            self._watched.append(
                _WatchedModel(weakref.ref(model), weakref.ref(parameter), since, parameter._version, self._trained())
            )

    def end(self, changed: Any) -> None:
        """Note a module that changes to training: the other parts of its model are in `eval()` on purpose then."""
        watched, self._watched = self._watched, []
        for each in watched:
            if each.shares_modules_with(changed):
                self._count(each)
            else:
                self._watched.append(each)

    def look(self, *, is_last: bool = False) -> None:
        """Report the steps up to now: at each call in which their number may have grown by a quarter, and the last."""
        step = self._clock.step
        if is_last or step >= self._next_step:
            self._next_step = step + step // 4
            self._watched = [self._count(each) for each in self._watched]

    def _count(self, watched: _WatchedModel) -> _WatchedModel:
        """Report the steps of a model since the last look; return it with this look."""
        model, updates = watched.model(), watched.updates()
        if model is None or updates < watched.least_updates or not self._is_trained(model):
            return watched

        layers = sorted({type(each).__name__ for each in model.modules() if _differs(each)})[:_MOST]
        if not layers:
            return watched

        if self._first is None:
            self._first = watched.since

        trained = self._trained()
        self._steps += max(trained - max(watched.trained, self._counted), 0)
        self._counted = trained
        self._report(
            InfoKind.EVALUATION_MODE,
            model=type(model).__name__,
            layers=layers,
            step=self._first,
            steps=self._steps,
        )
        return watched._replace(version=watched.version + updates, trained=trained, least_updates=1)

    def _trained(self) -> int:
        """Return the steps that this process has trained: the newest may have no row yet."""
        return self._clock.rows + self._has_step_without_row

    @property
    def _has_step_without_row(self) -> bool:
        """Whether an optimizer has stepped in the open step, or in what has ended without a row: it is trained."""
        return bool(self._clock.step_call or self._clock.ended.may_be_step)


class _WatchedModel(NamedTuple):
    """A model that is in evaluation."""

    model: Callable[[], Any]  # weak reference, as the next one
    parameter: Callable[[], Any]  # one that may be trained
    since: int  # step
    version: int  # of the parameter when its steps were last counted
    trained: int  # steps of this process then: a training that is resumed counts its steps on
    least_updates: int = _LEAST_UPDATES  # with fewer, it is not told

    def updates(self) -> int:
        """Return how often the parameter was updated."""
        parameter = self.parameter()
        return 0 if parameter is None else int(parameter._version) - self.version

    def shares_modules_with(self, module: Any) -> bool:
        """Return whether a module is the model, a part of it, or has it inside, as a wrapper."""
        model = self.model()
        return model is not None and (is_inside(module, model) or is_inside(model, module))


def _differs(layer: Any) -> bool:
    """Return whether a layer works differently in training."""
    if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
        return bool(layer.track_running_stats)

    return isinstance(layer, torch.nn.modules.dropout._DropoutNd) and layer.p > 0
