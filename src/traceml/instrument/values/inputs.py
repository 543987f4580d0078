"""Sizes of the batches that are trained on, and fingerprints of some of them.

The size is that of the first tensor in the arguments of the last forward with gradients before a backward pass. The
forward hook only compares its samples and elements with those before (in Python, its shape); all else is done here,
when they have changed, and in calls without gradients, whose sizes (of rollouts, of evaluation) are not those of the
training's. A tensor that another model has made of a batch, as an encoder for its decoder, is no batch. A nested
tensor has no size, nor has a vector of floating-point numbers: it is one sample without a batch as often as a batch of
numbers. Where there are others, one of them is taken. A tensor in a list is one sample, as images of several sizes
are, as often as a batch. Texts that are compared with each other, a list of mappings with `input_ids`, are together the
elements of their samples.

A fingerprint is a hash of 16 numbers that are spread over a batch as the loader returns it, on the CPU, and of 16 of
each of the next tensors in it: made-up inputs may be alike on all ranks, by one seed, where their labels are not. Ranks
that train on the same batches have the same ones. It takes some 10 us a tensor, so the first 3 batches of an epoch have
one, and one in 256 after them, at most one in 192 steps: 0.1 us per step with labels. The same batches are measured:
what a loader worker would take to hand one over depends on their tensors and bytes.
"""

from __future__ import annotations

import dataclasses
import logging
from _thread import get_ident
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.fx import _symbolic_trace

from traceml.fail_open import fail_open
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.step_clock import StepClock
from traceml.instrument.values.batch_calls import BatchCalls, OnCalls
from traceml.instrument.values.rollouts import RolloutSearch, is_readable

__all__ = ["BatchReader", "patch_autocast"]

# Versions of torch that have both warn of the second one.
_is_fx_tracing = getattr(_symbolic_trace, "is_fx_symbolic_tracing", None) or _symbolic_trace.is_fx_tracing

_PREFERRED = "input_ids"
_DEPTH = 3  # of nested containers: more is not a batch
_WIDTH = 16  # entries of a container in which a tensor is looked for
_NUMBERS = 16
_TENSORS = 4  # of a batch that a fingerprint is of
_DISTINCT = 4  # numbers that differ: batches of mostly zeros could be equal by chance
_FIRST_BATCHES = 3
_LATER_MASK = 255  # one batch in 256
_STEPS_PER_FINGERPRINT = 192
_FREE = 6
_MASK = (1 << 63) - 1
_functorch: Any = getattr(torch._C, "_functorch", None)
_log = logging.getLogger("traceml")


