"""Exclusion of our own functions from torch.compile.

After a graph break dynamo compiles the next Python function that is called, which may be a hook. That would cause more
graph breaks and trace our clock. So our frames are marked to run uncompiled; the user's functions that a hook calls are
compiled as usual. For tracing *through* a timed module, see `forward`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, TypeVar

__all__ = ["skip_leaf_code", "skip_own_code", "uncompiled"]

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE = "traceml.instrument."
# These never call the user's code: dynamo skips everything they call.
_LEAVES = frozenset(
    f"{_PACKAGE}{name}"
    for name in (
        "phase_timer",
        "clock_implementations",
        "step_clock",
        "divided_step",
        "evaluation",
        "device",
        "guard",
        "search.discovery",
        "facts.descriptions",
        "maintenance.overhead",
    )
)
_LEAF_FUNCTIONS = frozenset({"_guarded"})
_marked: set[str] = set()  # modules: a mark outlives `uninstall`


def skip_own_code() -> None:
    """Mark all loaded functions of this package; does nothing where torch has no such mark."""
    _mark_functions(_PACKAGE)


def skip_leaf_code(package: str) -> None:
    """Mark all loaded functions of another package that never call the user's code; see `skip_own_code`."""
    _mark_functions(f"{package}.", are_leaves=True)


def _mark_functions(prefix: str, *, are_leaves: bool = False) -> None:
    mark = _marker()
    if mark is None:
        return

    for name in [name for name in sys.modules.copy() if name.startswith(prefix) and name not in _marked]:
        for code in _codes(sys.modules[name]):
            mark(code, are_leaves or name in _LEAVES or code.co_name in _LEAF_FUNCTIONS)

        _marked.add(name)


def uncompiled(function: F) -> F:
    """Have dynamo call a function of ours in the user's compiled code, and not trace into it.

    This is the mark of `torch.compiler.disable`, which would import torch, and costs a call more.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "traceml logs outside of compiled code"  # type: ignore[attr-defined]
    return function


def _marker() -> Callable[[CodeType, bool], None] | None:
    """Return a function that marks a code object: alone, or with everything it calls."""
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
            waiting += [value.__code__, vars(value).get("__wrapped__")]  # of a guarded method
        elif isinstance(value, property):
            waiting.append(value.fget)
        elif isinstance(value, staticmethod):
            waiting.append(value.__func__)
        elif isinstance(value, type):
            waiting.extend(vars(value).values())
        elif isinstance(value, CodeType):
            yield value
            waiting.extend(constant for constant in value.co_consts if isinstance(constant, CodeType))
