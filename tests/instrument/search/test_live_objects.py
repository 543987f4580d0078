"""Search among the objects of Python's collector."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from traceml.instrument.native.extension import extension
from traceml.instrument.search.live_objects import find_live, of_types


class Proxy:
    """Claims to be another class, as proxies do."""

    @property
    def __class__(self) -> Any:
        raise AssertionError("the search has run a proxy's code")


def test_modules_optimizers_and_generators_are_found_by_their_type() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimizer, generator = torch.optim.SGD(model.parameters()), (each for each in [model])
    proxy = Proxy()
    alive = find_live()

    assert {id(model), id(model[0])} <= set(map(id, alive.modules))
    assert id(optimizer) in set(map(id, alive.optimizers))
    assert id(generator) in set(map(id, alive.generators))
    assert type(proxy) is Proxy


def test_nothing_is_kept_alive_by_a_search() -> None:
    """A list of all objects that holds itself would keep them until the next collection."""
    model = torch.nn.Linear(2, 2)
    ref = weakref.ref(model)
    find_live()
    del model
    assert ref() is None


class Unhashable(type):
    """Metaclass whose code must not run."""

    def __hash__(cls) -> int:
        raise AssertionError("the search has run a metaclass's code")


@pytest.mark.parametrize("native", ["0", "1"])
def test_objects_of_subclasses_are_left_out(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEML_NATIVE", native)
    assert of_types([1, True, "1", 2], {int}) == [1, 2]
    assert of_types([1, 2.0, "3", None, b"4"], {int, bytes, type(None)}) == [1, None, b"4"]
    assert of_types([1, 2.0], set()) == []
    many = [type(f"Kind{number}", (), {}) for number in range(1000)]
    objects = [kind() for kind in many]
    assert of_types(objects, set(many[::3])) == objects[::3]


@pytest.mark.needs("compiler")
def test_the_search_in_c_runs_no_code_of_a_metaclass() -> None:
    odd = Unhashable("Odd", (), {})()
    assert extension().of_types([odd, 1], (int,)) == [1]


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("arguments", [(), ([],), ((), ()), ([], [int])])
def test_the_search_in_c_takes_a_list_and_a_tuple(arguments: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        extension().of_types(*arguments)
