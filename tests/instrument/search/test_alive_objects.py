"""Search among the objects of Python's collector."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from traceml.instrument.search.alive_objects import find_alive, of_types


class Proxy:
    """Claims to be another class, as proxies do."""

    @property
    def __class__(self) -> Any:
        raise AssertionError("the search has run a proxy's code")


def test_modules_optimizers_and_generators_are_found_by_their_type() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimizer, generator = torch.optim.SGD(model.parameters()), (each for each in [model])
    proxy = Proxy()
    alive = find_alive()

    assert {id(model), id(model[0])} <= set(map(id, alive.modules))
    assert id(optimizer) in set(map(id, alive.optimizers))
    assert id(generator) in set(map(id, alive.generators))
    assert type(proxy) is Proxy


def test_nothing_is_kept_alive_by_a_search() -> None:
    """A list of all objects that holds itself would keep them until the next collection."""
    model = torch.nn.Linear(2, 2)
    ref = weakref.ref(model)
    find_alive()
    del model
    assert ref() is None


def test_objects_of_subclasses_are_left_out() -> None:
    assert of_types([1, True, "1", 2], {int}) == [1, 2]
