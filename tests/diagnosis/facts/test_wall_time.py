"""Wall time of stored runs."""

from __future__ import annotations

import math
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.runs.fabricated_store import add_info, run_facts
from traceml.database.schema import EPOCHS, EVALS, STEPS
from traceml.database.snapshots.rank_snapshot import SNAPSHOT, FrameSnapshot, RankSnapshot
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.diagnosis.facts.run_time import EvaluationParts
from traceml.diagnosis.facts.wall_parts import ProcessSums, wall_parts
from traceml.diagnosis.facts.wall_time import WallTimeFacts, wall_time
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report import build_report

S = 10**9
BOOT_S = 1_700_000_000
USUAL_WAIT_S = 0.01


def store(folder: Path, *, attempts: int = 1, evaluators: tuple[int, ...] = (0, 1), more_s: float = 0.0) -> Path:
    """Write a run of two ranks: start-up of 4 s, 40 steps of 0.1 s, evaluation of 2 s, 20 steps; it ends 3 s later.

    Args:
        more_s: time after that.
    """
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        ended = 100 + 20 * (attempts - 1) + 15 + more_s
        facts = run_facts(id="run", started=BOOT_S + 100.0, ended=BOOT_S + float(ended), attempt=attempts - 1)
        writer.put_meta("run", facts)
        for attempt in range(attempts):
            for rank in range(2):
                begin = (100 + 20 * attempt) * S
                stream = writer.stream(
                    StreamIdentity(rank, attempt, "h0", 100 + rank, attempt, ""), state="finished",
                    clock=[begin, BOOT_S * S + begin], clock_offset_ns=BOOT_S * S, clock_rtt_ns=1000,
                )  # fmt: skip
                fill(writer, stream, begin, evals=rank in evaluators)

    return folder


def fill(writer: StoreWriter, stream: int, begin: int, *, evals: bool, steps: int = 60) -> None:
    rows = np.zeros(60, STEPS.dtype)
    rows["step"] = np.arange(60)
    rows["total_ns"], rows["checkpoint_ns"], rows["forward_ns"] = S // 10, S // 100, S // 20
    rows["input_wait_ns"] = S // 100
    rows["input_wait_ns"][[0, 20, 40]] = S // 20
    rows["t_end_ns"] = begin + 4 * S + (np.arange(60) + 1) * S // 10 + np.where(np.arange(60) >= 40, 2 * S, 0)
    writer.append(stream, "steps", 0, steps, rows[:steps].tobytes(), 0, steps - 1)
    if evals:
        row = np.zeros(1, EVALS.dtype)
        row["step"], row["t_end_ns"], row["ns"], row["batches"] = 40, begin + 10 * S, 2 * S, 8
        writer.append(stream, "evals", 0, 1, row.tobytes(), 40, 40)


def time_of(folder: Path) -> tuple[float, dict[str, float]]:
    section = build_report(folder).time
    assert section is not None
    assert sum(part.seconds for part in section.parts) == pytest.approx(section.wall_s, rel=1e-6)
    assert sum(part.share for part in section.parts) == pytest.approx(1, rel=1e-5)
    return section.wall_s, {part.part: part.seconds for part in section.parts}


def test_the_parts_add_up_when_they_are_rounded(tmp_path):
    """Each part has six digits; `wall_s` is their sum, and not the run's time to six digits."""
    section = build_report(store(tmp_path / "run", more_s=1 / 3)).time
    assert section is not None
    assert math.fsum(part.seconds for part in section.parts) == section.wall_s
    assert section.wall_s == pytest.approx(15 + 1 / 3, rel=1e-5)


def test_the_parts_are_those_of_the_run(tmp_path):
    """Start-up, steps without saving, saving, evaluation, and the time after the last step."""
    wall_s, parts = time_of(store(tmp_path / "run"))

    assert wall_s == pytest.approx(15)
    assert parts == pytest.approx(
        {"startup": 4.0, "steps": 5.4, "checkpoint": 0.6, "evaluation": 2.0, "idle": 3.0}, abs=1e-6
    )


