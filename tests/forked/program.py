"""Program that a forked process runs as the interpreter would: a script, `-m MODULE`, `-c CODE` or `-ISc CODE`."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
from dataclasses import dataclass, field
from importlib.machinery import BuiltinImporter, SourceFileLoader
from pathlib import Path
from types import ModuleType

_FRAMES = Path(__file__).parent  # frames of files in this folder are not shown
_kept: list[ModuleType] = []  # the previous `__main__`: still running, so it must not be cleared


@dataclass
class Program:
    """What the arguments of an interpreter say.

    Attributes:
        kind: `-m`, `-c`, `-ISc`, or empty for a script.
        argv: `sys.argv`.
        target: the script, module or code.
        warning_filters: values of `-W`.
        unbuffered: whether there is `-u`, first of all.
        safe_path: whether there is `-P`, after it: `sys.path` has no folder of the program.
        status: exit status, once it has ended; None: it ends by a signal.
    """

    kind: str
    argv: list[str]
    target: str
    warning_filters: list[str] = field(default_factory=list)
    unbuffered: bool = False
    safe_path: bool = False
    status: int | None = None

    @classmethod
    def parse(cls, words: list[str]) -> Program | None:
        """Read the arguments; None: only a new interpreter can follow them."""
        filters: list[str] = []
        unbuffered = words[:1] == ["-u"]
        words = words[unbuffered:]
        safe_path = words[:1] == ["-P"]
        words = words[safe_path:]
        while words[:1] == ["-W"]:
            filters.append(words[1])
            words = words[2:]

        rest = (filters, unbuffered, safe_path)
        if words[:1] in (["-m"], ["-c"], ["-ISc"]):
            return cls(words[0], [words[0][0] + words[0][-1], *words[2:]], words[1], *rest)

        return None if not words or words[0].startswith("-") else cls("", words, words[0], *rest)

    @property
    def folders(self) -> list[str]:
        """First folders of `sys.path`: that of the program, if any."""
        if self.safe_path:
            return []

        if self.kind == "-c":
            return [""]

        return [str(Path.cwd() if self.kind else Path(self.target).resolve().parent)]

    def run(self) -> None:
        """Run it to its end; show its exception as the interpreter does.

        Raises:
            SystemExit: the program's own, or that of its exception.
            KeyboardInterrupt: the program's, which is already shown: the interpreter ends by the signal.
        """
        try:
            self._execute()
        except SystemExit as error:
            self.status = _status_of(error)
            raise
        except BaseException as error:
            _show(error)
            if isinstance(error, KeyboardInterrupt):
                sys.excepthook = lambda *_: None
                raise

            self.status = 1
            sys.exit(1)

        self.status = 0

    def run_until_exec(self) -> list[str]:
        """Run code that replaces its process by another interpreter; return the arguments of that one."""
        original, os.execv = os.execv, _execv  # type: ignore[assignment]
        sys.argv = list(self.argv)
        try:
            exec(self.target, {})
        except _ReplacedError as replaced:
            return replaced.words
        finally:
            os.execv = original

        sys.exit()

    def _execute(self) -> None:
        module = ModuleType("__main__")
        _kept.append(sys.modules["__main__"])
        sys.modules["__main__"] = module
        names = vars(module)
        names.update(__builtins__=builtins, __annotations__={})
        if self.kind == "-m":
            runpy._run_module_as_main(self.target)
        elif self.kind == "-c":
            names.update(__loader__=BuiltinImporter)
            exec(compile(self.target, "<string>", "exec"), names)
        else:
            path = str(Path(self.target).absolute())
            names.update(__file__=path, __loader__=SourceFileLoader("__main__", path), __cached__=None)
            with io.open_code(path) as file:
                code = compile(file.read(), path, "exec")

            exec(code, names)


class _ReplacedError(BaseException):
    """End of a program that another one replaces."""

    def __init__(self, words: list[str]) -> None:
        super().__init__(words)
        self.words = words


def _execv(_path: str, words: list[str]) -> None:
    raise _ReplacedError(words[1:])


def _status_of(error: SystemExit) -> int:
    """Return the exit status that the interpreter makes of its code."""
    if isinstance(error.code, int):
        return error.code & 0xFF

    return 0 if error.code is None else 1


def _show(error: BaseException) -> None:
    traceback = error.__traceback__
    while traceback is not None and Path(traceback.tb_frame.f_code.co_filename).parent == _FRAMES:
        traceback = traceback.tb_next

    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, traceback
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)
