"""Detect the end of a process: an exception, a status, or a normal end.

An unhandled exception passes `sys.excepthook`, which is wrapped here and still calls the one before it. SystemExit
does not trigger `sys.excepthook`, and it may be caught, so that it was raised proves nothing. When it ends the program,
the interpreter reads its attribute `code` after the last Python frame of the main thread is gone. A descriptor in place
of that attribute notices this read, also after `raise SystemExit(3)`. Python 3.11 has no traceback of it any more by
then, so `sys.exit` and `exit` note the place.

By `os.execv` and its relatives a process becomes another program, and by `os._exit` it ends at once: these are wrapped.

An interrupt while the interpreter ends, as it waits for a thread, passes `sys.unraisablehook`: the status stays.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from traceml.database.schema import Phase
from traceml.inspection.raised_again import raised_first
from traceml.inspection.user_files import (
    PACKAGE_FOLDERS,
    display_path,
    is_import_machinery,
    is_package_file,
    is_user_file,
)
from traceml.privacy import secrets_only
from traceml.recorder.user_code import UserCode, user_line

__all__ = ["ExitWatch", "address_limit_bytes", "cause_of", "describe", "end_by_interrupt", "status_of"]

_PLACE = "_traceml_place"  # of a SystemExit: where the program was left
_MESSAGE_CHARS, _STACK_CHARS, _STACK_FRAMES = 500, 4000, 20
_MAX_TEXT = 20_000
_MOST_FRAMES = 2000  # 300,000 take six seconds
_EXEC = ("execv", "execve")  # the others of `os.exec*` call these
_REMOTE = "RemoteTraceback"  # how names end of classes of causes that hold a traceback of another process
_WAITING = threading._shutdown.__code__  # type: ignore[attr-defined]
_ADDRESS_SPACE = "Max address space"
_CAUGHT = re.compile(r"Caught (?P<kind>\S+) in (?P<where>[^\n]+?)\.\nOriginal Traceback")
_FRAME = re.compile(r'^ *File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>\S+)$', re.MULTILINE)
# An exception closes the phases that it passes through, but its traceback contains their wrappers.
_PHASE_OF = {
    f"{folder}instrument/{module}.py": phase.name.lower()
    for folder in PACKAGE_FOLDERS
    for module, phase in (
        ("loader", Phase.INPUT_WAIT),
        ("forward", Phase.FORWARD),
        ("backward", Phase.BACKWARD),
        ("optimizer", Phase.OPTIMIZER),
        ("checkpoints/patch_checkpoints", Phase.CHECKPOINT),
    )
}

_Quitter: Any = getattr(sys.modules.get("_sitebuiltins"), "Quitter", None)  # not there with `python -S`

Report = Callable[[BaseException | None, int], None]

_Place = dict[str, Any]  # `file`, `line` and `function` of the user's code; empty if unknown


class ExitWatch:
    """Reports the end of this process.

    Args:
        report: called with the exception (None for a normal end) and the exit status, while the process still runs.
        on_exec: called before the process becomes another program, and again (`failed`) if it does not.
        on_leave: called as `report` before the process ends at once by `os._exit`; without an exception at status 0.

    Attributes:
        interrupted: whether an uncaught KeyboardInterrupt ends the program.
    """

    def __init__(self, report: Report, on_exec: Callable[..., object], on_leave: Report) -> None:
        from traceml.instrument.patches import Patches  # not where only `status_of` is used

        self.interrupted = False
        self._report, self._on_exec, self._on_leave = report, on_exec, on_leave
        self._previous_hook: Any = None
        self._previous_unraisable: Any = None
        self._patches, self._code = Patches(), _ExitCode(self._exited)

    def install(self) -> None:
        """Wrap both hooks, `sys.exit`, the built-in `exit` and `quit`, `SystemExit.code`, and functions of `os`."""
        self._previous_hook, self._previous_unraisable = sys.excepthook, sys.unraisablehook
        replace = self._patches.replace
        replace(sys, "excepthook", self._hook)
        replace(sys, "unraisablehook", self._unraisable)
        replace(sys, "exit", self._exit)
        if _Quitter is not None:
            replace(_Quitter, "__call__", self._watched_quit(_Quitter.__call__))

        self._code.install()
        for name in _EXEC:
            replace(os, name, self._watched_exec(getattr(os, name)))

        replace(os, "_exit", self._watched_leave(os._exit))

    def uninstall(self) -> None:
        """Restore the previous hooks; a hook that was wrapped since stays in place and only calls the previous one."""
        self._patches.restore()
        self._code.uninstall()
        self._report = self._on_exec = self._on_leave = _ignore

    def last_error(self) -> BaseException | None:
        """Return the exception that ended the main program, if a hook that replaced ours has printed it."""
        error = None if _is_prompt() else getattr(sys, "last_value", None)
        return error if isinstance(error, BaseException) else None

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not _is_prompt():
            self.interrupted = isinstance(error, KeyboardInterrupt)
            self._report(error, status_of(error))

        self._previous_hook(kind, error, trace)

    def _unraisable(self, ignored: Any) -> None:
        if isinstance(ignored.exc_value, KeyboardInterrupt) and _is_at_end(sys._getframe()):
            self._report(ignored.exc_value, 0)

        self._previous_unraisable(ignored)

    def _exit(self, status: Any = None, /) -> NoReturn:
        leaving = SystemExit(status)
        setattr(leaving, _PLACE, _place_of(sys._getframe(1)))
        try:
            raise leaving
        finally:
            del leaving  # its traceback holds this frame: a cycle would keep it alive beyond its end

    def _watched_quit(self, original: Callable[..., NoReturn]) -> Callable[..., NoReturn]:
        def __call__(quitter: Any, code: Any = None) -> NoReturn:  # noqa: N807 - name of the replaced method
            try:
                original(quitter, code)
            except SystemExit as leaving:
                setattr(leaving, _PLACE, _place_of(sys._getframe(1)))
                raise

        return __call__

    def _watched_leave(self, original: Callable[[int], NoReturn]) -> Callable[[int], NoReturn]:
        @wraps(original)
        def leave(status: int) -> NoReturn:
            with suppress(Exception):
                leaving = SystemExit(status)
                leaving.__context__ = sys.exc_info()[1]
                setattr(leaving, _PLACE, _place_of(sys._getframe(1)))
                self._on_leave(leaving if status else None, status_of(leaving))

            original(status)

        return leave

    def _watched_exec(self, original: Callable[..., NoReturn]) -> Callable[..., NoReturn]:
        @wraps(original)
        def execute(path: Any, *arguments: Any, **named: Any) -> NoReturn:
            if not _is_program(path):
                original(path, *arguments, **named)

            self._on_exec(failed=False)
            try:
                original(path, *arguments, **named)
            finally:
                self._on_exec(failed=True)

        return execute

    def _exited(self, leaving: SystemExit, status: Any) -> None:
        ended = SystemExit(status)  # without the frames of the one that ends the program
        ended.__context__ = leaving.__context__
        setattr(ended, _PLACE, _place_left(leaving))
        self._report(ended, status_of(ended))


class _ExitCode:
    """Descriptor in place of `SystemExit.code`, which notes a read by the interpreter that ends the program.

    Args:
        on_exit: called with the exception and its status or text.
    """

    def __init__(self, on_exit: Callable[[SystemExit, Any], None]) -> None:
        self._on_exit = on_exit
        self._previous: Any = None

    def install(self) -> None:
        """Take the place of the attribute."""
        self._previous = SystemExit.__dict__["code"]
        _set_code(self)

    def uninstall(self) -> None:
        """Restore the attribute, unless it was replaced again since."""
        if SystemExit.__dict__["code"] is self:
            _set_code(self._previous)

    def __get__(self, leaving: SystemExit | None, owner: type | None = None) -> Any:
        if leaving is None:
            return self._previous

        status = self._previous.__get__(leaving, owner)
        if _is_at_end(sys._getframe()):
            self._on_exit(leaving, status)

        return status

    def __set__(self, leaving: SystemExit, status: Any) -> None:
        self._previous.__set__(leaving, status)

    def __delete__(self, leaving: SystemExit) -> None:
        self._previous.__delete__(leaving)


def _set_code(attribute: Any) -> None:
    """Set `SystemExit.code`: the dictionary of a built-in type is behind a proxy, and lookups in it are cached."""
    (attributes,) = gc.get_referents(SystemExit.__dict__)
    attributes["code"] = attribute
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(SystemExit))


def _is_prompt() -> bool:
    """Whether somebody types at this process: errors end nothing there."""
    return hasattr(sys, "ps1")


def _is_at_end(hook: FrameType) -> bool:
    """Whether the interpreter itself has called a hook, which is then the main thread's only Python frame.

    From Python 3.13 on the function that waits for threads, in C, may call it, too.
    """
    caller = hook.f_back
    is_first = caller is None or (caller.f_back is None and caller.f_code is _WAITING)
    return is_first and threading.current_thread() is threading.main_thread()


def end_by_interrupt() -> None:
    """Let the interpreter end by SIGINT, as it does after an uncaught KeyboardInterrupt, and not with status 1.

    It has noted the interrupt, and forgets it whenever text is evaluated (`run_eval_code_obj` in CPython), as in each
    dataclass of a module that is imported late. An interrupt of an evaluation makes it note that again.
    """

    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        eval("interrupt()", {"interrupt": interrupt})  # noqa: S307 - a text of our own


def _ignore(*_: object, **__: object) -> None:
    """Ignore a report after `uninstall`."""


def _is_program(path: Any) -> bool:
    """Whether a path can be executed: `os.execvp` tries each folder of PATH."""
    with suppress(TypeError, ValueError, OSError):
        return Path(os.fsdecode(path)).is_file() and os.access(path, os.X_OK)

    return False


def status_of(error: BaseException) -> int:
    """Return the status with which the interpreter ends after this exception."""
    if isinstance(error, SystemExit):
        code = error.code
        return 0 if code is None else code & 0xFF if isinstance(code, int) else 1

    return 130 if isinstance(error, KeyboardInterrupt) else 1


_OF_WRITER = "inline_container.cc"


def cause_of(error: BaseException | None) -> BaseException | None:
    """Return the exception that ended the script, as it was raised first; None if there was none.

    So it is for the complaint of torch's writer about a file that is not complete: a full disk or Ctrl-C came before.
    """
    last = _last_raised(error)
    return None if last is None else _last_raised(raised_first(last))


def _last_raised(error: BaseException | None) -> BaseException | None:
    """Return an exception itself; for a SystemExit that reports a failure, the one that was handled."""
    if isinstance(error, RuntimeError) and error.__context__ is not None and _OF_WRITER in _text_of(error):
        return _last_raised(error.__context__)

    if not isinstance(error, SystemExit):
        return error

    return _last_raised(error.__context__) if status_of(error) else None


def describe(error: BaseException | None) -> dict[str, Any]:
    """Return the fields of an `exit` row for an exception: type, message, and the line of the user's code.

    A SystemExit counts with its text, if it has one, and as the exception that was being handled; with a number alone
    only the line is known.
    """
    cause, last = cause_of(error), _last_raised(error)
    facts = {} if cause is None else _described(cause, _frames_above(error, cause))
    if last is not None and last is not cause:
        facts["raised_as"] = _masked(f"{_type_name(last)}: {_text_of(last)}").removesuffix(": ")

    if not isinstance(error, SystemExit):
        return facts

    # A library that no line of the script has called is torch.multiprocessing.spawn: its parent prints the traceback.
    if facts and getattr(error, _PLACE, None) != {}:
        facts["caught"] = True

    if error.code is None or isinstance(error.code, int):
        return facts or _place_left(error)

    text = _masked(_text_of(error))
    if not facts:
        return {"exception": "SystemExit", "message": text, **_place_left(error)}

    message = str(facts["message"])
    return facts if not text or text in message else facts | {"message": f"{message} (sys.exit: {text})"}


def _place_left(leaving: SystemExit) -> _Place:
    """Return the place where a SystemExit was raised."""
    known: _Place | None = getattr(leaving, _PLACE, None)
    if known is not None:
        return known

    own = [each for each in _frames(leaving.__traceback__) if is_user_file(each.filename)]
    if not own:
        return {}

    return _place(own[-1])


def _place_of(frame: FrameType | None) -> _Place:
    """Return the innermost place of the user's code in a stack."""
    with suppress(Exception):  # the script ends by its own words, whatever its frames hold
        code, line = user_line(frame, UserCode().contains)
        return {} if code is None else {"file": display_path(code.co_filename), "line": line, "function": code.co_name}

    return {}


