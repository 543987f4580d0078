"""Options of `traceml launch --submit`, the submission, and the wait for its end."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from traceml.cli.options.number_range import NumberRange
from traceml.errors import UsageError

if TYPE_CHECKING:
    from traceml.launch.launcher.submission.submitted_job import SubmittedJob

__all__ = ["add_submit_options", "await_job", "check_submit_options", "submit_script"]

_ASKED = ("nodes", "time", "partition", "gpus_per_node", "cpus_per_node", "mem", "account", "qos", "signal", "retries")


def add_submit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a job of Slurm."""
    slurm = parser.add_argument_group("submission to Slurm")
    slurm.add_argument("--submit", action="store_true", help="submit this launch as a job, and return; needs submitit")
    slurm.add_argument(
        "--wait", action="store_true", help="with --submit: wait for the job's end, and exit with the script's status"
    )
    slurm.add_argument("--nodes", type=NumberRange(minimum=1), metavar="N", help="nodes (default: 1)")
    slurm.add_argument("--time", metavar="T", help="time limit: minutes, 1:30:00, 1-12:00:00 (default: 60)")
    slurm.add_argument("--partition", metavar="NAME", help="partition (default: the cluster's)")
    slurm.add_argument("--gpus-per-node", type=NumberRange(minimum=1), metavar="N", help="GPUs of each node")
    slurm.add_argument("--cpus-per-node", type=NumberRange(minimum=1), metavar="N", help="CPU cores of each node")
    slurm.add_argument("--mem", metavar="SIZE", help="memory of each node, such as 64G")
    slurm.add_argument("--account", metavar="NAME", help="account to charge")
    slurm.add_argument("--qos", metavar="NAME", help="quality of service")
    slurm.add_argument(
        "--signal", metavar="NAME@S", help="signal to the script S seconds before the end (default: USR2@120)"
    )
    slurm.add_argument(
        "--retries",
        type=NumberRange(minimum=0),
        metavar="N",
        help="how often the job is queued again after its time limit or a preemption (default: 3)",
    )
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY[=VALUE]", help="another option of sbatch; may be repeated"
    )


def check_submit_options(options: argparse.Namespace) -> None:
    """Check that options of a job are given with `--submit` alone.

    Raises:
        UsageError: they are not, or one of them cannot be combined with it.
    """
    if options.submit:
        if options.live in ("terminal", "web"):
            raise UsageError(f"--live {options.live} shows a job that runs here: after --submit use `traceml top`")

        return

    given = [name for name in (*_ASKED, "sbatch", "wait") if getattr(options, name)]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} needs --submit")


def submit_script(
    options: argparse.Namespace, launcher: Any, script: dict[str, Any], tracing: dict[str, Any] | None, name: str
) -> SubmittedJob[Any]:
    """Submit the launch of a script, print how it is followed, and return the handle of its job.

    Args:
        script: see `assembly.run_script`.
        tracing: arguments of its `Tracing`; None: it is not traced.
    """
    from traceml.launch.launcher.submission.allocation_call import AllocationCall
    from traceml.launch.launcher.submission.submitting import SlurmOptions, submit

    asked = {key: value for key in _ASKED if (value := getattr(options, key)) is not None}
    slurm = SlurmOptions(**asked, sbatch=dict(map(_sbatch_option, options.sbatch)))
    call = AllocationCall(options=launcher, script=script, tracing=tracing, retries=slurm.retries)
    job = submit(call, slurm, name, options.run_name)
    sys.stdout.write(
        f"submitted job {job.job_id}; its run is {job.run_id}\n"
        f"  output: {job.output}\n  follow: traceml top {job.run_id}\n  cancel: scancel {job.job_id}\n"
    )
    sys.stdout.flush()
    return job


def await_job(job: SubmittedJob[Any]) -> None:
    """Wait for the end of a job, also while it is queued again.

    Raises:
        Exception: what the launch raised there.
        KeyboardInterrupt: the user waits no longer; its note says that the job continues.
    """
    try:
        job.result()
    except KeyboardInterrupt as error:
        error.add_note(f"traceml launch: job {job.job_id} keeps running; cancel it by `scancel {job.job_id}`")
        raise


def _sbatch_option(text: str) -> tuple[str, str | bool]:
    key, is_value, value = text.removeprefix("--").partition("=")
    if not key:
        raise UsageError(f"--sbatch {text}: give an option of sbatch, such as constraint=a100 or exclusive")

    return key, value if is_value else True
