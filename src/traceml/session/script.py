"""Run a script under a recorder, with the same start and end as under `python`.

The script's module is `sys.modules["__main__"]`, so that pickling, multiprocessing's spawn and `inspect` work as under
`python`. Its exceptions are printed without our frames; its exit status and signals are the script's.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import signal
import sys
import zipimport
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NamedTuple, NoReturn

from traceml.clock import own_time as time
from traceml.helper_programs import importing
from traceml.process_ends import die_with_parent
from traceml.session.startup import start_for_script

__all__ = ["SpawnedRanks", "main"]

_OWN_FOLDER = Path(__file__).parent  # tracebacks leave out its files


class _Program(NamedTuple):
    """Program to run: its code and its location."""

    code: CodeType
    file: str
    argv0: str
    loader: Any
    spec: ModuleSpec | None


def main(argv: list[str]) -> NoReturn:
    """Run the script of `argv`, and exit with its status.

    Raises:
        SystemExit: always, except:
        KeyboardInterrupt: the script's, which is already shown: the interpreter ends by the signal.
    """
    error = _run(argv)
    if error is None:
        sys.exit(0)

    _show(error)
    _note_exit(error)  # a hook that the script has set, as that of rich or typer, need not call ours
    if isinstance(error, KeyboardInterrupt):
        sys.excepthook = lambda *_: None
        raise error

    sys.exit(1)


def _run(argv: list[str]) -> BaseException | None:
    """Run the script to its end; return its exception, but let a SystemExit pass."""
    module, words = (True, argv[1:]) if argv[:1] == ["-m"] else (False, argv)
    if not words:
        sys.exit("usage: python .../session/entry.py [-m] SCRIPT [ARGS ...]")

    # A run may be named before its module is found: after a file, as Python's own argv[0] will be.
    sys.argv = [words[0].replace(".", "/") + ".py" if module else words[0], *words[1:]]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun does not end its ranks when it is killed
        die_with_parent(os.getppid(), signal.SIGTERM)

    spawned = SpawnedRanks()
    with importing(), _plugins_beside(words[0], is_module=module):
        start_for_script()

    _raise_interrupts()
    try:
        program = _find_module(words[0]) if module else _find_script(words[0])
        sys.argv[0] = program.argv0
        _execute(program)
    except SystemExit as leaving:
        _note_exit(leaving)
        raise
    except BaseException as error:  # noqa: BLE001 - the script's own; shown as the interpreter does
        spawned.report(error)
        return error

    return None


def _execute(program: _Program) -> None:
    """Run the code as the module `__main__`."""
    module = ModuleType("__main__")
    names = module.__dict__
    names.update(
        __builtins__=builtins,
        __file__=program.file,
        __loader__=program.loader,
        __package__=program.spec.parent if program.spec is not None else None,
        __spec__=program.spec,
        __cached__=program.spec.cached if program.spec is not None else None,
    )
    if sys.version_info < (3, 14):  # a later one makes them when they are read, unless they are there
        names["__annotations__"] = {}

    _earlier_main.append(sys.modules["__main__"])
    sys.modules["__main__"] = module
    if "__mp_main__" in sys.modules:  # its name in spawned processes, if multiprocessing was imported before
        sys.modules["__mp_main__"] = module

    exec(program.code, names)  # noqa: S102 - the purpose of this module


_earlier_main: list[ModuleType] = []  # the previous `__main__`: still running, so it must not be cleared


def _raise_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from here on, as the interpreter does; `entry` has suspended that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# --- finding the script -----------------------------------------------------------------------------------------------


def _find_script(name: str) -> _Program:
    # Not normalized, as in Python's tracebacks.
    path = name if name.startswith(os.sep) else f"{Path.cwd()}{os.sep}{name}"
    if Path(path).is_dir() or (Path(path).is_file() and _is_archive(path)):
        return _find_in_folder_or_zip(name, path)

    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        _quit(f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}", 2)

    if path.endswith(".pyc"):
        spec = importlib.util.spec_from_file_location("__main__", path)
        loader: Any = spec.loader if spec is not None else None
        code = loader.get_code("__main__")
    else:
        code = compile(source, path, "exec", dont_inherit=True)
        loader = SourceFileLoader("__main__", path)

    _prepend(str(Path(path).resolve().parent))
    return _Program(code, path, name, loader, None)


def _is_archive(path: str) -> bool:
    """Return whether a file can be imported from, as `python` finds out; `zipfile` takes 10 ms to import."""
    try:
        zipimport.zipimporter(path)
    except zipimport.ZipImportError:
        return False

    return True


def _find_in_folder_or_zip(name: str, path: str) -> _Program:
    """Find `__main__` in a folder or a zip file."""
    sys.path.insert(0, path)
    spec = PathFinder.find_spec("__main__", [path])
    if spec is None or spec.loader is None:
        _quit(f"can't find '__main__' module in {path!r}", 1)

    return _program_of(spec, name)


def _find_module(name: str) -> _Program:
    """Find a module, or a package's `__main__`, as `python -m` does."""
    _prepend(str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            inner = importlib.util.find_spec(name)
            if inner is None:
                package = name.removesuffix(".__main__")
                _quit(f"No module named {name}; {package!r} is a package and cannot be directly executed", 1)

            spec = inner
    except (ImportError, ValueError) as error:
        _quit(f"Error while finding module specification for {name!r} ({type(error).__name__}: {error})", 1)

    if spec is None or spec.loader is None:
        _quit(f"No module named {name}", 1)

    return _program_of(spec, spec.origin or name)


def _program_of(spec: ModuleSpec, argv0: str) -> _Program:
    loader: Any = spec.loader
    code = loader.get_code(spec.name)
    if code is None:
        _quit(f"No code object available for {spec.name}", 1)

    return _Program(code, spec.origin or "", argv0, loader, spec)


@contextmanager
def _plugins_beside(name: str, *, is_module: bool) -> Iterator[None]:
    """Have modules beside the script found while tracing starts: last, so that none of them shadows a library."""
    path = Path.cwd() if is_module else Path(name).resolve()
    folder = str(path if path.is_dir() else path.parent)
    if folder in sys.path or sys.flags.safe_path:
        yield
        return

    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _prepend(folder: str) -> None:
    if not sys.flags.safe_path:
        sys.path.insert(0, folder)


def _quit(why: str, status: int) -> NoReturn:
    """End with the interpreter's own words for a program that it cannot run."""
    sys.stderr.write(f"{sys.executable}: {why}\n")
    raise SystemExit(status)


# --- end of the script ------------------------------------------------------------------------------------------------


def _note_exit(error: BaseException) -> None:
    """Report an exit status or an exception that no hook of ours may have seen."""
    from traceml.recorder.exits import status_of
    from traceml.recorder.lifecycle import note_exit

    note_exit(error, status_of(error))


class SpawnedRanks:
    """Ranks that the script starts by `torch.multiprocessing.spawn`: reports the process that failed first.

    torch ends the others by a signal when one has failed, and raises an exception that names that one. To the
    aggregator all of them look alike: gone without a word. `traceml run` has given this process a descriptor for it.
    """

    def __init__(self) -> None:
        fd = os.environ.pop("TRACEML_FAILURES_FD", "")
        self._fd = int(fd) if fd else None
        if self._fd is not None:
            os.set_inheritable(self._fd, False)

    def report(self, error: BaseException) -> None:
        """Report the process that an exception of the script names, if it names one."""
        # What the process raised itself, it has reported: that exception has no exit code.
        kind = getattr(sys.modules.get("torch.multiprocessing.spawn"), "ProcessExitedException", None)
        if self._fd is None or kind is None or not isinstance(error, kind):
            return

        from traceml.transport.exit_report import ExitReport, write_line

        ended = ExitReport(pid=error.error_pid, exitcode=error.exit_code, time=time.time())
        write_line(self._fd, ended.to_message())


def _show(error: BaseException) -> None:
    """Treat an uncaught exception as the interpreter does: store it for debuggers, and call the hook."""
    error.__traceback__ = _without_ours(error.__traceback__)
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    if sys.version_info >= (3, 12):
        sys.last_exc = error

    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        pass  # stdout is closed or replaced; the exception still has to be shown

    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except BaseException as failure:  # noqa: BLE001 - as the interpreter: print it, then the original
        sys.stderr.write("Error in sys.excepthook:\n")
        failure.__traceback__ = _without_ours(failure.__traceback__)
        sys.__excepthook__(type(failure), failure, failure.__traceback__)
        sys.stderr.write("\nOriginal exception was:\n")
        sys.__excepthook__(type(error), error, error.__traceback__)


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and Path(trace.tb_frame.f_code.co_filename).parent == _OWN_FOLDER:
        trace = trace.tb_next

    return trace
