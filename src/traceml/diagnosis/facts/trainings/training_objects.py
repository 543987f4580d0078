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
        objects: its data set's containers of many Python objects: path, type, count, and type `of` one object.
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
    objects: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The trained model, as the rank described it."""

    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    compiled: bool | None = None
