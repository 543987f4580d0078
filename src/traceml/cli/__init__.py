"""The command line: `traceml COMMAND …`.

Runs in the process that the user starts. May import every package below it. One module per command, each with
`main(argv) -> int`; only the module of the given command is imported, as `traceml run` must not pay for the screens of
the others. Errors are printed here only.

Exit status: 0 success, 1 a failed gate (`--fail-on`, `--fail-over`), 2 a usage error, 3 any other error,
130 interrupted; `run`, `launch` and `demo` return the status of the script.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from traceml.errors import SettingsError, TraceMLError, UsageError
from traceml.helper_programs import exit_process, importing
from traceml.trusted_files import fill_standard_descriptors

__all__ = ["COMMANDS", "main", "run_program"]

# Command -> its module and its help in one line. The help lists them in this order.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("traceml.cli.demo", "train on two ranks, one of them slow, and find the cause"),
    "run": ("traceml.cli.run", "run an unmodified script with tracing: traceml run train.py"),
    "launch": (
        "traceml.cli.launch",
        "the same on many hosts, over ssh or srun: --hostnames a b train.py",
    ),
    "serve": ("traceml.cli.serve", "start an aggregator for scripts that call traceml.init()"),
    "top": ("traceml.cli.top", "watch a running job"),
    "stacks": ("traceml.cli.stacks", "show what each rank of a running job is doing now"),
    "profile": ("traceml.cli.profile", "profile the operators of a running job, or its sampled lines: --cpu"),
    "report": ("traceml.cli.report", "show what limits a run"),
    "compare": ("traceml.cli.compare", "show what got slower between runs, and whether it is significant"),
    "fleet": ("traceml.cli.fleet", "show a model's earlier runs, and hosts that are often slow"),
    "export": ("traceml.cli.export", "export a run for Perfetto, dftracer, pandas or DuckDB: --format"),
    "analyze": ("traceml.cli.analyze", "summarize traces of dftracer, torch.profiler, Perfetto or traceml"),
    "whatif": ("traceml.cli.whatif", "simulate a hybrid-parallel job without its stragglers"),
    "sync": ("traceml.cli.sync", "upload what a tracker is still missing"),
    "runs": ("traceml.cli.runs", "list, label and remove the runs on this disk"),
    "mcp": ("traceml.cli.mcp", "answer an assistant's questions about runs, over stdio"),
    "schema": ("traceml.cli.schema", "print the JSON Schema of what commands print with --json"),
    "doctor": ("traceml.cli.doctor", "check the installation, settings, ports and devices"),
    "completion": ("traceml.cli.completion", "complete commands and options in bash, zsh or fish"),
}
_OF_TRACEML_AI = {"watch": "run", "view": "report", "inspect": "export"}  # another product's -> the one here

EXIT_OK = 0
EXIT_GATE = 1  # what was asked of a run or a comparison does not hold
EXIT_USAGE = 2
EXIT_ERROR = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: as a shell reports a program whose reader is gone


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: the arguments after `traceml`; None: those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    fill_standard_descriptors()
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - for the process's life
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    _escape_what_the_locale_lacks()
    try:
        status = _dispatch(args)
        sys.stdout.flush()  # raises here if the reader is gone, not while the interpreter exits
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _leave_broken_pipe()
    except SystemExit as error:
        is_pipe = isinstance(error.__context__, BrokenPipeError)  # rich's Console exits with 1 then
        return _leave_broken_pipe() if is_pipe else _status_of(error)
    except TraceMLError as error:
        return _explain(_title(args), error)
    except UnicodeEncodeError as error:
        if not any(map(_is_no_text, args)):
            raise

        encoding = sys.getfilesystemencoding()
        _print_error(f"{_title(args)}: an argument is no text in {encoding}, the locale's encoding: {error.object!a}")
        return EXIT_USAGE
    except OSError as error:
        if _is_output_lost(error):
            reason = (error.strerror or str(error)).lower()
            _print_error(f"{_title(args)}: cannot write standard output: {reason}")
            _leave_broken_pipe()
            return EXIT_ERROR

        about_file = error.filename is not None and error.strerror
        _print_error(f"{_title(args)}: {f'cannot use {error.filename}: {error.strerror}' if about_file else error}")
        if error.errno == errno.ENOENT and error.filename is None:  # of getcwd, which has no file to name
            _print_error("hint: the working directory was removed: change to another one")
        if error.errno == errno.EAGAIN:  # of fork: the system's text names no limit
            _print_error("hint: raise the limit of processes and threads (`ulimit -u`, or the container's pids.max)")

        return EXIT_ERROR


def run_program() -> NoReturn:
    """Run the command of this process, and end with its exit status."""
    exit_process(main())


def _escape_what_the_locale_lacks() -> None:
    """Have names that standard output's encoding lacks written as escapes, as on standard error, not raise."""
    is_default = getattr(sys.stdout, "errors", "") in ("strict", "surrogateescape")  # the latter in the C locale
    if is_default and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _is_no_text(arg: str) -> bool:
    """Return whether an argument has bytes that the locale's encoding lacks."""
    return any("\udc80" <= each <= "\udcff" for each in arg)