def _place(frame: traceback.FrameSummary) -> _Place:
    return {"file": display_path(frame.filename), "line": frame.lineno or 0, "function": frame.name}


def _frames_above(error: BaseException | None, cause: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames above the one that caught a cause, which are in the traceback of the error that followed."""
    whole = trace = None if error is None or error is cause else error.__traceback__
    caught, depth = cause.__traceback__, 0
    while trace is not None and caught is not None:
        if trace.tb_frame is caught.tb_frame:
            return traceback.extract_tb(whole, limit=min(depth, _MOST_FRAMES))

        trace, depth = trace.tb_next, depth + 1

    return []


def _frames(trace: TracebackType | None) -> list[traceback.FrameSummary]:
    """Return the frames of a traceback; of a very deep recursion only the outermost and the innermost."""
    depth, entry = 0, trace
    while entry is not None:
        entry, depth = entry.tb_next, depth + 1

    if depth <= _MOST_FRAMES:
        return list(traceback.extract_tb(trace))

    half = _MOST_FRAMES // 2
    return [*traceback.extract_tb(trace, limit=half), *traceback.extract_tb(trace, limit=-half)]


def _described(error: BaseException, above: list[traceback.FrameSummary]) -> dict[str, Any]:
    """Return the fields for an exception that is no SystemExit.

    Args:
        above: frames above those of its traceback.
    """
    text = _text_of(error)
    facts: dict[str, Any] = {"exception": _type_name(error), "message": _masked(text)}
    frames = [*above, *_frames(error.__traceback__)]
    shown = [frame for frame in frames if not is_package_file(frame.filename)] or frames
    # The innermost line may be deep in a library; the user needs the line of their own code that led there.
    own = [frame for frame in shown if is_user_file(frame.filename)]
    # The import system is in no traceback but that of a module to run which does not exist.
    places = own or [frame for frame in shown if not is_import_machinery(frame.filename)]
    if places:
        facts |= _place(places[-1])

    phases = [phase for frame in frames if (phase := _PHASE_OF.get(os.path.normpath(frame.filename))) is not None]
    if phases:
        facts["open_phase"] = phases[-1]

    stack = "".join(traceback.format_list(shown[-_STACK_FRAMES:]))
    facts["stack"] = secrets_only().mask_text(stack)[-_STACK_CHARS:]  # it contains lines of the user's code
    return facts | _in_worker(text) | _in_pool(error)


def address_limit_bytes() -> int | None:
    """Return the limit of this process's address space (`ulimit -v`); None without one, or where it is not known.

    It is read without an import: there may be no memory left to load the module `resource`.
    """
    with suppress(Exception), open("/proc/self/limits", encoding="ascii") as file:
        limit = next(line for line in file if line.startswith(_ADDRESS_SPACE)).removeprefix(_ADDRESS_SPACE).split()[0]
        return int(limit) if limit.isdecimal() else None

    return None


def _in_worker(text: str) -> dict[str, Any]:
    """Return message and line of an exception that a loader's worker process has raised.

    torch raises it again in the training process, with the worker's traceback in its text
    (`torch._utils.ExceptionWrapper`).
    """
    caught = _CAUGHT.match(text)
    if caught is None:
        return {}

    trace, kind, message = text[caught.end() :].rpartition(f"\n{caught['kind']}")
    worker = f"{message.removeprefix(':').strip()[:_MESSAGE_CHARS]} (in {caught['where']})"
    facts: dict[str, Any] = {"message": secrets_only().mask_text(worker.strip())} if kind else {}
    return facts | _place_in(trace)


def _in_pool(error: BaseException) -> dict[str, Any]:
    """Return message and line of an exception of a process of a pool, whose traceback is the text of its cause.

    So do multiprocessing, concurrent.futures and joblib raise it again.
    """
    cause = error.__cause__
    if cause is None or not type(cause).__name__.endswith(_REMOTE):
        return {}

    place = _place_in(_text_of(cause))
    return {"message": _masked(f"{_text_of(error)} (in a process of a pool)"), **place} if place else {}


def _place_in(trace: str) -> _Place:
    """Return the innermost place of the user's code in the text of a traceback."""
    frames = [match for match in _FRAME.finditer(trace) if is_user_file(match["file"])]
    if not frames:
        return {}

    file, line, function = frames[-1].group("file", "line", "function")
    return {"file": file, "line": int(line), "function": function}


def _type_name(error: BaseException) -> str:
    kind = type(error)
    is_plain = kind.__module__ in ("builtins", "__main__")
    return kind.__qualname__ if is_plain else f"{kind.__module__}.{kind.__qualname__}"


def _masked(text: str) -> str:
    return secrets_only().mask_text(text[:_MESSAGE_CHARS])


def _text_of(error: BaseException) -> str:
    """Return the text of an exception; that of a group, which only counts them, with its members."""
    try:
        text = str(error)[:_MAX_TEXT]
        if isinstance(error, BaseExceptionGroup) and type(error).__str__ is BaseExceptionGroup.__str__:
            members = (f"{_type_name(each)}: {_text_of(each)}".removesuffix(": ") for each in error.exceptions)
            text = f"{text}: {'; '.join(members)}"[:_MAX_TEXT]

        return text
    except Exception as broken:  # noqa: BLE001 - a user's __str__ may raise anything
        return f"<its text failed: {type(broken).__name__}>"