def ended_in_step(folder: Path, rows: int, number: int = signal.SIGKILL) -> Path:
    """Write a run of a process that a signal ends after 60 s, in the step that has begun after 4 s and `rows`."""
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id="run", started=BOOT_S + 100.0, ended=BOOT_S + 160.0))
        end = {
            "signal": number,
            "at_s": BOOT_S + 160.0,
            "open_s": 56.0 - rows,
            "open_step": rows,
            "open_phase": "forward",
        }
        stream = writer.stream(
            StreamIdentity(0, 0, "h0", 100, 0, ""), state="killed", exit=end,
            clock=[100 * S, BOOT_S * S + 100 * S], clock_offset_ns=BOOT_S * S, clock_rtt_ns=1000,
        )  # fmt: skip
        steps = np.zeros(rows, STEPS.dtype)
        steps["step"], steps["total_ns"] = np.arange(rows), S
        steps["t_end_ns"] = 104 * S + (np.arange(rows) + 1) * S
        if rows:
            writer.append(stream, "steps", 0, rows, steps.tobytes(), 0, rows - 1)

    return folder


@pytest.mark.parametrize("rows", [0, 30])
def test_a_step_that_never_ended_is_time_in_steps(tmp_path, rows):
    """The first step of LBFGS took 3 minutes until the job was ended, and was told as a start-up of 100 %."""
    _, parts = time_of(ended_in_step(tmp_path / "run", rows))

    assert parts == pytest.approx({"startup": 4.0, "steps": 56.0})


def hung(folder: Path, rows: int, frames: tuple[FrameSnapshot, ...] = ()) -> tuple[Path, float]:
    """Write a run that was ended in a step after some rows, and was seen to hang; return it and the time it hung."""
    ended_in_step(folder, rows, signal.SIGTERM)
    quiet_s = 56.0 - rows - 1.0
    with StoreWriter(folder / STORE_NAME) as writer:
        seen = RankSnapshot(at_ns=160 * S, rank=0, quiet_s=quiet_s, step=rows, in_step=True, answered="recorder",
                            phase="forward", process_state="T", frames=frames)  # fmt: skip
        writer.event(SNAPSHOT, {**seen.to_row(), "t_ns": seen.at_ns, "attempt": 0})
        facts = run_facts(id="run", started=BOOT_S + 100.0, ended=BOOT_S + 160.0, state="hung", world_size=1)
        writer.put_meta("run", facts)

    return folder, quiet_s


def test_a_rank_that_hung_has_the_stack_of_its_last_snapshot(tmp_path):
    """In the form of a traceback: the innermost frame last."""
    frames = (FrameSnapshot(file="/w/hang.py", line=6, function="stuck"), FrameSnapshot(file="/w/hang.py", line=12))
    folder, _ = hung(tmp_path / "run", 30, frames)

    report = build_report(folder)

    assert report.verdict.kind == "HANG"
    assert report.ranks[0].exit.stack == '  File "/w/hang.py", line 12\n  File "/w/hang.py", line 6, in stuck\n'


@pytest.mark.parametrize("rows", [0, 30])
def test_the_time_of_a_hang_is_no_time_in_steps(tmp_path, rows):
    """A job that hung for 90 s in a collective was told as 83 % steps."""
    folder, quiet_s = hung(tmp_path / "run", rows)

    assert build_report(folder).verdict.kind == "HANG"
    assert time_of(folder)[1] == pytest.approx({"startup": 4.0, "steps": rows + 1.0, "idle": quiet_s})


def test_the_time_of_a_hang_is_no_time_in_the_step_that_the_end_has_closed():
    """The exception of a collective's timeout ends the step, which has a row then."""
    process = ProcessSums(first_ns=4 * S, last_ns=60 * S, steps=31, total_ns=56 * S)
    process.end_in_step(34 * S, 60 * S, 20 * S, has_row=True)

    assert wall_parts([process], 0, 61 * S) == pytest.approx(
        {
            "startup": 4,
            "steps": 36,
            "evaluation": 0,
            "checkpoint": 0,
            "between_epochs": 0,
            "idle": 21,
            "restart": 0,
            "unexplained": 0,
        }
    )


