"""What the rows of a rank say about what it does now."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.database.info_kinds import InfoKind
from traceml.database.schema import LINE_OTHER, LINE_OUTSIDE, LINE_THREADS, LINES, PROCESS, STEPS, Phase
from traceml.database.snapshots.rank_snapshot import FrameSnapshot, RankSnapshot
from traceml.diagnosis.facts.progress.rank_progress import ProgressHistory

S = 10**9


def history(phase: int, *, line_s: int = 130, open_step: int = 10) -> ProgressHistory:
    """Return the progress of a rank whose step 9 ended at 120 s."""
    found = ProgressHistory()
    steps, process, lines = (np.zeros(1, table.dtype) for table in (STEPS, PROCESS, LINES))
    steps["step"], steps["t_end_ns"], steps["total_ns"] = 9, 120 * S, S
    process["t_ns"], process["step"] = 131 * S, open_step
    lines["t_ns"], lines["phase"], lines["samples"], lines["line_id"] = line_s * S, phase, 10, -1
    found.steps(np.zeros(1, np.int64), steps)
    found.process_rows(0, process)
    found.line_rows(0, lines)
    return found


@pytest.mark.parametrize(
    ("phase", "part"),
    [
        (LINE_OTHER, "steps"),
        (int(Phase.FORWARD), "steps"),
        (int(Phase.CHECKPOINT), "checkpoint"),
        (LINE_OUTSIDE, None),
        (LINE_THREADS, None),
    ],
)
def test_the_newest_sample_tells_the_open_part(phase, part):
    """A step, or saving; between steps, as in an evaluation, no part is known."""
    assert history(phase).open_part(0) == part


def test_an_older_sample_tells_nothing():
    """The sample was taken before the last step ended, no step is open, or nothing is known of the rank."""
    assert history(LINE_OTHER, line_s=119).open_part(0) is None
    assert history(LINE_OTHER, open_step=-1).open_part(0) is None
    assert history(LINE_OTHER).open_part(1) is None


@pytest.mark.parametrize(("at_s", "part"), [(128, "evaluation"), (119, None)])
def test_a_long_evaluation_is_known_while_it_runs(at_s, part):
    """Until its row arrives, with which it is over."""
    found = history(LINE_OUTSIDE)
    found.info(0, {"kind": InfoKind.EVALUATING, "t_ns": 135 * S, "since_ns": at_s * S})
    assert found.open_part(0) == part


def test_saving_behind_an_evaluation_is_not_all_of_the_time():
    """A sample between the steps came before that of the checkpoint."""
    lines = np.zeros(2, LINES.dtype)
    lines["t_ns"], lines["phase"], lines["samples"] = (125 * S, 130 * S), (LINE_OUTSIDE, Phase.CHECKPOINT), 10
    found = history(LINE_THREADS)
    found.line_rows(0, lines)

    assert found.open_part(0) is None


def test_a_rank_without_progress_is_in_no_part():
    """A job that hangs in a step spends no time in steps; a snapshot before the timeout is no hang."""
    found = history(LINE_OTHER)
    found.take_snapshot(RankSnapshot(rank=0, at_ns=131 * S))
    assert found.open_part(0) == "steps"

    process = np.zeros(1, PROCESS.dtype)  # a row each second, while snapshots come ever more rarely
    process["t_ns"], process["step"] = (121 + int(found.timeout_s)) * S, 10
    found.process_rows(0, process)
    assert found.open_part(0) is None


def test_a_process_that_does_not_end_after_its_exception_makes_no_progress() -> None:
    """Its open step was closed when its script failed, and a thread has kept it for 40 s since."""
    found = history(LINE_OTHER)
    place = {"file": "train.py", "line": 17, "function": "check"}
    found.info(0, {"kind": InfoKind.EXIT, "t_ns": 120 * S, "exception": "ValueError", "message": "bad row", **place})
    found.take_snapshot(RankSnapshot(rank=0, at_ns=150 * S, quiet_s=30, phase="exit"))
    process = np.zeros(1, PROCESS.dtype)
    process["t_ns"] = 160 * S
    found.process_rows(0, process)

    (progress,) = found.build({0: "host"}, {}, {0: None}, {0: (9, 0.5)}).ranks.values()

    assert progress.snapshot is not None
    assert (progress.snapshot.phase, progress.quiet_s) == ("exit", 40)
    assert progress.snapshot.handled == "ValueError: bad row"
    assert progress.snapshot.raised_line == FrameSnapshot(**place)


@pytest.mark.parametrize(("phase", "exception"), [("exit", "KeyboardInterrupt"), ("comm", "ValueError"), ("exit", "")])
def test_only_a_failure_explains_that_a_process_does_not_end(phase: str, exception: str) -> None:
    """An interrupt is none."""
    found = history(LINE_OTHER)
    found.info(0, {"kind": InfoKind.EXIT, "t_ns": 120 * S, "exception": exception, "message": ""})
    found.take_snapshot(RankSnapshot(rank=0, at_ns=150 * S, quiet_s=30, phase=phase))

    snapshot = found.build({0: "host"}, {}).ranks[0].snapshot

    assert snapshot is not None
    assert (snapshot.handled, snapshot.raised_line) == ("", None)


@pytest.mark.parametrize(
    ("kind", "is_progress"),
    [
        (InfoKind.WORKER_SAMPLES, False),
        (InfoKind.GPU_HEALTH, False),
        (InfoKind.EVALUATING, False),
        (InfoKind.BATCH, True),
    ],
)
def test_what_others_do_meanwhile_is_no_progress_of_the_rank(kind: InfoKind, is_progress: bool) -> None:
    """A loader worker that is stuck is seen at its line again and again; that ends no hang."""
    found = history(LINE_OTHER)
    found.take_snapshot(RankSnapshot(rank=0, at_ns=150 * S, quiet_s=30))
    found.info(0, {"kind": kind, "t_ns": 151 * S})

    progress = found.build({0: "host"}, {}).ranks[0]

    assert (progress.snapshot is None) is is_progress
    assert progress.quiet_s == pytest.approx(0 if is_progress else 31)


@pytest.mark.parametrize("was_aborted", [True, False])
def test_what_a_rank_does_once_its_job_is_aborted_ends_no_hang(was_aborted: bool) -> None:
    """A peer has ended, so its collective fails: it closes the step in which it hung, and begins another one."""
    found = history(LINE_OTHER)
    found.take_snapshot(RankSnapshot(rank=0, at_ns=150 * S, quiet_s=30, phase="other"))
    found.was_aborted = was_aborted
    steps = np.zeros(1, STEPS.dtype)
    steps["step"], steps["t_end_ns"], steps["total_ns"] = 10, 152 * S, 32 * S
    found.steps(np.zeros(1, np.int64), steps)
    found.take_snapshot(RankSnapshot(rank=0, at_ns=153 * S, quiet_s=0, ended=True))

    progress = found.build({0: "host"}, {}).ranks[0]

    assert (progress.snapshot is not None) is was_aborted
    assert progress.quiet_s == pytest.approx(32 if was_aborted else 0, abs=1)
