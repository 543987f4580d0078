"""Functions that torch.compile traces in place of a hook in C: a call of the original, and nothing else.

Functions of a module, as dynamo cannot guard the variables of a closure here. Each is named like the slot that it
stands for.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch.compiler import is_dynamo_compiling

__all__ = ["__call__", "__get__"]


def __call__(hook: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - name of the slot
    """Call the original; outside dynamo, where code calls this by its name, the slot."""
    if not is_dynamo_compiling():
        return hook(*args, **kwargs)
    if hook.original is None:
        return hook.module()._call_impl(*args, **kwargs)

    return hook.original(*args, **kwargs)


def __get__(hook: Any, owner: Any, owner_type: Any = None) -> Any:  # noqa: N807 - name of the slot
    """Bind the original; outside dynamo, where LR schedulers call this by its name, the hook."""
    if owner is None:
        return hook
    if not is_dynamo_compiling():
        return MethodType(hook, owner)

    return hook.original.__get__(owner, owner_type)