@pytest.mark.parametrize(
    ("begin_s", "end_s", "steps_s"), [(2, 2, 56), (50, 50, 56), (58, 63, 59), (60, 63, 59)], ids=str
)
def test_the_last_sign_of_life_before_the_last_rows_takes_no_time_from_others(begin_s, end_s, steps_s):
    """A process signs twice a second: in a short run the last one before a kill may be from its start-up."""
    process = ProcessSums(first_ns=4 * S, last_ns=60 * S, steps=31, total_ns=56 * S)
    process.end_in_step(begin_s * S, end_s * S, has_row=False)

    parts = wall_parts([process], 0, 65 * S)
    assert {part: seconds for part, seconds in parts.items() if seconds} == {
        "startup": 4,
        "steps": steps_s,
        "idle": 61 - steps_s,
    }


def test_a_step_that_the_end_has_closed_counts_once(tmp_path):
    """A script without a loader ends in its last step, which has a row."""
    folder = store(tmp_path / "run", evaluators=())
    with StoreWriter(folder / STORE_NAME) as writer:
        for rank in range(2):
            end = {"code": 0, "at_s": BOOT_S + 112.0, "open_s": 0.1, "step": 59}
            writer.stream(StreamIdentity(rank, 0, "h0", 100 + rank, 0, ""), state="finished", exit=end)

    assert time_of(folder)[1]["steps"] == pytest.approx(5.4)


def test_a_pause_between_steps_is_no_step(tmp_path):
    """The same two seconds, without rows of evaluation, as between the cells of a notebook."""
    _, parts = time_of(store(tmp_path / "run", evaluators=()))

    assert (parts["unexplained"], parts.get("between_epochs", 0.0)) == (pytest.approx(2.0), 0.0)


def test_the_start_of_epochs_is_told_apart(tmp_path):
    """The first batch is start-up; later ones are between epochs, beyond the usual wait of 10 ms."""
    folder = store(tmp_path / "run")
    with StoreWriter(folder / STORE_NAME) as writer:
        for stream in (1, 2):
            rows = np.zeros(3, EPOCHS.dtype)
            rows["step"], rows["first"] = [0, 20, 40], [1, 0, 0]
            rows["ns"], rows["create_ns"] = S // 20, S // 100
            writer.append(stream, "epochs", 0, 3, rows.tobytes(), 0, 40)

    _, parts = time_of(folder)

    assert parts["startup"] == pytest.approx(4.05)
    assert parts["between_epochs"] == pytest.approx(2 * (0.05 - USUAL_WAIT_S))
    assert parts["steps"] == pytest.approx(5.4 - 0.05 - 2 * (0.05 - USUAL_WAIT_S))


def test_earlier_attempts_are_a_restart(tmp_path):
    """Of each attempt steps count; from the last step of one to the first of the next 12 s pass."""
    wall_s, parts = time_of(store(tmp_path / "run", attempts=2))

    assert wall_s == pytest.approx(35)
    assert parts == pytest.approx(
        {"startup": 4, "steps": 10.8, "checkpoint": 1.2, "evaluation": 4, "restart": 12, "idle": 3}
    )


def test_an_attempt_without_a_step_is_a_restart(tmp_path):
    """It was starting when the run ended."""
    folder = store(tmp_path / "run")
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.stream(StreamIdentity(0, 1, "h0", 300, 1, ""), state="failed")

    _, parts = time_of(folder)

    assert parts["restart"] == pytest.approx(3)
    assert "idle" not in parts


