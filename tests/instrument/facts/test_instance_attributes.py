"""Attributes of the script's objects, which stay as fast as they were."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from traceml.instrument.facts.instance_attributes import attribute_values, instance_attribute, named_attributes


class Plain:
    """An object with values of its own, and a method and a constant of its class."""

    limit = 3

    def __init__(self, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(self, name, value)

    def step(self) -> int:
        return 1


class Guarded(Plain):
    """A class with code that runs for each attribute."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


def is_fast(owner: Any) -> bool:
    """Whether no dict of its attributes has been made."""
    return not any(type(each) is dict for each in gc.get_referents(owner))


@pytest.mark.parametrize("field", ["step", "other"])
def test_an_attribute_of_the_object_itself_is_found(field: str) -> None:
    """It hides the method of its class; a method that is not hidden is no attribute of the object."""
    owner, own = Plain(**{field: print}), instance_attribute

    assert own(owner, field) is print
    assert own(Plain(), field) is None
    assert own(owner, "missing") is None
    assert is_fast(owner)


def test_a_class_that_runs_code_is_not_asked() -> None:
    """Neither `__getattr__` nor a descriptor is called."""
    owner = Guarded(inner=1)

    assert instance_attribute(owner, "inner") == 1
    assert instance_attribute(owner, "missing") is None
    assert instance_attribute(Plain(), "limit") is None


def test_values_are_read_without_the_names() -> None:
    """The class is no value; names are read only where a value is wanted."""
    owner = Plain(files=[1, 2], size=3.5)

    assert attribute_values(owner) == [[1, 2], 3.5]
    assert list(named_attributes(owner, lambda value: isinstance(value, set))) == []
    assert is_fast(owner)
    assert list(named_attributes(owner, lambda value: isinstance(value, list))) == [("files", [1, 2])]