def _dispatch(args: list[str]) -> int:
    if args and args[0] == "help":
        args = [*args[1:2], "--help"]

    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return EXIT_OK

    if args[0] in ("-V", "--version"):
        from traceml.version import __version__

        print(f"traceml {__version__}")
        return EXIT_OK

    status: int = _load(args[0]).main(args[1:])
    return status


def _load(command: str) -> ModuleType:
    if command in COMMANDS:
        with importing():
            return import_module(COMMANDS[command][0])

    if command.startswith("-"):
        raise UsageError(f"unknown option {command}; options follow the command")

    raise UsageError(f"unknown command {command!r}{_did_you_mean(command)}")


def _did_you_mean(command: str) -> str:
    if command.endswith(".py"):
        return f"; did you mean `traceml run {command}`?"

    from difflib import get_close_matches

    close = [_OF_TRACEML_AI[command]] if command in _OF_TRACEML_AI else get_close_matches(command, COMMANDS, 1)
    return f"; did you mean `traceml {close[0]}`?" if close else ""


def _indented(text: str, more: str = "  ") -> list[str]:
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent=more, break_on_hyphens=False)


def _overview() -> str:
    lines = [
        "usage: traceml COMMAND [OPTIONS]",
        "",
        "Launch, trace, track and explain PyTorch training.",
        "",
        *(line for name, (_, help_line) in COMMANDS.items() for line in _indented(f"{name:<10} {help_line}", " " * 13)),
        "",
        *_indented("traceml COMMAND --help explains a command; --version prints the version."),
        *_indented("To trace from inside a script: traceml.init(local=True)"),
    ]
    return "\n".join(lines)


def _title(args: list[str]) -> str:
    return f"traceml {args[0]}" if args and args[0] in COMMANDS else "traceml"


def _explain(title: str, error: TraceMLError) -> int:
    for text in (f"{title}: {error}", *getattr(error, "__notes__", ())):
        _print_error(text)

    if isinstance(error, SettingsError):
        _print_error("hint: `python -m traceml.settings` describes every setting")
        return EXIT_USAGE

    if isinstance(error, UsageError):
        _print_error(f"hint: `{title} --help`")
        return EXIT_USAGE

    return EXIT_ERROR


def _print_error(text: str) -> None:
    from traceml.fail_open import print_notice
    from traceml.formatting import printable

    print_notice(printable(text, lines=True))


def _status_of(error: SystemExit) -> int:
    if error.code is None:
        return EXIT_OK

    if isinstance(error.code, int):
        return error.code

    _print_error(str(error.code))
    return EXIT_ERROR


def _is_output_lost(error: OSError) -> bool:
    """Whether standard output takes nothing, and not a file that the command writes."""
    try:
        if error.errno == errno.ENOSPC and error.filename is None:
            print()  # without a buffer nothing is left to be written
        sys.stdout.flush()
    except OSError:
        return True

    return False


def _leave_broken_pipe() -> int:
    # The interpreter flushes stdout once more at exit, which would raise again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BROKEN_PIPE
