"""`traceml run`: trace an unmodified script, alone or under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml import settings
from traceml.cli.notices import print_unused_address
from traceml.cli.options.number_range import PORT, NumberRange, node_count
from traceml.cli.options.parsing import CommandParser
from traceml.cli.options.shared_options import (
    add_prometheus_option,
    add_run_options,
    check_live,
    check_report,
    default_name,
    given,
    script_words,
)
from traceml.errors import TraceMLError, UsageError
from traceml.fail_open import print_notice
from traceml.helper_programs import helper_program
from traceml.ids import detect_rank
from traceml.installation import install_command
from traceml.supervise.aggregator_process import choose_run_id
from traceml.supervise.final_report import load_card, print_final_report
from traceml.supervise.output import PassThroughScreen
from traceml.supervise.supervisor import LocalJob, Screen, Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from traceml.supervise.joined_run import JoinedRun
    from traceml.supervise.listen_address import ListenAddress

__all__ = ["main", "make_parser"]

# By its path: `python -m` would import the user's `types.py` or `contextlib.py`, where the working directory has one.
_ENTRY = Path(__file__).parents[1] / "session" / "entry.py"

# torchrun's options with a value, so that the script is not taken for one. Listed here because importing torch takes a
# second.
_TORCHRUN_WITH_VALUE = (
    "--nnodes",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
    "--rdzv-conf",
    "--max-restarts",
    "--monitor-interval",
    "--start-method",
    "--event-log-handler",
    "--role",
    "--log-dir",
    "--redirects",
    "--tee",
    "--local-ranks-filter",
    "--duplicate-stdout-filters",
    "--duplicate-stderr-filters",
    "--node-rank",
    "--master-addr",
    "--master-port",
    "--local-addr",
    "--logs-specs",
    "--numa-binding",
    "--signals-to-handle",
    "--shutdown-timeout",
)
_TORCHRUN_FLAGS = ("--standalone", "--virtual-local-rank")
_REFUSED_OF_TORCHRUN = ("--no-python", "--run-path")
_NUMBERS: dict[str, Callable[[str], object]] = {
    "--nnodes": node_count,
    "--max-restarts": NumberRange(minimum=0),
    "--monitor-interval": NumberRange(float, minimum=0, above=True),
    "--node-rank": NumberRange(minimum=0),
    "--master-port": PORT,
    "--shutdown-timeout": NumberRange(minimum=0),
}
_TASK_LAUNCHERS = {"slurm": "srun", "openmpi": "mpirun"}  # by the source of a rank
_DEVICES = ("cpu", "gpu", "auto", "xpu", "hpu", "npu", "mlu", "musa")  # whose number torchrun finds, also of extensions
_SHORT = {"--redirects": "-r", "--tee": "-t"}

_EPILOG = """\
Options before SCRIPT are traceml's and torchrun's; everything after it belongs to the script.
The exit status is that of the rank that failed first, 128 + n for signal n."""


def main(argv: list[str]) -> int:
    """Run a script under tracing; return its exit status."""
    parser = make_parser()
    parser.set_defaults(**_torchrun_defaults(os.environ))
    options = parser.parse_args(argv)
    target, *arguments = script_words(options, example="traceml run train.py")
    script = [*(["-m"] if options.module else []), target, *arguments]
    check_report(options.report)
    config = settings.load(**given(runs_dir=options.runs_dir, run_name=options.run_name, project=options.project))
    if not config.enabled:
        launcher = ["-m", "torch.distributed.run", *_torchrun_words(options)] if _uses_torchrun(options) else []
        os.execv(sys.executable, [sys.executable, *launcher, *script])  # noqa: S606 - the user's own script

    check_live(options.live)
    if _uses_torchrun(options) and find_spec("torch") is None:
        raise TraceMLError(f"torchrun's options need PyTorch, which is not installed: {install_command('torch')}")

    job = LocalJob(
        command=_command(options, script),
        uses_torchrun=_uses_torchrun(options),
        run_id=choose_run_id(config, config.run_name or default_name(target, is_module=options.module)),
        runs_dir=config.runs_dir.absolute(),
        environ=given(
            TRACEML_RUN_NAME=options.run_name,
            TRACEML_PROJECT=options.project,
            TRACEML_ON_HANG="abort" if options.kill_after_report else None,
            TRACEML_PROFILE_ON_FINDING=str(settings.PROFILE_AFTER_S) if options.profile_on_finding else None,
        ),
        has_other_nodes=_has_other_nodes(options),
        token=config.token,
        tls=config.tls,
    )
    print_unused_address(config, "traceml run")
    if not (config.quiet or config.supervised or job.uses_torchrun):
        _warn_of_other_tasks()

    with _metrics(job, options.prometheus, config.token) as keep_metrics:
        return _run_job(job, live=options.live, report=options.report, quiet=config.quiet, on_tick=keep_metrics)


def _run_job(
    job: LocalJob,
    *,
    live: str = "auto",
    report: Path | None = None,
    quiet: bool = False,
    on_tick: Callable[[], object] | None = None,
) -> int:
    """Run a job, say where it is stored, show it live, and print its verdict.

    Args:
        live: `terminal`, `web`, `none`, or `auto`: the terminal view if there is a terminal.
        report: path for a copy of the report: the page if the name ends in .html, else the JSON.
        quiet: print neither where it is stored nor the verdict.
        on_tick: called a few times a second while the job runs.

    Returns:
        The job's exit status.
    """
    make_screen = _screen_maker(job, live)
    kept = [on_tick] if on_tick is not None else []
    if live == "web":
        from traceml.supervise.page_process import check_page_installed

        check_page_installed()

    with ExitStack() as pages:

        def begin() -> None:
            if live == "web":  # not before: the run may be the one of another node
                kept.append(_open_page(pages, job))

            if not quiet:
                _print_start(job.run_dir, live=live != "web")

        with Supervisor(
            job,
            make_screen=make_screen,
            on_start=begin,
            on_joined=None if quiet else lambda run: _print_joined(run, live, report),
            on_delivery=_print_delivery,
            on_tick=lambda: [keep() for keep in kept],
            on_completing=load_card,
            quiet=quiet,
        ) as supervisor:
            outcome = supervisor.run()
            if not outcome.joined:
                print_final_report(
                    job.run_dir,
                    finished=outcome.finished,
                    program="traceml run",
                    report=report,
                    quiet=quiet,
                    file=sys.stderr,
                )

    return outcome.status


def _open_page(pages: ExitStack, job: LocalJob) -> Callable[[], None]:
    from traceml.supervise.page_process import page_beside

    return pages.enter_context(page_beside(job.run_dir))


def _print_start(run_dir: Path, *, live: bool) -> None:
    from traceml.transport.run_line import print_start  # the script waits for no import of ours

    print_start(run_dir, live=live)


def _print_joined(run: JoinedRun, live: str, report: Path | None) -> None:
    """Print where the ranks of this node are stored and shown, and which wanted views and files are only there."""
    from traceml.formatting import printable

    wanted = {"terminal": "the live view is not shown here", "web": "no page is opened here"}
    missing = [wanted[live]] if live in wanted else []
    missing += [f"{report} is not written here"] if report is not None else []
    where = (
        f"the ranks of this node are part of the run of {run.node}, which is stored, shown and reported there: "
        f"{run.run_dir}"
    )
    view = f"live: `traceml top` on {run.node}, `traceml stacks` also here"
    print_notice(printable("traceml: " + "; ".join([where, view, *missing])))


def _metrics(
    job: LocalJob, address: ListenAddress | None, token: str | None
) -> AbstractContextManager[Callable[[], None] | None]:
    if address is None:
        return nullcontext()

    from traceml.supervise.metrics_process import metrics_beside

    return metrics_beside(job.runs_dir, address, token, print_notice)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command, which completion uses too."""
    parser = CommandParser(
        prog="traceml run",
        description="Run a training script, see live what each rank does, and read at the end what limits it.",
        epilog=_EPILOG,
    )
    own = add_run_options(parser)
    add_prometheus_option(own)
    own.add_argument(
        "--profile-on-finding",
        action="store_true",
        help=f"profile the operators once, when computation has been the verdict for {settings.PROFILE_AFTER_S} s",
    )
    torchrun = parser.add_argument_group("torchrun's options")
    torchrun.add_argument(
        "--nproc-per-node",
        "--nproc_per_node",
        type=NumberRange(words=_DEVICES),
        metavar="N",
        help="ranks on this host: a number, cpu, gpu or auto",
    )
    for name in _TORCHRUN_WITH_VALUE:
        names = [_SHORT[name]] if name in _SHORT else []
        torchrun.add_argument(
            *names, name, _with_underscores(name), type=_NUMBERS.get(name, str), help=argparse.SUPPRESS
        )

    for name in _TORCHRUN_FLAGS:
        torchrun.add_argument(name, _with_underscores(name), action="store_true", help=argparse.SUPPRESS)

    for name in _REFUSED_OF_TORCHRUN:
        torchrun.add_argument(name, _with_underscores(name), nargs=0, action=_Refused, help=argparse.SUPPRESS)

    torchrun.description = "All options of torchrun but --no-python and --run-path are passed on; PET_ variables count."
    return parser


