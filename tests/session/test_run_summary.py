"""`traceml.summary()` and `traceml.runs()`: numbers for other loggers, and a list of runs."""

from __future__ import annotations

import json

import traceml
from tests.aggregator.conftest import Serving
from tests.diagnosis.fabricated import Job, adds
from tests.recorder.conftest import Run
from tests.runs.fabricated_store import store_run
from traceml.display.report_files import write_reports

SCRIPT = """
import json, sys, time, traceml
from traceml.session import run_summary
run_summary._STORED_S = 120  # on a busy machine 2 s may be too little for all rows
print(traceml.summary())
traceml.init()
for _ in range(40):
    with traceml.trace_step():
        with traceml.phase("augment"):
            time.sleep(0.001)
print(json.dumps(traceml.summary()))
traceml.shutdown()
print(json.dumps(traceml.summary()))
"""


def test_a_rank_gets_the_numbers_of_its_run(serving: Serving, run_script: Run) -> None:
    """All steps so far are in it, with the names that trackers get; before `init` it is empty."""
    done = run_script(SCRIPT)

    assert done.returncode == 0, done.stderr
    before, during, after = done.stdout.splitlines()
    assert before == "{}"
    numbers = json.loads(during)
    assert numbers["traceml/steps"] == 40
    assert numbers["traceml/step_ms"] >= 1
    assert numbers["traceml/share/augment"] > 0.5
    assert {type(value) for value in numbers.values()} <= {int, float}
    assert json.loads(after)["traceml/steps"] == 40


def test_runs_are_listed_the_newest_first(tmp_path) -> None:
    """Each with its verdict; an unknown folder has none."""
    write_reports(store_run(tmp_path / "runs" / "a", Job(steps=120), adds("forward", 20, (1,))))

    [info] = traceml.runs(tmp_path / "runs")
    assert (info.id, info.verdict) == ("a", "COMPUTE_STRAGGLER")
    assert traceml.runs(tmp_path / "none") == []
