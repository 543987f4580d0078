"""Reports of facts about the script: each when it is known, and again when it has changed."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from traceml.clock import monotonic_ns
from traceml.database.info_kinds import InfoKind
from traceml.inspection.loaded_modules import loaded_module
from traceml.instrument.facts.descriptions import (
    batch_size_facts,
    first_parameter,
    input_facts,
    loader_facts,
    model_facts,
    optimizer_facts,
)
from traceml.instrument.values.reductions import ReductionCounter

if TYPE_CHECKING:
    from traceml.instrument.loader import LoaderToken
    from traceml.instrument.step_clock import StepClock

__all__ = ["FactReports", "Info"]

Info = dict[str, Any]
_LIKE = ("dataset", "length", "num_workers")
_COUNTED = 8  # from here on only powers of two are reported
_MAX_LOADERS = 64  # whose facts are compared with those of later ones
_MAX_BEGINS = 256  # trainings whose first step is reported: a script may make a model for each step
_PART_BYTES = 1 << 28  # a file of this size may be a part of the checkpoint of any model
_DETECTION_STEPS = 64  # after the last one with detection of anomalies, this is over
_WHOLE = 4  # calls with as many samples before a backward pass: views, or the networks of a GAN


class FactReports:
    """Reports facts as rows of `info`.

    Args:
        on_info: takes the rows; None: nothing is reported.
    """

    def __init__(self, clock: StepClock, on_info: Callable[[Info], None] | None) -> None:
        self._clock, self._on_info = clock, on_info
        self._reported: dict[InfoKind, Info] = {}  # the last facts
        self._numbers: dict[str, int] = {}  # of loaders, by their facts as a text
        # by the facts in `_LIKE`: number of loaders that followed each other, and a weak reference to the last one
        self._loaders: dict[tuple[Any, ...], tuple[int, Any]] = {}
        self._autocast = False  # `torch.autocast` was on in the training
        self._begins = 0  # trainings that have begun after the first step
        self._detected: int | None = None  # the last step in which autograd detected anomalies
        self._trained: Any = None  # weak reference to a parameter of the newest optimizer

    def report(self, kind: InfoKind, /, at: Info | None = None, **facts: Any) -> None:
        """Report facts if they differ from the last report of their kind.

        Args:
            at: fields that are added, and not compared.
        """
        if self._on_info is None or self._reported.get(kind) == facts:
            return  # the script makes the same again for each step or epoch

        self._reported[kind] = facts
        self._on_info({"kind": kind, **facts, **(at or {}), "t_ns": monotonic_ns()})

    def loader(self, loader: Any, token: LoaderToken | None = None) -> None:
        """Report a loader, with its number in this process.

        One like an earlier loader gets its number, and is not reported: a script may make them for each epoch.
        """
        if self._on_info is None:
            return

        facts = loader_facts(loader)
        key = repr(facts)
        if token is not None and key in self._numbers:
            token.number, self._reported[InfoKind.LOADER] = self._numbers[key], facts
        else:
            self.report(InfoKind.LOADER, {"number": None if token is None else token.number}, **facts)
            if token is not None and len(self._numbers) < _MAX_LOADERS:
                self._numbers[key] = token.number

        self._count(loader, facts)

    def _count(self, loader: Any, facts: Info) -> None:
        """Report how many loaders of one data set were made: a script may make one for each epoch.

        One that is kept beside another, as to evaluate on the same data, is none of them.
        """
        like = {name: facts[name] for name in _LIKE}
        made, last = self._loaders.get(tuple(like.values()), (0, None))
        if last is not None and last() is not None:
            return

        made, last = made + 1, None
        with suppress(TypeError):  # its class allows no weak references: the next one follows it
            last = weakref.ref(loader)

        self._loaders[tuple(like.values())] = made, last
        if 1 < made <= _COUNTED or (made > _COUNTED and made.bit_count() == 1):
            self.report(InfoKind.LOADERS_MADE, **like, made=made)

    def training_loader(self) -> None:
        """Report which loader's batches are trained on: a script may read another one first."""
        number = getattr(self._clock.training_loader, "number", None)
        if number is not None:
            self.report(InfoKind.TRAINING_LOADER, number=number)

    def input(self, tensor: Any, model: Any, is_listed: bool) -> None:
        """Report the input of a model, which may be one of a list."""
        facts = input_facts(tensor, model, self._batch_size, is_listed=is_listed)
        is_first = facts["batch_first"] and not self._is_part(int(tensor.shape[0]))
        autocast = facts["autocast"] or self._autocast
        self.report(InfoKind.INPUT, **(facts | {"batch_first": is_first, "autocast": autocast}))

    def autocast(self) -> None:
        """Report that the training runs under `torch.autocast`, be it inside the call of the model."""
        self._autocast = True
        known = self._reported.get(InfoKind.INPUT)
        if known is not None:
            self.report(InfoKind.INPUT, **(known | {"autocast": True}))

    def batch(self, batch: Any) -> None:
        """Report what a batch consists of, if it is the largest so far."""
        known = self._reported.get(InfoKind.BATCH, {})
        sizes = batch_size_facts(batch)
        self.report(InfoKind.BATCH, **{name: max(size, known.get(name, 0)) for name, size in sizes.items()})

    def calls(self, sizes: list[tuple[int, int]], are_passes_even: bool, together: int) -> None:
        """Report again what is counted of the input, given samples and elements of the calls before a backward pass.

        Args:
            are_passes_even: whether all passes on the same batches have as many samples.
            together: samples of several passes on the same batches, 0 if that differs.
        """
        is_split = bool(together) and together == self._batch_size
        self._clock.split_size = together if is_split else 0
        self._single_calls(sizes, together if is_split else len(sizes))
        known = self._reported.get(InfoKind.INPUT)
        if known is None:
            return

        samples = {each for each, _ in sizes}
        is_even = (are_passes_even or is_split) and len(samples) == 1
        whole = is_even and (len(sizes) <= _WHOLE or self._batch_size in samples)
        tokens = known["tokens"] and len(sizes) == 1
        self.report(InfoKind.INPUT, **(known | {"tokens": tokens, "batch_first": known["batch_first"] and whole}))

    def _single_calls(self, sizes: list[tuple[int, int]], calls: int) -> None:
        """Report that a model is called with one sample at a time, as often as a batch has samples.

        Where samples differ in size, as images do, they may not fit into one tensor.
        """
        are_alike = len(set(sizes)) == 1 and sizes[0][0] == 1
        if are_alike and 1 < calls == self._batch_size:
            self.report(InfoKind.SINGLE_CALLS, calls=calls)

    @property
    def _batch_size(self) -> int | None:
        """The loader's, None without one."""
        return self._reported.get(InfoKind.LOADER, {}).get("batch_size")

    def _is_part(self, samples: int) -> bool:
        """Whether these are more than the loader's samples: nodes of its graphs, or positions of its texts."""
        return self._clock.batches == 1 and samples > (self._batch_size or samples)

    def model(self, module: Any) -> None:
        """Report a model, and count the reductions of its gradients from now on."""
        self.report(InfoKind.MODEL, {"step": self._clock.step}, **model_facts(module))
        if self._clock.reductions is None:
            self._clock.reductions = ReductionCounter()

        self._clock.reductions.watch(module)

    def least_checkpoint_bytes(self) -> int:
        """Return the bytes of the smallest file of a checkpoint: a rank's part, with a byte for each trained parameter.

        A large model may be in several files. 0 before a model is known.
        """
        model = self._reported.get(InfoKind.MODEL, {})
        return min((model.get("trainable") or 0) // (model.get("gradient_size") or 1), _PART_BYTES)

    def reductions(self) -> None:
        """Report backward passes and reductions per step, when they are known or have changed."""
        facts = self._clock.reductions.facts() if self._clock.reductions is not None else None
        if facts is not None:
            self.report(InfoKind.REDUCTIONS, **facts)

    def optimizer(self, optimizer: Any) -> None:
        """Report an optimizer, and a training that begins with it: of other parameters, be they as many."""
        step, first = self._clock.step, first_parameter(optimizer)
        self.report(InfoKind.OPTIMIZER, {"step": step}, **optimizer_facts(optimizer))
        if first is None or (self._trained is not None and not self.trains_others(optimizer)):
            return

        self._trained = weakref.ref(first)
        self._begins += step > 0
        if 0 < self._begins <= _MAX_BEGINS:
            self.report(InfoKind.TRAINING_BEGINS, step=step)

    def trains_others(self, optimizer: Any) -> bool:
        """Return whether an optimizer has other parameters than the newest one that has stepped."""
        first = first_parameter(optimizer)
        return first is not None and self._trained is not None and self._trained() is not first

    def debugging(self) -> None:
        """Report whether autograd detects anomalies, and whether torch's profiler records, once they were on."""
        profiler = sys.modules.get("torch.autograd.profiler")
        self.look_for_detection()
        is_on = self._detected is not None and self._clock.step - self._detected < _DETECTION_STEPS
        self._switch(InfoKind.ANOMALY_DETECTION, is_on=is_on)
        self._switch(InfoKind.PROFILER, is_on=bool(getattr(profiler, "_is_profiler_enabled", False)))

    def look_for_detection(self) -> None:
        """Note whether autograd detects anomalies now: it may be on in a part of each step alone.

        Torch turns it on itself while it traces a backward pass to compile it: that is no choice of the script.
        """
        torch = loaded_module("torch")  # a script may have steps without it
        if torch is not None and torch.is_anomaly_enabled() and torch._guards.TracingContext.try_get() is None:
            self._detected = self._clock.step

    def _switch(self, kind: InfoKind, *, is_on: bool) -> None:
        if is_on or kind in self._reported:
            self.report(kind, on=is_on)
