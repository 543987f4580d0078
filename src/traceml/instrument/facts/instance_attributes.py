"""Attributes of the script's objects, read without making them slower.

The first read of `__dict__` makes a dict of the values that an instance keeps in place. From then on Python finds its
attributes more slowly: those of an optimizer in each step, those of a data set for each sample.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

__all__ = ["attribute_values", "instance_attribute", "named_attributes"]

_MAX_FIELDS = 64


def attribute_values(owner: Any) -> list[Any]:
    """Return the values of an object's attributes: the first 64."""
    held = [each for each in gc.get_referents(owner) if each is not type(owner)]
    if any(type(each) is dict for each in held):  # its `__dict__`, which has been read before, or one of the values
        held = list(_fields(owner).values())

    return held[:_MAX_FIELDS]


def named_attributes(owner: Any, is_wanted: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of an object's attributes that are wanted.

    Only `__dict__` has the names: it is read if there is a value to be named.

    Args:
        owner: any object; of one without `__dict__` nothing is yielded.
    """
    if any(is_wanted(value) for value in attribute_values(owner)):
        yield from (item for item in list(islice(_fields(owner).items(), _MAX_FIELDS)) if is_wanted(item[1]))


def instance_attribute(owner: Any, name: str) -> Any:
    """Return an attribute of the object itself, without code of its class; None if only the class has one."""
    cls: Any = type(owner)
    if hasattr(cls, "__getattr__") or cls.__getattribute__ is not object.__getattribute__:
        return _fields(owner).get(name)

    inherited = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    if inherited is None:
        return getattr(owner, name, None)

    if not callable(inherited):
        return _fields(owner).get(name)

    found = getattr(owner, name, None)
    bound = inherited.__get__(owner, cls) if hasattr(inherited, "__get__") else inherited
    return None if bound == found else found


def _fields(owner: Any) -> dict[str, Any]:
    fields = getattr(owner, "__dict__", None)
    return fields if isinstance(fields, dict) else {}
