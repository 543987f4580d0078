"""Place of a sample: the innermost line of the user's code in a stack, and the library function that it has called."""

from __future__ import annotations

from collections.abc import Sequence
from types import CodeType, FrameType
from typing import NamedTuple

from traceml.database.schema import IMPORTING
from traceml.inspection.thread_frames import awaiting_frames, running_line
from traceml.inspection.user_files import display_path, is_package_file
from traceml.recorder.user_code import UserCode

__all__ = ["SampledPlace", "awaited_place", "function_name", "makes_batch", "sampled_place"]

_EXPRESSIONS = frozenset(f"<{name}>" for name in ("listcomp", "genexpr", "dictcomp", "setcomp", "lambda"))
_IMPORT_SYSTEM = "<frozen importlib"
_FETCHER = "/torch/utils/data/_utils/fetch.py"
_SELECTORS = "/selectors.py"  # of the standard library, in which an event loop waits


class SampledPlace(NamedTuple):
    """A line of the user's code, and the innermost library function called from there.

    While modules are imported, the import system counts as that function.
    """

    code: CodeType | None  # the user's; None if only libraries run
    line: int
    library: CodeType | None

    @property
    def user_name(self) -> str:
        """The line as rows of `schema.LINES` name it; empty without one."""
        return "" if self.code is None else _line_name(self.code, self.line)

    @property
    def library_name(self) -> str:
        """The library function, in the same way."""
        return "" if self.library is None else _line_name(self.library, self.library.co_firstlineno)


def sampled_place(stack: Sequence[FrameType], user: UserCode) -> SampledPlace:
    """Return the place of a stack, the innermost frame first."""
    library: CodeType | None = None
    importing: CodeType | None = None
    for found in stack:
        code = found.f_code
        if code.co_filename.startswith(_IMPORT_SYSTEM):  # five of six frames of an import
            importing = code if code.co_filename == IMPORTING else importing
        elif user.contains(found):
            return SampledPlace(code, running_line(found), importing or library)
        else:
            library = library or (None if _is_hidden(code) else code)

    return SampledPlace(None, 0, importing or library)


def makes_batch(stack: Sequence[FrameType]) -> bool:
    """Return whether torch's fetcher makes a batch, in a loader worker or in the training process itself."""
    return any(each.f_code.co_filename.endswith(_FETCHER) for each in stack)


def awaited_place(stack: Sequence[FrameType], user: UserCode) -> SampledPlace | None:
    """Return where the coroutine is suspended that an event loop runs, with the loop's function; None if none is.

    While no task can run, the call of the loop is the innermost line of the user's code on the stack. Of several tasks
    that are awaited together, any may be the one that the training needs.
    """
    if not stack or not stack[0].f_code.co_filename.endswith(_SELECTORS):
        return None

    found = sampled_place(awaiting_frames(stack[0], user.contains, of_any=False), user)
    return None if found.code is None else found._replace(library=stack[0].f_code)


def _line_name(code: CodeType, line: int) -> str:
    """Return `FILE:LINE FUNCTION`."""
    return f"{display_path(code.co_filename)}:{line} {function_name(code)}"


def function_name(code: CodeType) -> str:
    """Return the name of the function, also for a comprehension or a lambda inside it."""
    name = code.co_qualname
    while name.rpartition(".")[2] in _EXPRESSIONS:
        name = name.rpartition(".")[0].removesuffix(".<locals>")

    return name or "<module>"


def _is_hidden(code: CodeType) -> bool:
    """Return whether naming a library function is of no use: generated code, and traceml."""
    return code.co_filename.startswith("<") or is_package_file(code.co_filename)
