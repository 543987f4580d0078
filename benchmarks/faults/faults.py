"""Faults of every process and part of the system: what training did, what was lost, what was reported to the user.

    python benchmarks/faults/faults.py [--only TEXT] [--output docs/faults.md] [--json FILE] [--keep FOLDER]

Each fault of `fault_cases.py` disturbs a real training of two ranks. Its losses and weights are compared with those of
an untraced training, its stored and delivered rows with what its ranks counted. Exits with 1 if training was changed by
tracing, if a row was lost without being reported, or if a process was left. `--json` takes a measurement further that
was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fault_cases import FAULTS, REFERENCE, Fault
from fault_jobs import RANKS, FaultedJob

_QUIET = {"BALANCED", "COMPUTE_BOUND", "CPU_CONTENTION", "INPUT_BOUND", "RESIDUAL_HEAVY", "COMM_BOUND", "STARTUP"}
_SHOWN_SENTENCES = 4
_TELLS_LOSS = re.compile(r"^ (Sent .*(wait|pending|error)|Tracing (?!.*none lost)|Restart)")
# Lines of ours outside the card: logged without a name, so recognized by their words. Not tracebacks, nor torchrun's.
_OURS = re.compile(r"traceml|aggregator|tracker|flight file|rows|are kept|not stored")
_OTHERS = re.compile(
    r'^\s*(\[rank\d+\]:|File "|at |traceml: the page is at|traceml: tracing this run|raise |[WEI]\d{4} |'
    r"\S*/session/entry\.py FAILED)"
)


@dataclass
class Outcome:
    """What a fault did.

    Attributes:
        name: of the fault.
        training: what the training did.
        lost: rows that were lost.
        reported: sentences that the user saw.
        wrong: what must not be.
        seconds: wall time.
    """

    name: str
    training: str
    lost: str
    reported: list[str]
    wrong: list[str]
    seconds: float


def measured(fault: Fault, folder: Path, reference: list[list[str]]) -> Outcome:
    """Disturb a job, and return what it did."""
    began = time.monotonic()
    job = FaultedJob(folder, fault.command, fault.steps, fault.environ, fault.options)
    try:
        aftermath = fault.act(job)
        left = job.left()
        report = report_of(job, is_new=aftermath is not None)
        lost, wrong = losses_of_rows(job, report, aftermath)
        training, differs = what_training_did(job, fault, reference)
        left = [f"left running: {command}" for command in left]
        seconds = time.monotonic() - began
        return Outcome(fault.name, training, lost, sentences(job, report), wrong + differs + left, seconds)
    finally:
        job.close()


def report_of(job: FaultedJob, *, is_new: bool) -> dict[str, Any]:
    """Return the report of a job's run: the one it left, or made now where it left none or rows came later."""
    path = job.runs_dir / "latest" / "report.json"
    text = path.read_text() if path.exists() and not is_new else job.ask("report", "latest", "--json").stdout
    with contextlib.suppress(ValueError):
        return dict(json.loads(text))

    return {}


def what_training_did(job: FaultedJob, fault: Fault, reference: list[list[str]]) -> tuple[str, list[str]]:
    """Return what the training did in words, and what must not be."""
    losses = [job.losses(rank) for rank in range(RANKS)]
    is_equal = all(mine == wanted[: len(mine)] for mine, wanted in zip(losses, reference, strict=True))
    equal = "bit-equal" if is_equal else "**different**"
    wrong = [] if is_equal else ["losses or weights differ"]
    counts = [len(mine) for mine in losses]
    if job.status is None:
        return f"did not end, at steps {counts}", [*wrong, "the job did not end"]

    if min(counts) == fault.steps and job.status == 0:
        return f"went on; {equal}", wrong

    at = " and ".join(map(str, sorted(set(counts))))
    ended = f"ended with status {job.status} at step {at} of {fault.steps}; {equal} so far"
    return ended, wrong if fault.ends else [*wrong, "the training ended"]


