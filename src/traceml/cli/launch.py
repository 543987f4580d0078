"""`traceml launch`: run a training script as it is, traced, on many hosts, through ssh or srun."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml import settings
from traceml.cli.notices import print_unused_address
from traceml.cli.options.number_range import NumberRange
from traceml.cli.options.parsing import CommandParser
from traceml.cli.options.shared_options import (
    add_run_options,
    check_live,
    check_report,
    default_name,
    given,
    host_names,
    script_words,
)
from traceml.cli.options.submit_options import add_submit_options, await_job, check_submit_options, submit_script
from traceml.errors import UsageError, WorkerFailedError
from traceml.fail_open import print_notice
from traceml.formatting import printable
from traceml.process_ends import EndedBySignal

if TYPE_CHECKING:
    from traceml.supervise.launch_screen import MakeScreen

__all__ = ["main", "make_parser"]

_EPILOG = """\
Options before SCRIPT are traceml's; everything after it belongs to the script.
The hosts need only Python and the packages of the script, at the same paths.
Each rank has RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as under torchrun.
The output of rank 0 is shown; the output of each rank is in the log folder.
The exit status is that of the rank that failed first, 128 + n for signal n; 3 if a host failed."""

# Options with several values, separated by spaces or commas.
_LISTS = ("--hostnames", "--workers-per-host", "--default-env-vars", "--extra-env-vars")


def main(argv: list[str]) -> int:
    """Run a script on hosts; return its exit status."""
    options = make_parser().parse_args(_joined(argv))
    target, *arguments = script_words(options, example="traceml launch --hostnames node1 node2 train.py")
    check_submit_options(options)
    check_report(options.report)
    named = given(
        runs_dir=options.runs_dir,
        run_name=options.run_name,
        project=options.project,
        on_hang="abort" if options.kill_after_report else None,
    )
    config = settings.load(**named)
    check_live(options.live)
    if config.enabled:
        print_unused_address(config, "traceml launch")

    name = config.run_name or default_name(target, is_module=options.module)
    script = {"module" if options.module else "path": target, "argv": arguments}
    tracing: dict[str, Any] | None = {"name": name, **named} if config.enabled else None
    try:
        if options.submit:
            _submit(options, script, tracing)
        else:
            _run(options, script, tracing)
    except WorkerFailedError as error:
        _explain(error, f"traceml launch: {error}")
        return 128 + error.signal if error.signal else error.exit_code or 1
    except EndedBySignal as error:
        _explain(error, f"traceml launch: ended by {signal.Signals(error.number).name}")
        return 128 + error.number
    except KeyboardInterrupt as error:
        _explain(error)
        raise

    return 0


def _submit(options: argparse.Namespace, script: dict[str, Any], tracing: dict[str, Any] | None) -> None:
    if tracing is not None:
        tracing["report"] = options.report and options.report.absolute()

    name = default_name(script.get("path") or script["module"], is_module=options.module)
    job = submit_script(options, _launcher(options), script, tracing, name)
    if options.wait:
        await_job(job)


def _run(options: argparse.Namespace, script: dict[str, Any], tracing: dict[str, Any] | None) -> None:
    from traceml.launch.launcher.assembly import run_script
    from traceml.launch.launcher.job.tracing import Tracing
    from traceml.process_ends import BY_OTHERS, ended_by
    from traceml.supervise.launch_screen import terminal_screen
    from traceml.supervise.page_process import PageScreen

    screen: MakeScreen = {"none": lambda _run_dir: None, "web": PageScreen}.get(options.live, terminal_screen)
    traced = Tracing(make_screen=screen, report=options.report, **tracing) if tracing is not None else None
    with ended_by(*BY_OTHERS, signal.SIGQUIT):  # else Ctrl-\ would leave the terminal as the screen had it
        run_script(_launcher(options), script, tracing=traced)


def _explain(error: BaseException, text: str = "") -> None:
    """Print a text and an error's notes: the stack of each rank, and the absent ones."""
    for line in (text, *getattr(error, "__notes__", ())):
        if line:
            print_notice(printable(line, lines=True))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command, which completion uses too."""
    parser = CommandParser(
        prog="traceml launch",
        description="Run a training script on many hosts, see live what each rank does, and read what limits it.",
        epilog=_EPILOG,
    )
    hosts = parser.add_argument_group("hosts")
    hosts.add_argument(
        "--hostnames",
        metavar="HOST ...",
        default="auto",
        help="names for ssh, host:port, or a hostfile; slurm: the nodes of the allocation; auto: these, otherwise this "
        "host",
    )
    hosts.add_argument(
        "--workers-per-host",
        metavar="N ...",
        default="auto",
        help="a number for all hosts, or one per host; auto: slots of a hostfile, GPUs, otherwise CPU cores",
    )
    hosts.add_argument(
        "--ssh-config-file", type=Path, metavar="FILE", help="configuration file for ssh, instead of your own"
    )
    hosts.add_argument("--python", metavar="PATH", help="the interpreter on the hosts (default: the path of this one)")
    hosts.add_argument(
        "--timeout",
        type=NumberRange(float, minimum=0, above=True),
        default=600,
        metavar="S",
        help="seconds for starting the workers (default: 600)",
    )

    workers = parser.add_argument_group("environment of the workers")
    workers.add_argument("--default-env-vars", metavar="PATTERN ...", help="variables from this environment")
    workers.add_argument("--extra-env-vars", metavar="PATTERN ...", help="additional variables")
    workers.add_argument("--env-file", type=Path, metavar="FILE", help="sourced by bash on each host")
    workers.add_argument("--no-cpu-affinity", action="store_true", help="do not distribute the cores over the workers")
    add_submit_options(parser)
    add_run_options(parser)
    return parser


def _joined(argv: Sequence[str]) -> list[str]:
    """Join the values of each list option by commas, so that the script is not taken for a value.

    An option that is given again adds to its values. They end at the next option or at a file name; those of
    `--workers-per-host` at the first other word.
    """
    words, lists, others = list(argv), dict[str, list[str]](), list[str]()
    takes_value = {name for action in make_parser()._actions if action.nargs is None for name in action.option_strings}
    while words and words[0].startswith("-") and words[0] != "--":
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if option not in _LISTS:
            others.append(word)
            if word in takes_value and words:
                others.append(words.pop(0))

            continue

        values = [value] if value else []
        while words and not equals and not _ends_list(option, words[0], values):
            values.append(words.pop(0))

        if not values:
            raise UsageError(f"{option} needs a value")

        lists[option] = [*lists.get(option, []), *values]

    return [*(f"{option}={','.join(values)}" for option, values in lists.items()), *others, *words]


def _ends_list(option: str, word: str, values: Sequence[str]) -> bool:
    if word.startswith("-") or (len(values) == 1 and (values[0] in ("auto", "slurm") or Path(values[0]).is_file())):
        return True

    if not values:
        return False

    if option == "--workers-per-host":
        return not word.replace(",", "").isdigit()

    return word.endswith(".py") or Path(word).is_file()


def _launcher(options: argparse.Namespace) -> Any:
    from traceml.launch.launcher.launcher import Launcher

    chosen: dict[str, Any] = {
        "hostnames": host_names([options.hostnames]),
        "workers_per_host": _numbers(options.workers_per_host),
        "ssh_config_file": options.ssh_config_file,
        "backend": None,  # the script makes its own group, as under torchrun
        "timeout": options.timeout,
        "env_file": options.env_file,
        "python": options.python,
        "cpu_affinity": not options.no_cpu_affinity,
        "keep_agents": False,
    }
    if options.default_env_vars is not None:
        chosen["default_env_vars"] = tuple(_split(options.default_env_vars))

    if options.extra_env_vars is not None:
        chosen["extra_env_vars"] = tuple(_split(options.extra_env_vars))

    return Launcher(**chosen)


def _numbers(text: str) -> str | int | list[int]:
    if text in ("auto", "slurm"):
        return text

    numbers = []
    for word in _split(text):
        if not word.isdigit() or not int(word):
            raise UsageError(f"--workers-per-host: {word!r} is not a number of workers; give 1 or more, auto or slurm")

        numbers.append(int(word))

    return numbers[0] if len(numbers) == 1 else numbers


def _split(text: str) -> list[str]:
    return [word for word in text.split(",") if word]
