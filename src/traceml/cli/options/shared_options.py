"""Options of the run, the script and the metrics, shared by `run`, `launch` and `serve`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from traceml.errors import UsageError
from traceml.supervise.listen_address import ListenAddress

__all__ = [
    "add_prometheus_option",
    "add_run_options",
    "check_live",
    "check_report",
    "default_name",
    "given",
    "host_names",
    "script_words",
]


def add_run_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the script, and the options for the view, the name and the folder of the run; return their group."""
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT [ARGS ...]", help="what to run")
    own = parser.add_argument_group("traceml's options")
    views = ("auto", "terminal", "web", "none")
    own.add_argument("--live", choices=views, default="auto", help="live view; web prints its address (default: auto)")
    own.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="also write the report to FILE: HTML if it ends in .html, otherwise JSON",
    )
    own.add_argument("--run-name", metavar="NAME", help="part of the run's id (default: the script's name)")
    own.add_argument("--project", metavar="NAME", help="project of the run")
    own.add_argument("--runs-dir", metavar="DIR", help="folder of the runs (default: the setting runs_dir)")
    own.add_argument(
        "--kill-after-report",
        action="store_true",
        help="if the job hangs, write its report and end it with a status other than 0 (on_hang=abort)",
    )
    own.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as in `python -m`")
    own.add_argument("-c", nargs=0, action=_RefusedCode, help=argparse.SUPPRESS)
    return own


class _RefusedCode(argparse.Action):
    """The option of `python` for code on the command line."""

    def __call__(self, *_: object, **__: object) -> None:
        """Raise an error that names other ways."""
        raise UsageError(
            "-c: only scripts and modules are started here. Save the code in a file, or trace it by "
            "`TRACEML=1 python -c CODE`"
        )


def add_prometheus_option(parser: argparse._ActionsContainer) -> None:
    """Add the option `--prometheus`; its value is a `ListenAddress`, None without it."""
    parser.add_argument(
        "--prometheus",
        nargs="?",
        type=_address,
        const=ListenAddress(),
        metavar="[HOST:]PORT",
        help="also serve metrics for Prometheus at /metrics (127.0.0.1:29767)",
    )


def _address(text: str) -> ListenAddress:
    try:
        return ListenAddress.parse(text)
    except ValueError as error:
        is_script = Path(text).is_file()
        usage = f"; before a script give the port: --prometheus {ListenAddress().port} {text}" if is_script else ""
        raise argparse.ArgumentTypeError(f"{error}{usage}") from None


def default_name(target: str, *, is_module: bool) -> str:
    """Return the default name of a run: that of the script's file, or the last part of a module's name."""
    if not is_module:
        return Path(target).stem

    package, _, module = target.rpartition(".")
    return package.rpartition(".")[2] if module == "__main__" and package else module


def host_names(words: Iterable[str]) -> str | list[str]:
    """Return the hosts that an option names: `auto`, `slurm`, the path of a hostfile, or a list of names.

    Args:
        words: the option's values; each may be several names, separated by commas.
    """
    from traceml.launch.launcher.hosts.hostfile import is_hostfile

    names = [name for word in words for name in word.split(",") if name]
    alone = names[0] if len(names) == 1 else ""
    return alone if alone in ("auto", "slurm") or is_hostfile(alone) else names


def script_words(options: argparse.Namespace, *, example: str) -> list[str]:
    """Return the script and its arguments.

    Raises:
        UsageError: there is no script, or it does not exist.
    """
    target: list[str] = options.script
    if target and target[0] == "--":
        target = target[1:]
        if target and target[0].startswith("-") and not options.module:  # after "--" it is a file's name
            target = [f"./{target[0]}", *target[1:]]

    if not target or not target[0]:
        raise UsageError(f"no script given. Try: {example}")

    if target[0] == "-":
        raise UsageError("-: a script on standard input cannot be run: save it in a file first")

    if target[0].startswith("-"):
        raise UsageError(f"unknown option {target[0]}")

    if not options.module and not Path(target[0]).exists():
        import shutil  # with compressors of archives; the script waits for imports of ours

        if shutil.which(target[0]):
            raise UsageError(
                f"{target[0]} is a program, and no Python script. Try: {example}; "
                f"or trace what it starts: `TRACEML=1 {target[0]} ...`"
            )

        raise UsageError(f"can't open file {target[0]!r}: no such file. For a module, use -m.")

    return target


def check_live(view: str) -> None:
    """Check that the live view that was asked for can be shown.

    Raises:
        UsageError: there is no terminal for it.
    """
    if view == "terminal" and not sys.stdout.isatty():
        raise UsageError("--live terminal needs a terminal; standard output is not one")


def check_report(path: Path | None) -> None:
    """Check, before hours of training, that the report can be written.

    Raises:
        UsageError: it cannot be.
    """
    if path is None:
        return

    if path.is_dir():
        raise UsageError(f"--report: {path} is a folder; give the name of a file")

    if not path.absolute().parent.is_dir():
        raise UsageError(f"--report: there is no folder {path.parent}")

    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(f"--report: {path} cannot be written")


def given(**values: str | None) -> dict[str, str]:
    """Return the values that are not None."""
    return {key: value for key, value in values.items() if value is not None}