class _Refused(argparse.Action):
    """An option of torchrun for what is no Python script, or not run as one."""

    def __call__(self, *call: Any) -> None:
        """Raise an error that names another way."""
        option = call[-1]
        raise UsageError(
            f"{option}: `traceml run` starts Python scripts only. "
            f"`TRACEML=1 torchrun {option} ...` traces the Python programs that yours starts"
        )


def _with_underscores(option: str) -> str:
    """Return the other name that torchrun gives an option."""
    return "--" + option.strip("-").replace("-", "_")


def _torchrun_defaults(environ: Mapping[str, str]) -> dict[str, object]:
    """Return torchrun's options by the PET_ variables that it reads, which operators of Kubernetes set.

    A program that a rank of torchrun starts has them, too; it is not one more job.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return {}

    found: dict[str, object] = {}
    for option in ("--nproc-per-node", *_TORCHRUN_WITH_VALUE, *_TORCHRUN_FLAGS):
        name = option.strip("-").replace("-", "_")
        if value := environ.get(f"PET_{name.upper()}"):
            found[name] = value != "0" if option in _TORCHRUN_FLAGS else value

    return found


def _uses_torchrun(options: argparse.Namespace) -> bool:
    """Return whether one of torchrun's options was given: a script then expects torchrun's variables, also alone."""
    return options.nproc_per_node is not None or bool(_torchrun_arguments(options))


def _has_other_nodes(options: argparse.Namespace) -> bool:
    """Return whether torchrun may start ranks on other nodes, too."""
    return options.nnodes is not None and int(options.nnodes.rpartition(":")[2]) > 1


def _warn_of_other_tasks() -> None:
    """Print, in the first task of srun or mpirun, that each task's command makes a run of its own rank."""
    own = detect_rank()
    if own.source in _TASK_LAUNCHERS and own.world_size > 1 and own.rank == 0:
        launcher = _TASK_LAUNCHERS[own.source]
        print_notice(
            f"traceml: {launcher} has started {own.world_size} tasks of `traceml run`, and each makes a run of its own "
            f"rank; `TRACEML=1 {launcher} ... python SCRIPT` makes one run of the tasks of a host"
        )


