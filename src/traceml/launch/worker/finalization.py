"""End of a worker's process: the interpreter's finalization, limited to what the worker itself has created.

The interpreter would also finalize torch, which copies 80 MB of pages shared with the zygote (0.1 s), and run the
destructors of its libraries (0.1 s), some of which abort after a failed collective. That memory is left to the kernel.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NoReturn

__all__ = ["end_process", "exit_status", "flush_stream"]

_FILE: type = io.IOBase.__mro__[1]  # of all files; IOBase itself is an abstract class, whose checks run code of others
_WRITTEN_TO = (io.FileIO, io.BufferedWriter, io.BufferedRandom)
_LAST_ERROR = ("last_type", "last_value", "last_traceback", "last_exc")


def exit_status(leaving: SystemExit) -> int:
    """Return the exit status of a SystemExit; its text is printed, as the interpreter does."""
    code = leaving.code
    if code is None:
        return 0

    if isinstance(code, int):
        return code & 0xFF

    print(code, file=sys.stderr)  # noqa: T201 - as the interpreter does
    return 1


def end_process(status: int, inherited: Mapping[str, object]) -> NoReturn:
    """Wait for threads, run exit handlers and finalizers, flush all files, and end.

    Args:
        status: the exit status, or a negative signal number.
        inherited: `sys.modules` before anything of the user's ran; these modules are left alone.
    """
    steps: list[Callable[[], object]] = [
        threading._shutdown,  # type: ignore[attr-defined]  # waits for non-daemon threads
        atexit._run_exitfuncs,
        _flush_files,  # before a cycle with a file is collected, which may close the file before it flushes its buffer
        lambda: _finalize_modules(inherited),
        _flush_files,
        lambda: flush_stream("stdout"),
        lambda: flush_stream("stderr"),
        _flush_c,
    ]
    for step in steps:
        try:
            step()
        except BaseException:  # noqa: BLE001 - the other steps must run
            with contextlib.suppress(Exception):
                traceback.print_exc()

    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)

    os._exit(status)


def flush_stream(name: str) -> None:
    """Flush `sys.stdout` or `sys.stderr`, which the user's code may have closed, or replaced by any object."""
    stream = getattr(sys, name)
    if stream is not None and not getattr(stream, "closed", False):
        stream.flush()


def _finalize_modules(inherited: Mapping[str, object]) -> None:
    """Destroy `__main__` and the modules that this worker imported, in the interpreter's order."""
    threading.excepthook = lambda _: None  # daemon threads still run, in modules that lose their contents
    for name in _LAST_ERROR:
        if hasattr(sys, name):
            setattr(sys, name, None)  # its traceback refers to the frames of a script

    own = _forget_modules(inherited)
    # In a cycle, the collector may close a file before the one that writes to it, as a GzipFile does when it is closed.
    written_to = [file for file in gc.get_objects() if type(file) in _WRITTEN_TO]
    gc.collect()  # what nothing else refers to is finalized while its module is intact
    for reference in reversed(own):
        module = reference()
        if module is not None:
            _clear(vars(module))

    gc.collect()
    del written_to


def _forget_modules(inherited: Mapping[str, object]) -> list[weakref.ref[ModuleType]]:
    """Remove modules from `sys.modules`, except inherited ones and ours; return references to them."""
    found = []
    for name, module in sys.modules.copy().items():
        if inherited.get(name) is module or name.partition(".")[0] == "traceml":
            continue

        del sys.modules[name]
        if isinstance(module, ModuleType):
            found.append(weakref.ref(module))

    return found


def _clear(names: dict[str, object]) -> None:
    """Set a module's names to None: private ones first, as the interpreter does."""
    private = [name for name in names if name.startswith("_") and not name.startswith("__")]
    for name in [*private, *names]:
        if name != "__builtins__":
            names[name] = None


def _flush_files() -> None:
    """Flush all open files."""
    for file in gc.get_objects():
        if issubclass(type(file), _FILE):  # not isinstance, which asks proxies
            with contextlib.suppress(Exception):  # closed, or its reader is gone
                file.flush()


def _flush_c() -> None:
    import ctypes

    ctypes.CDLL(None).fflush(None)
