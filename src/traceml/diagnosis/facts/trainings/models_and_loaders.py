"""Data loaders and models, as ranks describe them, and the steps at which another model is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from traceml.database.info_kinds import InfoKind

__all__ = [
    "EvaluationModeSteps",
    "LoaderFacts",
    "ModelFacts",
    "TrainedModels",
    "UnchangedParameters",
    "is_first_trained",
]


MIN_WORKER_SAMPLES = 60
"""Fewer samples of all workers do not show that some make fewer batches."""
MAX_SHARING = 0.6
"""Workers share the work unevenly if the busiest does so much that this share of them would suffice."""


class LoaderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A data loader, as the rank described it."""

    dataset: str | None = None
    length: int | None = None
    num_workers: int | None = None
    in_memory: bool | None = None
    batch_size: int | None = None
    drop_last: bool | None = None
    pin_memory: bool | None = None
    persistent_workers: bool | None = None
    prefetch_factor: int | None = None
    in_order: bool | None = None
    start_method: str | None = None
    # of the loader in its process, in the order of their first use; None if unknown
    number: int | None = None
    made: int = 1  # loaders with the same data set, length and workers that the script has made, at least half of them
    # its data set's containers of many Python objects: path, type, count, and type `of` one object
    objects: Sequence[Mapping[str, Any]] = ()
    samplers: Sequence[str] = ()  # classes that choose its samples, by qualified name, without torch's
    # framework that makes the loader from its own arguments: transformers, or fastai, which starts new workers in each
    # epoch; None for a script's own
    trainer: str | None = None
    is_iterable: bool = False  # whether its data set is: each worker has the samples that this gives it
    is_undivided: bool = False  # whether it is, and its code does not ask which worker runs it
    takes_batches: bool = False  # whether its data set was seen to fetch the samples of a batch at once
    worker_samples: Sequence[int] = ()  # how often each worker was seen to make a batch

    @property
    def sharing_workers(self) -> float | None:
        """Workers as busy as the busiest one that would do the work of all; None if it is even, or not known."""
        busiest, workers = max(self.worker_samples, default=0), self.num_workers or 0
        if not self.is_iterable or workers < 2 or sum(self.worker_samples) < MIN_WORKER_SAMPLES:
            return None

        sharing = sum(self.worker_samples) / busiest
        return sharing if sharing <= MAX_SHARING * workers else None

    @property
    def signature(self) -> tuple[str | None, int | None, int | None]:
        """Data and workers, which loaders that a script makes for each epoch have in common."""
        return self.dataset, self.length, self.num_workers

    @property
    def can_keep_workers(self) -> bool:
        """Whether its workers end with each epoch, and an option would keep them; fastai has none."""
        return not (self.persistent_workers or self.trainer == "fastai")

    def samples_of_rank(self, ranks: int) -> int | None:
        """Return how many samples a DistributedSampler gives each of some ranks; None if unknown."""
        return None if self.length is None else -(-self.length // ranks)

    def option(self, name: str) -> str:
        """Return the name under which the script sets an argument of DataLoader: that of its trainer, if it has one."""
        return f"dataloader_{name}" if self.trainer == "transformers" else name

    @property
    def place(self) -> str:
        """Class to which the script gives these arguments: `DataLoader` or `TrainingArguments`."""
        return "TrainingArguments" if self.trainer == "transformers" else "DataLoader"


class EvaluationModeSteps(msgspec.Struct, frozen=True):
    """Steps in which a model was trained in `eval()`."""

    model: str  # its class
    layers: Sequence[str]  # classes of its layers that work differently in training
    step: int  # first of the steps
    steps: int


class UnchangedParameters(msgspec.Struct, frozen=True):
    """Optimizers of a rank of which no parameter has changed so far."""

    optimizer: str  # class of the first one
    parameters: int  # number of tensors
    trainable: int  # of these, tensors that require gradients
    stepped: bool  # whether an optimizer was stepped


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The trained model, as the rank described it."""

    model: str | None = None
    trainable: int | None = None  # number of parameters that are trained
    dense_embeddings: int | None = None  # those of them in tables of embeddings whose gradients have all rows
    parallel: str | None = None  # what joins the gradients of ranks: ddp, fsdp2, …
    dtype: str | None = None
    device: str | None = None
    compiled: bool | None = None
    reshards: bool | None = None  # whether a sharded one gives parameters up after forward, and gathers them again
    comm_hook: str | None = None  # function that exchanges DDP's gradients in place of DDP, which takes one

    @property
    def has_16_bits(self) -> bool:
        """Whether its weights are floats of 16 bits, as its gradients then are."""
        return self.dtype in ("torch.bfloat16", "torch.float16")


MAX_RANKS = 8
"""Ranks whose models are compared: they stand for the others."""
MIN_TRAINING_STEPS = 5
"""A training is that long: a script that makes a model for each step has one training."""
MAX_RETURNS = 256
"""At most so many returns to an earlier model are kept: a parameter search trains some hundred models."""
_DESCRIBED: dict[str, tuple[str, ...]] = {
    InfoKind.MODEL: ("model", "parameters"),
    InfoKind.OPTIMIZER: ("optimizer", "tensors"),
}


def is_first_trained(known: Mapping[str, Any] | None, row: Mapping[str, Any]) -> bool:
    """Return whether a model is to be described in place of a known one, which may be None.

    That is the first one with parameters that are trained: libraries and scripts may have others, such as a loss with
    constants or a teacher. Without such a model it is the first one.
    """
    return not known or (not _is_trained(known) and _is_trained(row))


def _is_trained(model: Mapping[str, Any]) -> bool:
    return model.get("trainable") != 0  # None: unknown


class TrainedModels:
    """Notes when models and optimizers of another size are trained; equal ones, as of folds, are the same."""

    def __init__(self) -> None:
        self._now: dict[int, dict[str, tuple[Any, ...]]] = {}
        self._first: dict[int, dict[tuple[Any, ...], int]] = {}  # what was trained -> its first step
        self._training: dict[int, int] = {}  # the first step of what is trained now
        self._returns: dict[int, int] = {}
        self._steps: set[int] = set()
        self._begins: set[int] = set()  # steps at which an optimizer of other parameters stepped for the first time

    @property
    def begins(self) -> tuple[int, ...]:
        """First step of each training but the first, ascending, also of equal models."""
        begins = [0, *sorted(self._begins)]
        far = [step for before, step in pairwise(begins) if step - before >= MIN_TRAINING_STEPS]
        return tuple(far) if 2 * len(far) > len(self._begins) else ()

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps before which another one appeared, ascending; the first ones of a run are not among them."""
        return tuple(sorted(self._steps))

    @property
    def returns(self) -> dict[int, int]:
        """Those of the steps before which an earlier one was trained again, with its first step."""
        return dict(self._returns)

    def info(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take the facts of a rank's model or optimizer."""
        kind, step = str(row.get("kind")), row.get("step")
        if kind == InfoKind.TRAINING_BEGINS and isinstance(step, int):
            self._begins.add(step)

        names = _DESCRIBED.get(kind)
        if names is None or rank >= MAX_RANKS or not isinstance(step, int) or not _is_trained(row):
            return

        now = self._now.setdefault(rank, {})
        now[kind] = tuple(row.get(name) for name in names)
        first = self._first.setdefault(rank, {}).setdefault(tuple(map(now.get, _DESCRIBED)), step)
        if first != self._training.get(rank, 0):
            self._begin(rank, step, first)

    def _begin(self, rank: int, step: int, first: int) -> None:
        if first < step and len(self._returns) >= MAX_RETURNS:
            return

        self._training[rank] = first
        self._steps.add(step)
        self._returns.pop(step, None)
        if first < step:
            self._returns[step] = first
