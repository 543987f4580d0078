"""Data loaders and models, as ranks describe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LoaderFacts", "ModelFacts"]


@dataclass(frozen=True, kw_only=True)
class LoaderFacts:
    """A data loader, as the rank described it.

    Attributes:
        number: of the loader in its process, in the order of their first use; None where it is not known.
        made: loaders with the same data set, length and workers that the script has made, at least half of them.
        objects: its data set's containers of many Python objects: path, type, count, and type `of` one object.
        samplers: classes that choose its samples, by qualified name, without torch's.
        trainer: framework that makes the loader from its own arguments: transformers, or fastai, which starts new
            workers in each epoch; None for a script's own.
    """

    dataset: str | None = None
    length: int | None = None
    num_workers: int | None = None
    in_memory: bool | None = None
    batch_size: int | None = None
    pin_memory: bool | None = None
    persistent_workers: bool | None = None
    start_method: str | None = None
    number: int | None = None
    made: int = 1
    objects: Sequence[Mapping[str, Any]] = ()
    samplers: Sequence[str] = ()
    trainer: str | None = None

    @property
    def likeness(self) -> tuple[str | None, int | None, int | None]:
        """Data and workers, which loaders that a script makes for each epoch have in common."""
        return self.dataset, self.length, self.num_workers

    def option(self, name: str) -> str:
        """Return the name under which the script sets an argument of DataLoader: that of its trainer, if it has one."""
        return f"dataloader_{name}" if self.trainer == "transformers" else name

    @property
    def place(self) -> str:
        """Class to which the script gives these arguments: `DataLoader` or `TrainingArguments`."""
        return "TrainingArguments" if self.trainer == "transformers" else "DataLoader"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The trained model, as the rank described it."""

    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    compiled: bool | None = None