class BatchReader:
    """Reads sizes and fingerprints of batches for a clock.

    Args:
        on_input: called with the first input, its model, and whether it is one of a list of inputs, for facts about
            them.
        on_batch: called with batches of which a fingerprint is taken.
        on_calls: called with what `BatchCalls` finds.
        on_play: called where a trained model is called in `eval()` with one sample, without a loader, between
            trainings with more.
    """

    def __init__(
        self,
        clock: StepClock,
        on_input: Callable[[Any, Any, bool], None],
        on_batch: Callable[[Any], None],
        on_calls: OnCalls,
        on_play: Callable[[], None],
    ) -> None:
        self._clock, self._on_input, self._on_batch, self._on_play = clock, on_input, on_batch, on_play
        self._batch_calls = BatchCalls(clock, on_calls)
        self._known = False
        self._taken = self._wanted = 0
        self._broken = self._calls = False
        self.has_trained = False
        """Whether a model was called with gradients: else only its parts may have been."""
        self._rollouts = RolloutSearch()
        self._plays = RolloutSearch()  # of calls in training mode, which are never an evaluation
        self.begin_epoch()

    def measure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: Any = None) -> None:
        """Note the size of a forward's input."""
        if self._broken:
            return

        try:
            if _is_recorded():
                return

            tensor = _first_of((args, kwargs), _DEPTH + 1)
            self._record(tensor, model, (*args[:_WIDTH], *kwargs.values()))
        except Exception as error:  # noqa: BLE001 - the user's containers may raise anything
            self._fail(error)

    def inspect(self, batch: Any) -> None:
        """Take the fingerprint of a batch, for the row of its step."""
        clock = self._clock
        clock.inspects = False
        try:
            clock.fingerprint = clock.fingerprint or fingerprint_of(_first_tensor(batch, _DEPTH), _values_of(batch))
            clock.needs_slow_commit = True
            self._taken += 1
            self._wanted -= 1
            clock.inspects = self._wanted > 0
            self._on_batch(batch)
        except Exception as error:  # noqa: BLE001 - the user's containers may raise anything
            self._fail(error)

    def begin_epoch(self) -> None:
        """Take fingerprints of the first batches of a new iterator."""
        self._plan(_FIRST_BATCHES)

    def plan_fingerprint(self) -> None:
        """Take the fingerprint of a batch from time to time; called every 64 rows."""
        if not (self._clock.rows - 1) & _LATER_MASK:
            self._plan(1)

    def _plan(self, batches: int) -> None:
        """Take fingerprints of the next batches, if few have been taken so far."""
        clock = self._clock
        if self._broken or self._taken >= _FREE + clock.rows // _STEPS_PER_FINGERPRINT:
            return

        self._wanted = max(self._wanted, batches)
        clock.inspects = True

    def _record(self, tensor: Any, model: Any, values: tuple[Any, ...]) -> None:
        clock = self._clock
        if not torch.is_grad_enabled():
            self._record_call(tensor, model)
            return

        self.has_trained, self._calls = True, False
        if tensor is None or not _has_size(tensor):
            clock.input_shape, clock.input_samples, clock.input_elements = None, 0, 0
            self._record_vector(tensor)
            return

        if self._known and tensor.grad_fn is not None:
            return

        clock.input_shape = tensor.shape
        elements = _compared_elements(values, tensor) or tensor.numel()
        copies = _copies(tensor)
        clock.input_samples, clock.input_elements = int(tensor.shape[0]) * copies, elements * copies
        if not self._known:
            self._known = True
            self._on_input(tensor, model, _is_one_of_several(values, tensor))

        if not self._rollouts.is_over:
            self._rollouts.trained(tensor)
            clock.evaluation.is_rollout = self._rollouts.found

        if not self._plays.is_over:
            self._plays.trained(tensor)
            clock.evaluation.is_play = self._plays.found

        if not self._batch_calls.is_over:
            self._batch_calls.record((clock.input_samples, clock.input_elements))

        if self._rollouts.is_looking or self._plays.is_looking or not self._batch_calls.is_over:
            clock.input_shape = None  # the next call is read too

    def _record_vector(self, tensor: Any) -> None:
        """Count a call with a vector, of a model that no batch was seen of: it may be one sample of a batch."""
        if tensor is None or tensor.is_nested or tensor.dim() != 1 or self._known or self._batch_calls.is_over:
            return

        copies = _copies(tensor)
        self._batch_calls.record((copies, tensor.numel() * copies))

    def _record_call(self, tensor: Any, model: Any) -> None:
        """Note a call without gradients, whose input is not trained on; the first one may be a rollout's."""
        self._clock.input_shape = None  # the next call with gradients is measured
        if self._calls or tensor is None or tensor.is_nested or not tensor.dim():
            return

        self._calls = True
        if model is None or not self._clock.listener.is_trained(model):
            return

        is_one = tensor.dim() == 1 or tensor.shape[0] == 1
        if is_one and not model.training and not self._clock.batches and self._clock.input_samples > 1:
            self._on_play()

        search = self._plays if model.training else self._rollouts
        if not search.is_over:
            search.called(tensor)

    def _fail(self, error: Exception) -> None:
        self._broken, self._clock.inspects = True, False
        self._clock.input_samples = self._clock.input_elements = 0
        with fail_open(_log, "instrument", "batches are no longer measured"):
            raise error


def _is_recorded() -> bool:
    """Whether torch records the call as a graph: torch.export, torch.jit.trace, make_fx.

    What is asked of a tensor becomes part of the graph there, and a size that is read becomes a constant, so that
    torch.export refuses a model whose batch is of any size.
    """
    return bool(torch.jit.is_tracing() or is_compiling() or _is_fx_tracing())