def _torchrun_words(options: argparse.Namespace) -> list[str]:
    """Return the words before those of the script."""
    # "--": else torchrun refuses a script's option that begins two of its own (--log: --log-dir, --logs-specs)
    return [f"--nproc-per-node={options.nproc_per_node or 1}", *_torchrun_arguments(options), "--"]


def _torchrun_arguments(options: argparse.Namespace) -> list[str]:
    arguments = []
    for name in _TORCHRUN_WITH_VALUE:
        value = getattr(options, name.strip("-").replace("-", "_"))
        if value is not None:
            arguments.append(f"{name}={value}")

    return arguments + [name for name in _TORCHRUN_FLAGS if getattr(options, name.strip("-").replace("-", "_"))]


def _command(options: argparse.Namespace, script: Sequence[str]) -> list[str]:
    if not _uses_torchrun(options):
        return [sys.executable, str(_ENTRY), *script]

    return helper_program("traceml.supervise.elastic", *_torchrun_words(options), str(_ENTRY), *script)


def _screen_maker(job: LocalJob, live: str) -> Callable[[], Screen] | None:
    if live == "web":
        return PassThroughScreen

    if live == "none" or not sys.stdout.isatty():
        return None

    def make() -> Screen:
        from traceml.display.terminal.live_screen import LiveScreen

        return LiveScreen(job.run_dir)

    return make


def _print_delivery() -> None:
    """Print why the command still runs after the script's end."""
    if sys.stderr.isatty():
        print_notice("traceml: delivering what was logged, and alerts; Ctrl-C leaves logged values to `traceml sync`")
