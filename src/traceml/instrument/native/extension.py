"""Loader of the hot path in C. Where it was not built, or TRACEML_NATIVE=0 forbids it, the hooks are in Python.

A hook in C has methods in Python for torch.compile. The interpreter calls the slots of its type; dynamo looks for
`__call__` and `__get__` among the type's attributes, and can trace only Python functions. So these two are replaced in
the type's dictionary, which leaves the slots alone. (An assignment to the attribute would replace the slot too.)
`dynamo_methods` has them; it needs torch, which may be imported later.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from traceml.database.schema import Phase, native_layout
from traceml.installation import free_threading_limits

if TYPE_CHECKING:
    from traceml.instrument.native import _hot_path

__all__ = ["extension", "show_torch", "use_time"]

_NAME = "traceml.instrument.native._hot_path"
_log = logging.getLogger("traceml")


def extension() -> Any:
    """Return the extension module; None if it cannot be used, or TRACEML_NATIVE=0 forbids it."""
    return None if os.environ.get("TRACEML_NATIVE") == "0" else _load()


def use_time(source: Callable[[], int] | None) -> None:
    """Replace the clock of the hooks in C, for tests; None restores it."""
    loaded = _load()
    if loaded is not None:
        loaded.use_time(source)


@cache
def _load() -> Any:
    if limits := free_threading_limits():
        _log.warning("%s", limits)
        return None

    try:
        loaded = import_module(_NAME)
    except ImportError as error:
        _log.debug("the hooks in Python are used: %s", error)
        return None

    if native_layout() != loaded.LAYOUT:
        _log.warning(
            "%s was built for other columns, so tracing costs more. Install the package again", loaded.__file__
        )
        return None

    return loaded if _add_methods(loaded) else None


def _add_methods(loaded: Any) -> bool:
    """Give the hooks their methods in Python; return whether calls still reach the code in C."""
    _set_method(loaded, "__reduce__", _reduce)
    _set_method(loaded, "__call__", _no_call)
    _set_method(loaded, "__signature__", property(_signature))
    hook = loaded.Hook(loaded.HotFields(), int(Phase.OPTIMIZER), _no_call, lambda value: value)
    try:
        return loaded.Hook.__dict__["__call__"] is _no_call and hook(7) == 7
    except TypeError:
        return False


def _set_method(loaded: Any, name: str, method: Any) -> None:
    (attributes,) = gc.get_referents(loaded.Hook.__dict__)  # the dictionary behind the read-only view
    attributes[name] = method
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(loaded.Hook))


def _no_call(*_: object) -> None:
    raise TypeError("the hooks of this interpreter call their methods in Python")


def _reduce(hook: _hot_path.Hook) -> Any:
    """Pickle and copy as an empty slot of a module, or by name as a function."""
    return (type(None), ()) if hook.phase == int(Phase.FORWARD) else hook.__qualname__


def _signature(hook: _hot_path.Hook) -> Any:
    """Return the signature of the function that is timed: `inspect.getfullargspec` would find none."""
    from inspect import signature

    return signature(hook.__wrapped__)


def show_torch() -> None:
    """Give the hooks the methods that dynamo traces."""
    loaded = extension()
    if loaded is not None and loaded.Hook.__dict__["__call__"] is _no_call:
        methods = import_module("traceml.instrument.native.dynamo_methods")
        _set_method(loaded, "__call__", methods.__call__)
        _set_method(loaded, "__get__", methods.__get__)
