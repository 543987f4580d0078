"""Python stacks of a process that crashes in C: faulthandler writes them to the end of its flight file.

A file that is open for its program already, by `python -X faulthandler` or `faulthandler.enable()`, stays in use; and
the program may call `faulthandler.enable()` later. Then the stacks are in its output only.
"""

from __future__ import annotations

import faulthandler
import os
import re

from traceml.inspection.stack_text import FRAME
from traceml.inspection.user_files import is_package_file, is_user_file
from traceml.trusted_files import GuardedDescriptor

__all__ = ["crash_facts", "disable_crash_stacks", "enable_crash_stacks"]

_MAX_FRAMES, _MAX_CHARS = 20, 4000
_CURRENT = "Current thread "
_descriptor = -1  # it keeps its number for good, as faulthandler does
_own: GuardedDescriptor | None = None  # while it is in use
_busy = False


def enable_crash_stacks(file: int) -> None:
    """Have faulthandler append the stacks to a file on a fatal signal, unless the program uses faulthandler itself.

    Args:
        file: an open descriptor. A duplicate of it is used until `disable_crash_stacks`, which closes that: a POSIX
            lock on the file is lost then.
    """
    global _descriptor, _own, _busy
    if _busy or (_descriptor < 0 and faulthandler.is_enabled()):
        return

    if _descriptor < 0:
        _descriptor = os.dup(file)
        os.lseek(_descriptor, 0, os.SEEK_END)
        faulthandler.enable(_descriptor, all_threads=True)
    else:
        os.dup2(file, _descriptor, inheritable=False)
        os.lseek(_descriptor, 0, os.SEEK_END)

    _own, _busy = GuardedDescriptor(_descriptor), True


def disable_crash_stacks() -> None:
    """Write nothing more to the file, which ends; also in a forked child, whose crash is its own."""
    global _descriptor, _busy
    if not _busy or _own is None:
        return

    _busy = False
    try:
        _own.check()
    except OSError:
        faulthandler.disable()
        _descriptor = -1
        return

    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, _descriptor, inheritable=False)
    os.close(nowhere)


def crash_facts(text: str) -> dict[str, str | int]:
    """Return `stack`, and `file`, `line` and `function` of the innermost line of the user's code; empty without frames.

    Args:
        text: what faulthandler wrote, the crashed thread's frames innermost first.
    """
    threads = [part for part in re.split(r"\n(?=Thread |Current thread )", text) if FRAME.search(part)]
    crashed = next((part for part in threads if part.startswith(_CURRENT)), threads[-1] if threads else "")
    found = [each for each in FRAME.finditer(crashed) if each["file"] != "<frozen runpy>"]
    others = [each for each in found if not is_package_file(each["file"])]
    if all(each["file"].endswith("/threading.py") for each in others):  # a thread of our own
        others = found

    frames = others[:_MAX_FRAMES]
    if not frames:
        return {}

    lines = [f'  File "{each["file"]}", line {each["line"]}, in {each["function"]}\n' for each in reversed(frames)]
    own = next((each for each in frames if is_user_file(each["file"])), frames[0])
    return {
        "stack": "".join(lines)[-_MAX_CHARS:],
        "file": own["file"],
        "line": int(own["line"]),
        "function": own["function"],
    }
