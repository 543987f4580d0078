"""`traceml demo`: train on two ranks with a slow one among them, and see it found."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from traceml.cli.parsing import parse
from traceml.errors import TraceMLError

__all__ = ["main"]

_SCRIPT = Path(__file__).with_name("_demo_train.py")
_NEEDED = {"torch": "torch", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Options:
    """Train a small network on handwritten digits under DDP, make one rank slow, and let traceml find it.

    Nothing is downloaded. The training script is plain PyTorch; its path is printed.
    """

    fault: Literal["forward", "input", "backward", "optimizer", "other", "none"] = "forward"
    """The part of the step in which one rank is slow."""
    rank: int = 1
    """The slow rank."""
    ms: float = 15.0
    """How many milliseconds longer its step takes."""
    steps: int = 400
    """Training steps."""
    ranks: int = 2
    """How many ranks train."""
    live: Literal["auto", "terminal", "web", "none"] = "auto"
    """The live view: auto shows it where there is a terminal, web on a page whose address is told."""


def main(argv: list[str]) -> int:
    """Run the demonstration through `traceml run`; return its exit status."""
    options = parse(Options, argv, prog="traceml demo")
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise TraceMLError(
            f"the demonstration trains with PyTorch on scikit-learn's digits; not installed: {', '.join(missing)}. "
            "Install both with: pip install 'traceml[demo]'"
        )

    from traceml.cli import run

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would set it, without its warning
    words = _run_words(options)
    if sys.stderr.isatty():
        print(_introduction(options, words), file=sys.stderr, flush=True)

    return run.main(words)


def _run_words(options: Options) -> list[str]:
    job = ["--run-name", "demo", "--nproc-per-node", str(options.ranks)]
    live = ["--live", options.live] if options.live != "auto" else []
    fault = ["--fault", options.fault, "--rank", str(options.rank), "--ms", f"{options.ms:g}"]
    script = [str(_SCRIPT), "--steps", str(options.steps), *(fault if options.fault != "none" else [])]
    return [*job, *live, *script]


def _introduction(options: Options, words: list[str]) -> str:
    slow = f"rank {options.rank} is made {options.ms:g} ms slower in {options.fault}"
    what = "none slower than the others" if options.fault == "none" else slow
    train = "1 rank trains" if options.ranks == 1 else f"{options.ranks} ranks train"
    return f"{train} on handwritten digits; {what}. By hand:\n  traceml run {shlex.join(words)}\n"