@pytest.mark.parametrize(
    ("state", "process", "part"),
    [
        ("failed", {}, "startup"),
        ("finished", {}, "unexplained"),
        ("failed", {"tracing": False}, "unexplained"),
        ("running", {"tracing": False}, "unexplained"),
    ],
)
def test_a_run_without_steps_is_start_up(tmp_path, state, process, part):
    """Nothing else is known of it; one that finished may have trained in a way that is not recognized.

    The steps of a script that only logs are not seen.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id="run", world_size=1))
        stream = writer.stream(StreamIdentity(0, 0, "h0", 1, 1, ""), state=state)
        add_info(writer, stream, kind="process", **process)

    with closing(StoreReader(folder / STORE_NAME)) as reader:
        assert reader.step_sums() == {}

    assert time_of(folder)[1] == {part: 10.0}


@pytest.mark.parametrize(
    ("seconds", "batches", "short", "short_s"),
    [
        ([0.4, 8], [2, 40], 1, 0.4),
        ([0.4, 4, 4], [2, 20, 20], 1, 0.4),
        ([4, 4, 4], [20] * 3, 0, 0),
        ([2, 2, 2, 2, 10], [10, 10, 10, 10, 50], 4, 8),
        ([0.4], [2], 0, 0),
        ([0.2, 0.2, 8], [20] * 3, 0, 0),
    ],
    ids=["a check and one", "a check and two", "equal ones", "many short ones are much of it", "one", "one was slow"],
)
def test_a_short_check_is_no_evaluation(
    tmp_path: Path, seconds: list[float], batches: list[int], short: int, short_s: float
) -> None:
    """Lightning evaluates two batches before the first epoch."""
    folder = store(tmp_path / "run", evaluators=())
    rows = np.zeros(len(seconds), EVALS.dtype)
    rows["step"], rows["batches"], rows["ns"] = np.arange(len(seconds)) * 10, batches, np.array(seconds) * S
    rows["t_end_ns"] = 105 * S + np.cumsum(rows["ns"])
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.append(1, "evals", 0, len(seconds), rows.tobytes(), 0, 40)

    with closing(StoreReader(folder / STORE_NAME)) as reader:
        time = wall_time(list(reader.streams()), reader.step_sums(), BOOT_S + 100.0, BOOT_S + 140.0, WallTimeFacts())

    assert (time.evaluations, time.short_evaluations) == (len(seconds), short)
    assert time.short_evaluations_s == pytest.approx(short_s)


def test_evaluations_are_those_of_all_attempts_of_a_rank(tmp_path: Path) -> None:
    """Their time is, too: one of 2 s in each of three attempts, on both ranks."""
    with closing(StoreReader(store(tmp_path / "run", attempts=3) / STORE_NAME)) as reader:
        time = wall_time(list(reader.streams()), reader.step_sums(), BOOT_S + 100.0, BOOT_S + 155.0, WallTimeFacts())

    assert (time.evaluations, time.seconds["evaluation"]) == (3, pytest.approx(6))


@pytest.mark.parametrize(
    ("steps", "before", "only_first"),
    [
        ([0, 20, 40], True, False),
        ([0, 20, 60], False, False),
        ([20, 40, 50], False, False),
        ([0, 40], False, False),
        ([0], False, True),
        ([0, 0], False, True),
        ([60], False, False),
    ],
)
def test_evaluation_before_steps_each_time(tmp_path: Path, steps: list[int], before: bool, only_first: bool) -> None:
    """As for pseudo-labels; one after the last step, or none before the first, shows that it only evaluates."""
    folder = store(tmp_path / "run", evaluators=())
    rows = np.zeros(len(steps), EVALS.dtype)
    rows["step"], rows["batches"], rows["ns"] = steps, 8, S
    rows["t_end_ns"] = 105 * S + np.cumsum(rows["ns"])
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.append(1, "evals", 0, len(steps), rows.tobytes(), 0, 60)

    with closing(StoreReader(folder / STORE_NAME)) as reader:
        time = wall_time(list(reader.streams()), reader.step_sums(), BOOT_S + 100.0, BOOT_S + 140.0, WallTimeFacts())

    assert (time.evaluates_before, time.evaluates_only_first) == (before, only_first)


@pytest.mark.parametrize(("waited", "known"), [(0.5, (0.5, 0.25, 0.25 * S, 8.0)), (-1e-9, (0.0, 0.25, 0.25 * S, 8.0))])
def test_what_evaluations_spend_their_time_on(tmp_path: Path, waited: float, known: tuple[float, ...]) -> None:
    """Means over all of them; a store of an earlier version has -1, which is nothing known."""
    folder = store(tmp_path / "run", evaluators=())
    rows = np.zeros(2, EVALS.dtype)
    rows["step"], rows["batches"], rows["ns"], rows["forward_ns"] = [20, 40], 8, 2 * S, S // 2
    rows["input_wait_ns"], rows["t_end_ns"] = int(waited * 2 * S), 105 * S + np.cumsum(rows["ns"])
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.append(1, "evals", 0, len(rows), rows.tobytes(), 0, 60)

    with closing(StoreReader(folder / STORE_NAME)) as reader:
        time = wall_time(list(reader.streams()), reader.step_sums(), BOOT_S + 100.0, BOOT_S + 140.0, WallTimeFacts())

    assert time.evaluation_parts == EvaluationParts(*known)


@pytest.mark.parametrize(("attempts", "wall_s"), [(1, 15), (2, 35)])
def test_goodput_counts_each_step_once(tmp_path, attempts, wall_s):
    """60 steps of 80 ms beside waiting and saving; but for three, 200 ms, which began an epoch.

    A second attempt repeats all steps.
    """
    section = build_report(store(tmp_path / "run", attempts=attempts)).time

    assert section is not None
    assert section.goodput == pytest.approx((60 * 0.08 - 3 * 0.04) / wall_s, rel=1e-3)


def test_useful_time_is_the_mean_and_useful_steps_are_those_of_the_rank_with_most(tmp_path):
    """Ranks are killed at different steps."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id="run", started=BOOT_S + 100.0, ended=BOOT_S + 115.0))
        for rank, steps in enumerate((60, 40)):
            identity = StreamIdentity(rank, 0, "h0", 100 + rank, 0, "")
            clock = [100 * S, (BOOT_S + 100) * S]
            stream = writer.stream(identity, state="killed", clock=clock, clock_offset_ns=BOOT_S * S, clock_rtt_ns=1000)
            fill(writer, stream, 100 * S, evals=False, steps=steps)

    section = build_report(tmp_path).time

    assert section is not None
    assert section.productive_steps == 60
    assert section.productive_s == pytest.approx(((60 * 0.08 - 3 * 0.04) + (40 * 0.08 - 2 * 0.04)) / 2, rel=1e-3)