def fingerprint_of(tensor: Any, others: Iterable[Any] = ()) -> int:
    """Return the hash of 16 numbers of a tensor; 0 if it is not on the CPU, or they are too few or too alike.

    Args:
        others: of the same batch; those that are tensors on the CPU change the hash, too.
    """
    numbers = _spread_numbers(tensor)
    if len(numbers) < _NUMBERS or len(set(numbers)) < _DISTINCT:
        return 0

    beside = [other for _, other in zip(range(_TENSORS), others, strict=False) if other is not tensor]
    return hash((tensor.numel(), *numbers, *(number for other in beside for number in _spread_numbers(other)))) & _MASK


def _spread_numbers(tensor: Any) -> list[float]:
    """Return 16 numbers that are spread over a tensor, or all of a smaller one; none of one that cannot be read."""
    if not is_readable(tensor) or not tensor.is_contiguous():
        return []

    stride = max((tensor.numel() // _NUMBERS - 1) | 1, 1)  # odd: the rows of images are often a power of two
    numbers: list[float] = tensor.detach().view(-1)[::stride][:_NUMBERS].tolist()
    return numbers


def _values_of(batch: Any) -> Iterable[Any]:
    """Return what is in a batch: a list, a tuple or a mapping."""
    return batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()


def _compared_elements(values: Iterable[Any], first: Any) -> int:
    """Return the elements of texts that are compared with each other; 0 if the first tensor is of no such text."""
    for value in values:
        if isinstance(value, list | tuple) and isinstance(next(iter(value), None), Mapping):
            found = [each.get(_PREFERRED) for each in value[:_WIDTH] if isinstance(each, Mapping)]
            texts = [each for each in found if isinstance(each, torch.Tensor)]
            if found[0] is first and texts and len(texts) == len(found):
                return sum(each.numel() for each in texts if each.shape[:1] == texts[0].shape[:1])

    return 0


def _is_one_of_several(values: Iterable[Any], first: Any) -> bool:
    """Return whether the first tensor is one of a list: of samples, or of inputs of the same samples."""
    return any(isinstance(value, list | tuple) and len(value) > 1 and value[0] is first for value in values)


def _first_tensor(value: Any, depth: int) -> Any:
    """Return the first tensor in nested containers, `input_ids` before others; None if there is none."""
    if isinstance(value, torch.Tensor):
        return value
    if not depth:
        return None
    if isinstance(value, Mapping):
        return _first_of((value.get(_PREFERRED), *value.values()), depth)

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _first_of((getattr(value, field.name, None) for field in dataclasses.fields(value)), depth)

    return _first_of(value, depth) if isinstance(value, list | tuple) else None


def _first_of(values: Iterable[Any], depth: int) -> Any:
    """Return the first tensor that has a size; without one, the first."""
    first = None
    for _, value in zip(range(_WIDTH), values, strict=False):
        tensor = _first_tensor(value, depth - 1)
        if tensor is not None and _has_size(tensor):
            return tensor

        first = tensor if first is None else first

    return first


def _has_size(tensor: Any) -> bool:
    return not tensor.is_nested and tensor.dim() >= 1 + tensor.is_floating_point()


def _copies(tensor: Any) -> int:
    """Return how many tensors of this size `torch.func.vmap` computes at a time; 1 outside of it."""
    whole = tensor
    while _functorch is not None and _functorch.is_functorch_wrapped_tensor(whole):
        whole = _functorch.get_unwrapped(whole)

    return whole.numel() // max(tensor.numel(), 1) if whole is not tensor else 1


@uncounted
def patch_autocast(patches: Patches, clock: StepClock, on_autocast: Callable[[], None]) -> None:
    """Tell, once, that the training runs under `torch.autocast`.

    Libraries turn it on inside the call of the model, around its `forward`, or around what calls it. A function that
    `torch.compile` traces enters it then.

    Args:
        on_autocast: called without raising.
    """
    original = torch.autocast.__enter__
    is_seen = False

    def __enter__(self: Any) -> Any:  # noqa: N807 - name of the replaced method
        nonlocal is_seen
        if not is_seen and self._enabled and torch.is_grad_enabled() and clock.thread == get_ident():
            is_seen = True
            on_autocast()

        return original(self)

    patches.wrap(torch.autocast, "__enter__", __enter__)