def losses_of_rows(job: FaultedJob, report: dict[str, Any], aftermath: str | None) -> tuple[str, list[str]]:
    """Return which rows were lost in words, and what must not be."""
    found = {"steps": job.stored("steps"), "logged values": job.stored("metrics"), "delivered values": job.delivered()}
    steps = sum(job.closed_steps(rank) for rank in range(RANKS))
    logged = sum(job.logged_values(rank) for rank in range(RANKS))
    wanted = {"steps": steps, "logged values": logged, "delivered values": logged}
    missing = {name: wanted[name] - len(rows) for name, rows in found.items()}
    wrong = [f"{name} are double" for name, rows in found.items() if len(set(rows)) != len(rows)]
    parts = [f"{count} of {wanted[name]} {name}" for name, count in missing.items() if count > 0]
    if not parts:
        after = f", stored {aftermath}" if aftermath else ""
        return f"nothing of {steps} steps, {logged} values{after}", wrong

    reported = reported_losses(report)
    if reported is None:
        return f"{', '.join(parts)}; reported: losses unknown", wrong

    if sum(count for count in missing.values() if count > 0) != reported:
        wrong.append("another number is reported")

    return f"{', '.join(parts)}; reported: {reported}", wrong


def reported_losses(report: dict[str, Any]) -> int | None:
    """Return how many rows a report tells as lost or waiting; None if it tells that nobody knows."""
    telemetry, trackers = report.get("telemetry") or {}, report.get("trackers") or []
    if "rows_lost" in telemetry and telemetry["rows_lost"] is None:
        return None

    pending = sum(each["pending"] or 0 for each in trackers)
    return int(telemetry.get("rows_lost") or 0) + pending


def sentences(job: FaultedJob, report: dict[str, Any]) -> list[str]:
    """Return what was reported to the user beyond what every run prints: the verdict of a bad end, losses, warnings."""
    findings = [each for each in report.get("findings", ()) if each["kind"] not in _QUIET]
    found = [f"{each['kind']}: {each['summary']}" for each in findings]
    card, others = _parts(job.output)
    found += [line for line in card if _TELLS_LOSS.search(line)]
    found += [line for line in others if _OURS.search(line) and not _OTHERS.search(line)]
    found = list(dict.fromkeys(_plain(text, job) for text in found))
    more = [f"and {len(found) - _SHOWN_SENTENCES} more lines"] if len(found) > _SHOWN_SENTENCES else []
    return found[:_SHOWN_SENTENCES] + more


def _parts(output: str) -> tuple[list[str], list[str]]:
    """Return the lines of the verdict cards, and all others."""
    card, others, is_card = [], [], False
    for line in output.splitlines():
        is_card = is_card or "─ traceml ─" in line
        (card if is_card else others).append(line)
        is_card = is_card and not line.startswith(" Command")

    return card, others