@pytest.mark.parametrize(("silent_s", "idle"), [(3, None), (30, 30)])
def test_rows_of_a_running_run_arrive_late(tmp_path, silent_s, idle):
    """A few seconds without rows are no end of the steps."""
    with closing(StoreReader(store(tmp_path / "run") / STORE_NAME)) as reader:
        ended_s = BOOT_S + 112.0 + silent_s
        time = wall_time(
            reader.streams(), reader.step_sums(), BOOT_S + 100.0, ended_s, WallTimeFacts(), is_running=True
        )

    assert time.wall_s == pytest.approx(12 + (idle or 0))
    assert time.seconds["idle"] == pytest.approx(idle or 0, abs=1e-6)


def test_a_rank_whose_rows_come_a_moment_later_than_others_steps_on(tmp_path):
    """A second behind rank 0, it is not after its last step."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        for rank, steps in enumerate((60, 50)):
            stream = writer.stream(
                StreamIdentity(rank, 0, "h0", 100 + rank, 0, ""), state="running",
                clock=[100 * S, (BOOT_S + 100) * S], clock_offset_ns=BOOT_S * S, clock_rtt_ns=1000,
            )  # fmt: skip
            fill(writer, stream, 100 * S, evals=False, steps=steps)

    with closing(StoreReader(tmp_path / STORE_NAME)) as reader:
        time = wall_time(
            reader.streams(), reader.step_sums(), BOOT_S + 100.0, BOOT_S + 113.0, WallTimeFacts(), is_running=True
        )

    assert time.seconds["idle"] == 0
    assert sum(time.seconds.values()) == pytest.approx(time.wall_s)


@pytest.mark.parametrize(
    ("opened", "is_running", "part"),
    [
        ({0: "steps", 1: "steps"}, True, "steps"),
        ({0: "checkpoint", 1: "checkpoint"}, True, "checkpoint"),
        ({0: "evaluation", 1: "evaluation"}, True, "evaluation"),
        ({}, True, "idle"),
        ({0: "steps", 1: "steps"}, False, "idle"),
    ],
)
def test_a_long_part_of_a_running_run_is_not_after_the_last_one(
    tmp_path: Path, opened: dict[int, str], is_running: bool, part: str
) -> None:
    """Since the last row, 30 s ago, the ranks are in a step, save or evaluation, where their rows show it."""
    with closing(StoreReader(store(tmp_path / "run") / STORE_NAME)) as reader:
        before, after = (
            wall_time(
                reader.streams(), reader.step_sums(), BOOT_S + 100.0, ended_s, WallTimeFacts(open_parts=opened),
                is_running=is_running,
            )
            for ended_s in (BOOT_S + 112.0, BOOT_S + 142.0)
        )  # fmt: skip

    more = {name: seconds - before.seconds[name] for name, seconds in after.seconds.items()}
    assert {name: round(seconds, 6) for name, seconds in more.items() if abs(seconds) > 1e-6} == {part: 30.0}
    assert after.evaluating_s == pytest.approx(30.0 if part == "evaluation" else 0.0)


def test_compiling_in_the_first_steps_is_start_up(tmp_path: Path) -> None:
    """It is no step, no useful time, and nothing is counted twice."""
    with closing(StoreReader(store(tmp_path / "run") / STORE_NAME)) as reader:
        whole = reader.streams(), reader.step_sums(), BOOT_S + 100.0, BOOT_S + 115.0
        before = wall_time(*whole, WallTimeFacts())
        after = wall_time(*whole, WallTimeFacts(compile_s={0: 3.0, 1: 1.0}))

    assert after.compile_s == pytest.approx(2.0)
    assert after.seconds["startup"] == pytest.approx(before.seconds["startup"] + 2.0)
    assert after.seconds["steps"] == pytest.approx(before.seconds["steps"] - 2.0)
    assert after.useful.productive_s == pytest.approx(before.useful.productive_s - 2.0)
    assert sum(after.seconds.values()) == pytest.approx(15.0)


@pytest.mark.parametrize(
    ("count", "longer", "set_up_s"),
    [(600, {0: 12.0}, 12.0), (40, {0: 12.0}, 12.0), (3, {0: 12.0}, 0.0), (600, dict.fromkeys(range(16), 1.0), 0.0),
     (600, {0: 0.5}, 0.0), (600, {300: 12.0}, 0.0)],
    ids=["first step", "few steps", "too few", "slow at first", "short", "later"],
)  # fmt: skip
def test_what_the_first_step_does_once_is_start_up(
    tmp_path: Path, count: int, longer: dict[int, float], set_up_s: float
) -> None:
    """A kernel is built in the first forward: these seconds are no training. A slow beginning of the training is."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        stream = writer.stream(
            StreamIdentity(0, 0, "h0", 100, 0, ""), state="finished",
            clock=[100 * S, BOOT_S * S + 100 * S], clock_offset_ns=BOOT_S * S, clock_rtt_ns=1000,
        )  # fmt: skip
        rows = np.zeros(count, STEPS.dtype)
        rows["step"], rows["total_ns"] = np.arange(count), S // 100
        for step, seconds in longer.items():
            rows["total_ns"][step] += int(seconds * S)

        rows["t_end_ns"] = 104 * S + np.cumsum(rows["total_ns"])
        writer.append(stream, "steps", 0, count, rows.tobytes(), 0, count - 1)

    whole_s = float(rows["total_ns"].sum()) / S
    with closing(StoreReader(tmp_path / STORE_NAME)) as reader:
        whole = reader.streams(), reader.step_sums(), BOOT_S + 100.0, BOOT_S + 104.0 + whole_s
        found = wall_time(*whole, WallTimeFacts())
        compiled = wall_time(*whole, WallTimeFacts(compile_s={0: set_up_s - 1.0})) if set_up_s else None

    if compiled is not None:  # also where it took longer than all other steps together
        assert (compiled.compile_s, compiled.seconds) == (set_up_s - 1.0, found.seconds)

    assert found.set_up_s == pytest.approx(set_up_s, abs=0.01)
    assert found.seconds["startup"] == pytest.approx(4.0 + set_up_s, abs=0.01)
    assert found.seconds["steps"] == pytest.approx(whole_s - set_up_s, abs=0.01)


