"""`traceml demo`: train on two ranks, one of them slow, and find the cause."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from traceml.cli.options.number_range import NumberRange
from traceml.cli.options.parsing import parse
from traceml.errors import TraceMLError, UsageError
from traceml.installation import install_command

__all__ = ["main"]

_SCRIPT = Path(__file__).parent / "demonstration" / "_demo_train.py"
_NEEDED = {"torch": "torch", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class DemoOptions:
    """Train a small network on handwritten digits under DDP with one slow rank, and find the cause.

    Nothing is downloaded. The training script is plain PyTorch; its path is printed.
    """

    fault: Literal["forward", "input", "backward", "optimizer", "other", "none"] = "forward"
    """The slow part of the step (default: forward)."""
    rank: Annotated[int, NumberRange(minimum=0)] = 1
    """The slow rank (default: 1)."""
    ms: Annotated[float, NumberRange(float, minimum=0)] = 15.0
    """Delay of its step in milliseconds (default: 15)."""
    steps: Annotated[int, NumberRange()] = 400
    """Training steps (default: 400)."""
    ranks: Annotated[int, NumberRange()] = 2
    """Number of ranks (default: 2)."""
    live: Literal["auto", "terminal", "web", "none"] = "auto"
    """The live view: auto shows it on a terminal; web serves a page and prints its address
    (default: auto)."""


def main(argv: list[str]) -> int:
    """Run the demonstration through `traceml run`; return its exit status."""
    options = parse(DemoOptions, argv, prog="traceml demo")
    _check_rank(options)
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise TraceMLError(
            f"the demonstration needs PyTorch and scikit-learn; not installed: {', '.join(missing)}. "
            f"Install both with: {install_command('demo')}"
        )

    from traceml.cli import run

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, without its warning
    args = _run_args(options)
    if sys.stderr.isatty():
        print(_introduction(options, args), file=sys.stderr, flush=True)

    return run.main(args)


def _check_rank(options: DemoOptions) -> None:
    if options.fault != "none" and options.rank >= options.ranks:
        ranks = "there is only rank 0" if options.ranks == 1 else f"the ranks are 0 to {options.ranks - 1}"
        raise UsageError(f"--rank {options.rank} does not exist: {ranks}; --ranks N makes more")


def _run_args(options: DemoOptions) -> list[str]:
    job = ["--run-name", "demo", "--nproc-per-node", str(options.ranks)]
    live = ["--live", options.live] if options.live != "auto" else []
    fault = ["--fault", options.fault, "--rank", str(options.rank), "--ms", f"{options.ms:g}"]
    script = [str(_SCRIPT), "--steps", str(options.steps), *(fault if options.fault != "none" else [])]
    return [*job, *live, *script]


def _introduction(options: DemoOptions, args: list[str]) -> str:
    slow = f"rank {options.rank} is {options.ms:g} ms slower in {options.fault}"
    what = "no rank is slowed down" if options.fault == "none" else slow
    train = "1 rank trains" if options.ranks == 1 else f"{options.ranks} ranks train"
    return f"{train} on handwritten digits; {what}. The same by hand:\n  traceml run {shlex.join(args)}\n"