def _plain(text: str, job: FaultedJob) -> str:
    """Return a sentence without places and pids, which differ from run to run."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(str(job.folder), "…")
    text = re.sub(r"\d{8}-\d{6}-[\w.-]+", "RUN", text)
    return re.sub(r"\s+", " ", text).strip()


def page(outcomes: list[Outcome]) -> str:
    """Return `docs/faults.md`."""
    wrong = sum(bool(each.wrong) for each in outcomes)
    missing = [fault.name for fault in FAULTS if fault.name not in {each.name for each in outcomes}]
    unmeasured = [f"Not measured in this pass: {'; '.join(missing)}.", ""] if missing else []
    return "\n".join(
        [
            "# Faults",
            "",
            "Generated by `make faults`. Each row is a real training of two ranks (DDP, gloo) that was disturbed.",
            "",
            "- *Training*: whether it went on, and whether losses and weights after each step are those of an untraced",
            "  training, bit for bit.",
            "- *Lost*: rows that its ranks appended and that are missing in the store or at the tracker (`jsonl`).",
            "  Then the rows that the report counts as lost or pending. Of a host out of reach losses are unknown:",
            "  what its ranks append is known there alone.",
            "- *Reported*: what the command printed, and the verdict of a bad end.",
            "",
            "The faults are in [`fault_cases.py`](../benchmarks/faults/fault_cases.py).",
            "",
            f"Taken on {os.cpu_count()} cores with Python {platform.python_version()} and torch {version('torch')}.",
            "Rows may come from several passes, and from several commits of a day.",
            "",
            f"**{len(outcomes) - wrong} of {len(outcomes)} as they should be.**",
            "",
            *unmeasured,
            "| fault | training | lost | reported | wrong |",
            "|---|---|---|---|---|",
            *(
                f"| {each.name} | {each.training} | {each.lost} | {_cell(_reported(each))} | {_cell(each.wrong)} |"
                for each in outcomes
            ),
            "",
        ]
    )


def _reported(outcome: Outcome) -> list[str]:
    return [text for text in outcome.reported if not _OTHERS.search(text)]


def _cell(texts: list[str]) -> str:
    return "<br>".join(text.replace("|", "/").replace("<", "&lt;") for text in texts) or "-"


@contextlib.contextmanager
def place(fault: Fault, keep: Path | None) -> Iterator[Path]:
    """Make the folder of a fault, which stays only below `keep`."""
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return

    folder = keep / re.sub(r"\W+", "_", fault.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder


def untraced() -> list[list[str]]:
    """Return losses and weights of each rank without tracing."""
    with tempfile.TemporaryDirectory() as folder:
        job = FaultedJob(Path(folder), REFERENCE.command, REFERENCE.steps, REFERENCE.environ, ("--pause", "0"))
        try:
            REFERENCE.act(job)
            assert job.status == 0, job.output
            return [job.losses(rank) for rank in range(RANKS)]
        finally:
            job.close()


def tell(outcome: Outcome) -> None:
    """Print an outcome."""
    mark = "WRONG" if outcome.wrong else "ok   "
    print(f"{mark} {outcome.name} ({outcome.seconds:.0f} s)", flush=True)
    for text in (outcome.training, outcome.lost, *outcome.reported, *(f"WRONG: {each}" for each in outcome.wrong)):
        print(f"        {text}", flush=True)


def measure(faults: list[Fault], known: dict[str, Outcome], path: Path | None, keep: Path | None) -> list[Outcome]:
    """Measure the faults that are not known, and return the outcomes of all."""
    reference: list[list[str]] = []
    for fault in faults:
        if fault.name in known:
            continue

        if fault.lacking:
            words = f"not run: this machine lacks {', '.join(fault.lacking)}"
            known[fault.name] = Outcome(fault.name, words, "-", [], [], 0.0)
            continue

        reference = reference or untraced()
        with place(fault, keep) as folder:
            try:
                outcome = measured(fault, folder, reference)
            except Exception as error:
                outcome = Outcome(fault.name, "not measured", "-", [], [f"{type(error).__name__}: {error}"[:300]], 0.0)

        known[fault.name] = outcome

        tell(outcome)
        if path is not None:
            path.write_text(json.dumps([asdict(each) for each in known.values()], indent=1))

    return [known[fault.name] for fault in faults]


def main() -> int:
    """Measure, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the faults whose name contains this")
    parser.add_argument("--output", type=Path, help="write the table as Markdown")
    parser.add_argument("--json", type=Path, help="keep the outcomes in this file, and take it further if it exists")
    parser.add_argument("--measured", action="store_true", help="measure nothing: write what the file of --json has")
    parser.add_argument("--keep", type=Path, help="keep the jobs below this folder")
    options = parser.parse_args()
    known = {}
    if options.json and options.json.exists():
        known = {each["name"]: Outcome(**each) for each in json.loads(options.json.read_text())}

    faults = [fault for fault in FAULTS if options.only in fault.name]
    if options.measured:
        faults = [fault for fault in faults if fault.name in known]

    outcomes = measure(faults, known, options.json, options.keep)
    wrong = sum(bool(each.wrong) for each in outcomes)
    print(f"{len(outcomes) - wrong} of {len(outcomes)} as they should be")
    if options.output:
        options.output.write_text(page(outcomes))

    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