@pytest.mark.parametrize(("evaluators", "named", "seconds"), [((0, 1), (), 0.0), ((1,), (1,), 2.0), ((), (), 0.0)])
def test_ranks_that_evaluate_alone(
    tmp_path: Path, evaluators: tuple[int, ...], named: tuple[int, ...], seconds: float
) -> None:
    """They are told with their own time, not the mean of all."""
    folder = store(tmp_path / "run", evaluators=evaluators)
    with closing(StoreReader(folder / STORE_NAME)) as reader:
        found = wall_time(reader.streams(), reader.step_sums(), BOOT_S + 100.0, BOOT_S + 115.0, WallTimeFacts())

    assert (found.evaluators, found.evaluators_s) == (named, pytest.approx(seconds))


@pytest.mark.parametrize(("seconds", "named", "others_s"), [(0.5, (0,), 0.5), (1.5, (), 0.0)])
def test_what_the_other_ranks_evaluate_meanwhile(
    tmp_path: Path, seconds: float, named: tuple[int, ...], others_s: float
) -> None:
    """Rank 0 evaluates for 2 s, and the other one less than half as long, or nearly as long."""
    folder = store(tmp_path / "run", evaluators=(0,))
    with StoreWriter(folder / STORE_NAME) as writer:
        row = np.zeros(1, EVALS.dtype)
        row["step"], row["t_end_ns"], row["ns"], row["batches"] = 40, 110 * S, int(seconds * S), 2
        writer.append(2, "evals", 0, 1, row.tobytes(), 40, 40)

    with closing(StoreReader(folder / STORE_NAME)) as reader:
        found = wall_time(
            reader.streams(), reader.step_sums(), BOOT_S + 100.0, BOOT_S + 115.0, WallTimeFacts(grouped=True)
        )

    assert (found.evaluators, found.others_evaluate_s) == (named, pytest.approx(others_s))


