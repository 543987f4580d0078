"""The command line: `traceml COMMAND …`.

One module per command, each with `main(argv) -> int`, and only the module of the command that was asked for is
imported: `traceml run` must not pay for the screens of the others. Errors are printed here and nowhere else.

Exit status: 0 done, 1 a gate that the user set failed, 2 called wrongly, 3 anything else, 130 interrupted;
`run`, `launch` and `demo` pass on the status of the script.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from traceml.errors import SettingsError, TraceMLError, UsageError

__all__ = ["COMMANDS", "main"]

# Command -> the module that holds it, and what it does in one line. The order is the order of the help.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("traceml.cli.demo", "train on two ranks with a slow one among them, and find it"),
    "run": ("traceml.cli.run", "run a training script as it is, traced: traceml run train.py"),
    "launch": ("traceml.cli.launch", "the same over many hosts, by ssh or srun: --hostnames a b train.py"),
    "serve": ("traceml.cli.serve", "start an aggregator for scripts that call traceml.init()"),
    "top": ("traceml.cli.top", "watch a running job"),
    "report": ("traceml.cli.report", "say what limits a run, or did"),
    "compare": ("traceml.cli.compare", "two runs: what got slower, by how much, and whether that is real"),
    "export": ("traceml.cli.export", "write a run for Perfetto, dftracer, pandas, DuckDB: --format FORMAT"),
    "analyze": ("traceml.cli.analyze", "summarise traces: dftracer, torch.profiler, Perfetto, its own"),
    "sync": ("traceml.cli.sync", "deliver to trackers what they have not got yet"),
    "runs": ("traceml.cli.runs", "list the runs on this disk, or remove old ones"),
    "doctor": ("traceml.cli.doctor", "check the installation, settings, ports and devices"),
}

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_ERROR = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell reports for any program whose reader went away


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: the words after `traceml`; those of the process when left out.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _open_standard_streams()
    try:
        status = _dispatch(words)
        sys.stdout.flush()  # a reader that went away is noticed here, not in the interpreter's last words
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _leave_broken_pipe()
    except SystemExit as leaving:
        return _status_of(leaving)
    except TraceMLError as error:
        return _explain(_title(words), error)
    except OSError as error:
        _complain(f"{_title(words)}: {error}")
        return EXIT_ERROR


def _open_standard_streams() -> None:
    """Open what is closed of stdin, stdout and stderr: a socket or log that got its number would be written over."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)

    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - for the process's life
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _dispatch(words: list[str]) -> int:
    if words and words[0] == "help":
        words = [*words[1:2], "--help"]

    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return EXIT_OK

    if words[0] in ("-V", "--version"):
        from traceml.version import __version__

        print(f"traceml {__version__}")
        return EXIT_OK

    status: int = _load(words[0]).main(words[1:])
    return status


def _load(command: str) -> ModuleType:
    if command in COMMANDS:
        return import_module(COMMANDS[command][0])

    if command.startswith("-"):
        raise UsageError(f"unknown option {command}; options follow the command")

    raise UsageError(f"unknown command {command!r}{_did_you_mean(command)}")


def _did_you_mean(command: str) -> str:
    if command.endswith(".py"):
        return f"; did you mean `traceml run {command}`?"

    from difflib import get_close_matches

    close = get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
    return f"; did you mean `traceml {close[0]}`?" if close else ""


def _overview() -> str:
    lines = [
        "usage: traceml COMMAND [OPTIONS]",
        "",
        "Launch, trace, track and explain PyTorch training.",
        "",
        *(f"  {name:<8} {help_line}" for name, (_, help_line) in COMMANDS.items()),
        "",
        "  traceml COMMAND --help explains a command; --version prints the version.",
        "  To trace from inside a script instead: import traceml; traceml.init()",
    ]
    return "\n".join(lines)


def _title(words: list[str]) -> str:
    return f"traceml {words[0]}" if words and words[0] in COMMANDS else "traceml"


def _explain(title: str, error: TraceMLError) -> int:
    _complain(f"{title}: {error}")
    if isinstance(error, SettingsError):
        _complain("hint: `traceml doctor` shows every setting and where it comes from")
        return EXIT_USAGE

    if isinstance(error, UsageError):
        _complain(f"hint: `{title} --help`")
        return EXIT_USAGE

    return EXIT_ERROR


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _status_of(leaving: SystemExit) -> int:
    if leaving.code is None:
        return EXIT_OK

    if isinstance(leaving.code, int):
        return leaving.code

    _complain(str(leaving.code))
    return EXIT_ERROR


def _leave_broken_pipe() -> int:
    # The interpreter flushes stdout once more at exit and would complain; there is nobody left to tell.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BROKEN_PIPE
