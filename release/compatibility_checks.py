"""Checks of an installed traceml with one Python and one torch. Nothing here imports traceml or torch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from release.environments import Environment

__all__ = ["BEFORE_TORCH", "CHECKS", "Bench", "CompatibilityCheck", "FailedCheckError", "ImpossibleError"]

STEPS = 60
TRAINING = Path(__file__).with_name("compatibility_training.py")
LAUNCH = Path(__file__).with_name("compatibility_launch.py")
_TIMED_PHASES = {"input_wait", "forward", "backward", "optimizer"}
_TWO = ("--nproc-per-node", "2")
_TORCHRUN = ("python", "-m", "torch.distributed.run", "--standalone", *_TWO)
_COMMANDS: dict[int, tuple[str, ...]] = {1: ("python",), 2: _TORCHRUN}
_OURS = re.compile(r"traceml.*(Warning|Traceback|Error)|(Warning|Error).*traceml|^Traceback", re.MULTILINE)


class FailedCheckError(Exception):
    """Something does not work as it should; the message says what."""


class ImpossibleError(Exception):
    """Something that this Python or this torch cannot do; the message says why."""


@dataclass
class Bench:
    """An environment to check, and a folder to work in.

    Attributes:
        environment: the environment.
        folder: for the files of one check after another.
        torch: version of its torch, as numbers; empty before torch is installed.
        untraced: losses without tracing by options of the training and number of ranks.
    """

    environment: Environment
    folder: Path
    torch: tuple[int, ...] = ()
    untraced: dict[tuple[tuple[str, ...], int], list[list[str]]] = field(default_factory=dict)

    def emptied(self) -> Path:
        """Return the folder, emptied."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def output(self, *command: str, environ: dict[str, str] | None = None) -> str:
        """Run a command in the folder, and return its output and errors.

        Raises:
            FailedCheckError: it failed.
        """
        done = self.environment.run(*command, cwd=self.folder, environ=environ)
        if done.returncode != 0:
            raise FailedCheckError(f"`{_short(command)}` ended with status {done.returncode}: {_last(done.stderr)}")

        return done.stdout + done.stderr

    def report(self) -> dict[str, Any]:
        """Return the report of the latest run."""
        done = self.environment.run("traceml", "report", "--json", cwd=self.folder)
        if done.returncode != 0:
            raise FailedCheckError(f"`traceml report --json`: {_last(done.stderr)}")

        return dict(json.loads(done.stdout))

    def losses(self, ranks: int) -> tuple[list[str], list[list[str]]]:
        """Return the form of the hooks in each rank, and its hash and losses."""
        lines = [(self.folder / f"losses.{rank}").read_text().splitlines() for rank in range(ranks)]
        return [each[0] for each in lines], [each[1:] for each in lines]

    def reference(self, options: tuple[str, ...], ranks: int) -> list[list[str]]:
        """Return the losses of each rank without tracing.

        Raises:
            ImpossibleError: the training fails without traceml, too.
        """
        if (options, ranks) not in self.untraced:
            command = (*_COMMANDS[ranks], str(TRAINING), "--steps", str(STEPS), *options)
            self.emptied()
            done = self.environment.run(*command, cwd=self.folder, environ={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
            if done.returncode != 0:
                raise ImpossibleError(_cause(done.stderr))

            self.untraced[options, ranks] = self.losses(ranks)[1]

        return self.untraced[options, ranks]


@dataclass(frozen=True)
class CompatibilityCheck:
    """A row of the table.

    Attributes:
        name: of the row.
        run: checks; returns a figure for the table, or "".
    """

    name: str
    run: Callable[[Bench], str]


def _short(command: tuple[str, ...]) -> str:
    return " ".join(Path(word).name if "/" in word else word for word in command)[:120]


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-300:] or "it printed nothing"


def _cause(text: str) -> str:
    """Return the exception that ended a training: the last line that looks like one.

    Raises:
        FailedCheckError: there is none, so it was not torch that refused.
    """
    found = re.findall(r"^(?:\[rank\d\]: ?)?((?:\w+\.)*\w*(?:Error|Exception)\b: .+)$", text, re.MULTILINE)
    told = [each for each in found if "ChildFailedError" not in each]
    if not told:
        raise FailedCheckError(f"the untraced training failed: {_last(text)}")

    return str(told[-1])[:200]


def _check_report(report: dict[str, Any], ranks: int) -> None:
    telemetry = report["telemetry"]
    phases = {each["phase"] for each in report["phases"] if each["mean_ms"] > 0}
    found = {
        "steps by rank": ([each["steps"] for each in report["ranks"]], [STEPS] * ranks),
        "rows lost": (telemetry["rows_lost"] or 0, 0),
        "failures": (telemetry["failures"], {}),
        "phases without time": (_TIMED_PHASES - phases, set()),
        "state": (report["run"]["state"], "finished"),
    }
    wrong = [f"{name}: {value}, not {wanted}" for name, (value, wanted) in found.items() if value != wanted]
    if wrong:
        raise FailedCheckError("; ".join(wrong))


def _train(
    bench: Bench,
    *options: str,
    ranks: int = 1,
    command: tuple[str, ...] = (),
    environ: dict[str, str] | None = None,
    hooks: str = "C",
) -> str:
    """Train traced and untraced; compare losses, weights and the report."""
    wanted = bench.reference(options, ranks)
    bench.emptied()
    ranked = _TWO if ranks == 2 else ()
    start = command or ("traceml", "run", "--live", "none", *ranked)
    said = bench.output(*start, str(TRAINING), "--steps", str(STEPS), *options, environ=environ)
    forms, losses = bench.losses(ranks)
    if losses != wanted:
        raise FailedCheckError("losses or weights are not those of the untraced training")

    if set(forms) != {hooks}:
        raise FailedCheckError(f"hooks are in {forms}, not in {hooks}")

    if found := _OURS.search(said):
        line = said[said.rfind("\n", 0, found.start()) + 1 :].partition("\n")[0]
        raise FailedCheckError(f"it printed: {line[:200]}")

    _check_report(bench.report(), ranks)
    return ""


def _import(bench: Bench) -> str:
    bench.emptied()
    code = "import sys, traceml; traceml.load_run; print('torch' in sys.modules, traceml.__version__)"
    loaded, version = bench.output("python", "-W", "error", "-c", code).split()
    if loaded != "False":
        raise FailedCheckError("`import traceml` imports torch")

    if version not in bench.output("traceml", "--version"):
        raise FailedCheckError(f"`traceml --version` does not print {version}")

    checks = json.loads(bench.output("traceml", "doctor", "--json"))["checks"]
    broken = [f"{each['name']}: {each['text']}" for each in checks if each["state"] == "broken"]
    if broken:
        raise FailedCheckError(f"`traceml doctor`: {'; '.join(broken)}")

    return ""


def _autoload(bench: Bench) -> str:
    """`TRACEML=1`, with python and with torchrun: torch calls us from 2.5 on."""
    if bench.torch < (2, 5):
        bench.reference((), 1)
        bench.emptied()
        bench.output("python", str(TRAINING), "--steps", str(STEPS), environ={"TRACEML": "1"})
        if bench.losses(1) != (["none"], bench.untraced[(), 1]):
            raise FailedCheckError("it is traced, though torch before 2.5 calls nobody")

        raise ImpossibleError("from torch 2.5 on; trained untraced")

    _train(bench, command=_COMMANDS[1], environ={"TRACEML": "1"})
    return _train(bench, ranks=2, command=_COMMANDS[2], environ={"TRACEML": "1"})


def _report(bench: Bench) -> str:
    _train(bench)
    text = bench.output("traceml", "report")
    page = bench.folder / "page.html"
    bench.output("traceml", "report", "--html", str(page))
    bench.output("traceml", "export", "--format", "csv", "--output", str(bench.folder / "tables"))
    if "Verdict" not in text and "traceml" not in text:
        raise FailedCheckError(f"`traceml report` prints no card: {_last(text)}")

    if "<svg" not in page.read_text():
        raise FailedCheckError("the page of the report has no chart")

    return ""


def _launch_script(bench: Bench) -> str:
    command = ("traceml", "launch", "--hostnames", "localhost", "--workers-per-host", "2", "--live", "none")
    return _train(bench, ranks=2, command=command)


def _launch_function(bench: Bench) -> str:
    bench.emptied()
    said = bench.output("python", str(LAUNCH))
    if "3.0 3.0" not in said:
        raise FailedCheckError(f"the workers returned {_last(said)}")

    return ""


BEFORE_TORCH = CompatibilityCheck("import and `doctor`, without torch", _import)
CHECKS = (
    CompatibilityCheck("import and `doctor`", _import),
    CompatibilityCheck("`traceml run`, hooks in C", _train),
    CompatibilityCheck(
        "`traceml run`, hooks in Python", lambda bench: _train(bench, environ={"TRACEML_NATIVE": "0"}, hooks="Python")
    ),
    CompatibilityCheck("`report`, its page, `export`", _report),
    CompatibilityCheck("two ranks, DDP (gloo)", lambda bench: _train(bench, ranks=2)),
    CompatibilityCheck(
        "two ranks, DDP, hooks in Python",
        lambda bench: _train(bench, ranks=2, environ={"TRACEML_NATIVE": "0"}, hooks="Python"),
    ),
    CompatibilityCheck("two ranks, FSDP2 (gloo)", lambda bench: _train(bench, "--fsdp", ranks=2)),
    CompatibilityCheck("loader with two workers", lambda bench: _train(bench, "--workers", "2")),
    CompatibilityCheck("autocast, checkpointed layers", lambda bench: _train(bench, "--amp", "--checkpointed")),
    CompatibilityCheck("`torch.compile`", lambda bench: _train(bench, "--compile")),
    CompatibilityCheck(
        "`torch.compile`, hooks in Python",
        lambda bench: _train(bench, "--compile", environ={"TRACEML_NATIVE": "0"}, hooks="Python"),
    ),
    CompatibilityCheck("`TRACEML=1`, alone and with torchrun", _autoload),
    CompatibilityCheck("`traceml launch` of a script", _launch_script),
    CompatibilityCheck("`traceml.launch` of a function", _launch_function),
)