@pytest.mark.parametrize(("grouped", "evaluation", "steps"), [(False, 1.0, 5.4), (True, 2.0, 5.4)])
def test_what_one_rank_evaluates_is_time_of_a_job_whose_ranks_wait(
    tmp_path: Path, grouped: bool, evaluation: float, steps: float
) -> None:
    """The mean over ranks would have half of it, and the waiting of the others as steps or as pauses between them."""
    folder = store(tmp_path / "run", evaluators=(0,))
    with closing(StoreReader(folder / STORE_NAME)) as reader:
        found = wall_time(
            reader.streams(), reader.step_sums(), BOOT_S + 100.0, BOOT_S + 115.0, WallTimeFacts(grouped=grouped)
        )

    assert found.seconds["evaluation"] == pytest.approx(evaluation)
    assert found.seconds["steps"] == pytest.approx(steps)
    assert found.seconds["unexplained"] == pytest.approx(2.0 - evaluation)
    assert sum(found.seconds.values()) == pytest.approx(15.0)


def test_a_rank_that_was_stopped(tmp_path: Path) -> None:
    """Its time is no time of steps; the mean over ranks has half of what one of two was stopped."""
    folder = store(tmp_path / "run")
    before = time_of(folder)[1]
    with StoreWriter(folder / STORE_NAME) as writer:
        add_info(writer, 1, kind="stopped", seconds=2.0, step=30, part="steps")

    after = time_of(folder)[1]
    assert after["stopped"] == pytest.approx(1.0)
    assert after["steps"] == pytest.approx(before["steps"] - 1.0)
