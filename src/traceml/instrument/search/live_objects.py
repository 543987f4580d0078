"""The objects that Python's collector knows: modules, optimizers, generators, and others by their type."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import compress
from types import GeneratorType
from typing import Any, NamedTuple

import torch

from traceml.instrument.native.extension import extension

__all__ = ["LiveObjects", "find_live", "of_types"]


class LiveObjects(NamedTuple):
    """The objects that the searches of a moment look for."""

    modules: Sequence[Any]  # torch's, also those inside others
    optimizers: Sequence[Any]  # torch's
    generators: Sequence[GeneratorType[Any, Any, Any]]  # suspended or running


def find_live() -> LiveObjects:
    """Return the modules, optimizers and generators that are alive.

    With torch imported the collector knows some 300,000 objects. Listing them and reading their types takes nearly all
    of the time, so it is done once for the three classes.
    """
    classes = [_subclasses(cls) for cls in (torch.nn.Module, torch.optim.Optimizer, GeneratorType)]
    found = of_types(gc.get_objects(), set().union(*classes))
    return LiveObjects(*([each for each in found if type(each) in types] for types in classes))


def of_types(objects: list[Any], types: AbstractSet[type[Any]]) -> list[Any]:
    """Return the objects of these types, not of subclasses."""
    native = extension()
    if native is not None and hasattr(native, "of_types"):  # an older build has it not
        found: list[Any] = native.of_types(objects, tuple(types))
        return found

    # `isinstance` would read `__class__`, which runs the code of proxies.
    return list(compress(objects, map(types.__contains__, map(type, objects))))


def _subclasses(cls: type[Any]) -> set[type[Any]]:
    found, waiting = set(), [cls]
    while waiting:
        cls = waiting.pop()
        if cls not in found:
            found.add(cls)
            waiting.extend(type.__subclasses__(cls))

    return found
