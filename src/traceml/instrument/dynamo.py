"""Keeping torch.compile out of our own functions.

Where a graph of the user breaks, dynamo goes on to compile whatever Python function is called next: that may be a hook.
It would break more graphs on it, and trace our clock. Frames of ours are marked to be run as they are; functions called
from a hook, the user's, are compiled as ever. Tracing *through* a timed module is another matter: see `forward`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

__all__ = ["skip_own_code"]

_PACKAGE = "traceml.instrument."
# Nothing that these call is the user's: dynamo stays out of all of it.
_LEAVES = frozenset(
    f"{_PACKAGE}{name}" for name in ("accumulator", "step_clock", "device", "discovery", "facts", "overhead")
)
_LEAF_FUNCTIONS = frozenset({"_guarded"})


def skip_own_code() -> None:
    """Mark all functions of this package that are loaded; does nothing where torch has no such mark."""
    mark = _marker()
    if mark is None:
        return

    for name, module in list(sys.modules.items()):
        if name.startswith(_PACKAGE):
            for code in _codes(module):
                mark(code, name in _LEAVES or code.co_name in _LEAF_FUNCTIONS)


def _marker() -> Callable[[CodeType, bool], None] | None:
    """Return what marks a code object: it alone, or all that it calls too."""
    frames: Any = sys.modules.get("torch._C._dynamo.eval_frame")
    if hasattr(frames, "set_code_exec_strategy"):
        action = frames._FrameAction
        alone = frames._FrameExecStrategy(action.SKIP, action.DEFAULT)
        deep = frames._FrameExecStrategy(action.SKIP, action.SKIP)
        return lambda code, leaf: frames.set_code_exec_strategy(code, deep if leaf else alone)

    if hasattr(frames, "skip_code"):  # before torch 2.7
        return lambda code, _leaf: frames.skip_code(code)

    return None


def _codes(module: Any) -> Iterator[CodeType]:
    waiting: list[Any] = [
        value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__
    ]
    while waiting:
        value = waiting.pop()
        if isinstance(value, FunctionType):
            waiting.append(value.__code__)
        elif isinstance(value, property):
            waiting.append(value.fget)
        elif isinstance(value, staticmethod):
            waiting.append(value.__func__)
        elif isinstance(value, type):
            waiting.extend(vars(value).values())
        elif isinstance(value, CodeType):
            yield value
            waiting.extend(constant for constant in value.co_consts if isinstance(constant, CodeType))
