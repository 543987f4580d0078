"""Accuracy of the verdict on real runs: kind, ranks, phase, function, steps, and what must not be said.

    python benchmarks/accuracy/judge.py [--only TEXT] [--output docs/accuracy.md] [--json FILE] [--keep FOLDER]

Runs each script of `shapes/` as a user does, under `traceml run`, one after another. The truth about each is in
`cases.py`. Exits with 1 if a sentence is wrong. `--json` takes a judging further that was stopped: the reports in the
file are judged anew, only the cases without one are run, and the file is written after each.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cases import CASES, QUIET, Case

SHAPES = Path(__file__).resolve().parent / "shapes"
TRACEML = Path(sys.executable).with_name("traceml")
LIMIT_S = 240
_BUSY = "while True: sum(range(10**6))"


@dataclass
class Judged:
    """A run beside the truth.

    Attributes:
        case: the run.
        report: its report; empty if there is none.
        failure: how the command ended, where it should have ended otherwise.
        seconds: wall time.
    """

    case: Case
    report: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0

    @functools.cached_property
    def wrong(self) -> list[str]:
        """What is not true, in words."""
        failures = [self.failure] if self.failure else []
        return failures + (list(differences(self.case, self.report)) if self.report else ["no report"])

    @property
    def verdict(self) -> str:
        """The verdict in short: kind, ranks, phase and function."""
        if not self.report:
            return "no report"

        found = self.report["verdict"]
        ranks = f" rank {', '.join(map(str, found['ranks']))}" if found["ranks"] else ""
        phase = f" in {found['phase']}" if found["phase"] else ""
        line = f", {found['evidence']['function']}" if found["evidence"].get("function") else ""
        return f"{found['kind']}{ranks}{phase}{line}"


@contextlib.contextmanager
def busy_core(*, wanted: bool) -> Iterator[None]:
    """Run a program that takes a core, if wanted."""
    program = subprocess.Popen([sys.executable, "-c", _BUSY]) if wanted else None
    try:
        yield
    finally:
        if program is not None:
            program.kill()
            program.wait()


def run(case: Case, folder: Path) -> Judged:
    """Run a case in a folder of its own, and judge it."""
    many = ["--nproc-per-node", str(case.ranks)] if case.ranks > 1 else []
    many += ["--kill-after-report"] if case.hang_timeout_s is not None else []
    command = [TRACEML, "run", "--runs-dir", folder / "runs", *many, SHAPES / case.script, *case.args]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRACEML_")}
    if case.hang_timeout_s is not None:
        environ["TRACEML_HANG_TIMEOUT"] = str(case.hang_timeout_s)

    began = time.monotonic()
    with busy_core(wanted=case.beside):
        status = status_of([str(part) for part in command], folder, environ | {"OMP_NUM_THREADS": "1"})

    path = folder / "runs" / "latest" / "report.json"
    return Judged(
        case,
        report=json.loads(path.read_text()) if path.exists() else {},
        failure="" if bool(status) == case.fails and status is not None else _failure(status, folder),
        seconds=time.monotonic() - began,
    )


def status_of(command: list[str], folder: Path, environ: dict[str, str], limit_s: float = LIMIT_S) -> int | None:
    """Run a command, its output to files of a folder, and return its status; None if it was ended at the limit.

    A process that the command leaves behind may keep a pipe open for longer than the command itself runs.
    """
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as errors:
        program = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=out, stderr=errors,
            start_new_session=True,
        )  # fmt: skip

    try:
        return program.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)  # also what it has left behind

        program.wait()


def _failure(status: int | None, folder: Path) -> str:
    last = (folder / "stderr").read_text(errors="replace")[-300:]
    return f"ended after {LIMIT_S} s: {last}" if status is None else f"exit status {status}: {last}"


def differences(case: Case, report: dict[str, Any]) -> Iterator[str]:
    """Yield what a report says that is not true of a case, and what it leaves out."""
    verdict, findings = report["verdict"], report["findings"]
    kinds = {finding["kind"] for finding in findings}
    if verdict["kind"] not in case.kinds:
        yield f"{verdict['kind']} instead of {' or '.join(sorted(case.kinds))}"
    elif case.kinds <= QUIET and any(_is_loud(finding) for finding in findings):
        yield f"warnings of a healthy run: {', '.join(sorted(kinds))}"
    else:
        yield from _place_differences(case, verdict)

    if case.steps is not None and {rank["steps"] for rank in report["ranks"]} != {case.steps}:
        yield f"{[rank['steps'] for rank in report['ranks']]} steps instead of {case.steps}"

    yield from (f"{kind} is false" for kind in sorted(case.never & kinds))
    advice = " ".join(found["next"] for found in report["findings"])
    yield from (f"advice '{text}' is false" for text in case.unsaid if text in advice)
    yield from (f"{kind} is missing" for kind in sorted(case.also - kinds))
    if "time" in report:
        total = sum(part["seconds"] for part in report["time"]["parts"])
        wall = report["time"]["wall_s"]
        if abs(total - wall) > 0.01 * wall:
            yield f"the parts of the wall time add up to {total:.2f} of {wall:.2f} s"


def _is_loud(finding: dict[str, Any]) -> bool:
    return finding["severity"] != "info" and finding["kind"] not in QUIET


def _place_differences(case: Case, verdict: dict[str, Any]) -> Iterator[str]:
    evidence = verdict["evidence"]
    if tuple(verdict["ranks"]) != case.blamed and verdict["kind"] != "CPU_CONTENTION":  # those that lack cores
        yield f"ranks {verdict['ranks']} instead of {list(case.blamed)}"

    if case.phase is not None and verdict["phase"] != case.phase:
        yield f"phase {verdict['phase']} instead of {case.phase}"

    if case.cause is not None and evidence.get("cause") != case.cause:
        yield f"cause {evidence.get('cause')} instead of {case.cause}"

    if case.function is not None:
        yield from _line_differences(case, evidence)

    if case.since_step is not None:
        since = evidence.get("since_step")
        if since is None or abs(since - case.since_step) > 0.1 * case.since_step:
            yield f"since step {since} instead of {case.since_step}"


def _line_differences(case: Case, evidence: dict[str, Any]) -> Iterator[str]:
    function = str(evidence.get("function"))
    if function.rpartition(".")[2] != str(case.function).rpartition(".")[2]:
        yield f"function {evidence.get('function')} instead of {case.function}"
        return

    lines = _lines_of(SHAPES / case.script, function.rpartition(".")[2])
    if not str(evidence.get("file", "")).endswith(case.script) or evidence.get("line") not in lines:
        yield f"{evidence.get('file')}:{evidence.get('line')} is not in {function}"


def _lines_of(path: Path, function: str) -> set[int]:
    """Return the lines of all functions of a name: two models have a `forward` each."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    named = [node for node in nodes if node.name == function]
    return {line for node in named for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def page(results: list[Judged], without: list[Case]) -> str:
    """Return `docs/accuracy.md`.

    Args:
        results: of the cases that were run.
        without: the others, which need libraries that are not installed.
    """
    right = sum(not each.wrong for each in results)
    healthy = [each for each in results if each.case.kinds <= QUIET]
    false = sum(bool(each.wrong) for each in healthy)
    crowded = sum(_is_crowded(each.report) for each in results)
    lines = [
        "# Accuracy of the verdict",
        "",
        "Generated by `make accuracy`: real runs of the scripts in [`shapes/`](../benchmarks/accuracy/shapes), under",
        "`traceml run`, one after another. Each is judged for kind, ranks, phase, function and line, number of steps,",
        "and the step of a change. It is wrong, too, if it says what must not be said, or if the parts of the run's",
        "time do not add up to it within 1 %. The truth about each is in",
        "[`cases.py`](../benchmarks/accuracy/cases.py).",
        "",
        f"Taken on {os.cpu_count()} cores with Python {platform.python_version()} and torch {version('torch')}.",
        f"In {crowded} of the runs the training waited for a core a quarter of the time or more, mostly because of",
        "other programs: `CPU_CONTENTION` is true of these.",
        *_left_out(without),
        "",
        f"**{right} of {len(results)} right.** Of {len(healthy)} healthy runs, {false} have a sentence that is wrong.",
        "",
        "| run | ranks | verdict | wrong |",
        "|---|---|---|---|",
        *(f"| {each.case.name} | {each.case.ranks} | {each.verdict} | {_cell(each.wrong)} |" for each in results),
        "",
    ]
    return "\n".join(lines)


def _left_out(without: list[Case]) -> list[str]:
    names = ", ".join(f"*{case.name}*" for case in without)
    return [f"Left out, as their libraries are not installed: {names}."] if without else []


def _is_crowded(report: dict[str, Any]) -> bool:
    return any(finding["kind"] == "CPU_CONTENTION" for finding in report.get("findings", ()))


def _cell(wrong: list[str]) -> str:
    return "; ".join(text.replace("|", "/").replace("\n", " ") for text in wrong) or "-"


def stored(path: Path | None) -> dict[str, Judged]:
    """Return the results of a file by name, without those whose case is gone."""
    if path is None or not path.exists():
        return {}

    cases = {case.name: case for case in CASES}
    results = [result for result in json.loads(path.read_text()) if result["name"] in cases]
    return {
        result["name"]: Judged(cases[result["name"]], result["report"], result["failure"], result["seconds"])
        for result in results
    }


def store(results: dict[str, Judged], path: Path) -> None:
    """Write results to a file."""
    rows = [
        {"name": name, "failure": each.failure, "seconds": each.seconds, "wrong": each.wrong, "report": each.report}
        for name, each in results.items()
    ]
    path.write_text(json.dumps(rows))


def tell(judged: Judged) -> None:
    """Print a result."""
    mark = "ok   " if not judged.wrong else "WRONG"
    wrong = "; ".join(judged.wrong)
    print(f"{mark} {judged.case.name}: {judged.verdict} ({judged.seconds:.0f} s) {wrong}", flush=True)


@contextlib.contextmanager
def place(case: Case, keep: Path | None) -> Iterator[Path]:
    """Make the folder of a case, which stays only below `keep`."""
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return

    folder = keep / case.name.replace(" ", "_").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder


def judge(cases: list[Case], known: dict[str, Judged], keep: Path | None, path: Path | None) -> dict[str, Judged]:
    """Run the cases that are not known, and return the results of all."""
    results = {}
    for case in cases:
        judged = known.get(case.name)
        if judged is None:
            with place(case, keep) as folder:
                judged = known[case.name] = run(case, folder)

            if path is not None:
                store(known, path)

        results[case.name] = judged
        tell(judged)

    return results


def main() -> int:
    """Run the cases, print them, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--output", type=Path, help="write the table as Markdown")
    parser.add_argument("--json", type=Path, help="keep the results in this file, and take it further if it exists")
    parser.add_argument("--keep", type=Path, help="keep the runs below this folder")
    options = parser.parse_args()
    wanted = [case for case in CASES if options.only in case.name]
    cases = [case for case in wanted if find_spec(case.needs) is not None]
    without = [case for case in wanted if case not in cases]
    for case in without:
        print(f"left out, as {case.needs} is not installed: {case.name}")

    results = judge(cases, stored(options.json), options.keep, options.json)
    right = sum(not each.wrong for each in results.values())
    print(f"{right} of {len(results)} right")
    if options.output:
        options.output.write_text(page(list(results.values()), without))

    return int(right < len(results))


if __name__ == "__main__":
    sys.exit(main())
