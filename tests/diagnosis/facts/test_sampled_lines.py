"""Rows of samples, summed by line."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.database.schema import LINE_OTHER, LINE_OUTSIDE, LINE_THREADS, LINE_WORKERS, LINES, Phase
from traceml.diagnosis.facts.sampled_lines import MAX_LOADERS, LazyWorkerLines, LineCounts, SampledLine


def test_rows_are_summed_by_line():
    """Rows of one line and phase are added up; texts come from the rank's names."""
    rows = np.zeros(3, LINES.dtype)
    rows["phase"], rows["line_id"], rows["library_id"] = [LINE_OTHER, LINE_OTHER, Phase.FORWARD], [4, 4, 4], [-1, -1, 5]
    rows["samples"] = [3, 4, 1]
    names = {1: {4: "/home/my project/train.py:12 Net.forward", 5: "/x/torch/nn/linear.py:3 Linear.forward"}}
    counts = LineCounts(names)
    counts.add(1, rows)

    assert counts.lines() == (
        SampledLine(1, "other", "/home/my project/train.py", 12, "Net.forward", None, 7),
        SampledLine(1, "forward", "/home/my project/train.py", 12, "Net.forward", names[1][5], 1),
    )
    names.clear()
    assert counts.lines()[0].file is None  # a name that has not arrived


def test_rows_of_other_threads_are_apart():
    """They are no samples of the training."""
    rows = np.zeros(3, LINES.dtype)
    rows["phase"], rows["line_id"], rows["library_id"] = [LINE_OTHER, LINE_THREADS, LINE_THREADS], [4, 5, 5], -1
    rows["samples"], rows["watched_ns"], rows["cpu_ns"] = [3, 1, 1], [0, 250, 300], [0, 200, 100]
    counts = LineCounts({1: {4: "/x/train.py:12 train", 5: "/x/train.py:3 watch"}})
    counts.add(1, rows)

    (thread,) = counts.of_other_threads()

    assert [(each.part, each.function) for each in counts.lines()] == [("other", "train")]
    assert (thread.function, thread.samples, thread.watched_ns, thread.cpu_ns) == ("watch", 2, 550, 300)


def test_rows_of_loader_workers_are_apart():
    """They are added up over the workers, and are no samples of the training or of its threads."""
    rows = np.zeros(3, LINES.dtype)
    rows["phase"], rows["line_id"], rows["samples"] = [LINE_WORKERS, LINE_OTHER, LINE_WORKERS], [5, 4, 5], [9, 3, 2]
    counts = LineCounts({1: {4: "/x/train.py:12 train", 5: "/x/data.py:3 decode"}})
    counts.add(1, rows)

    ((worker,),) = counts.of_workers().values()

    assert (worker.part, worker.function, worker.samples) == ("workers", "decode", 11)
    assert [each.function for each in counts.lines()] == ["train"]
    assert counts.of_other_threads() == ()


def test_of_many_loaders_the_newest_are_kept() -> None:
    """A script may make others for each epoch: what is kept of a run does not grow with them."""
    counts = LineCounts({0: {5: "/x/data.py:3 decode"}})
    for number in range(MAX_LOADERS + 9):
        row = np.zeros(1, LINES.dtype)
        row["phase"], row["line_id"], row["samples"] = LINE_WORKERS - number, 5, 1
        counts.add(0, row)

    assert sorted(LazyWorkerLines(counts)) == list(range(9, MAX_LOADERS + 9))


S = 1_000_000_000


def rows(seconds: int, step: int, *lines: tuple[int, int]) -> np.ndarray:
    """Return rows of ten samples that were counted to a time: the open step, and phase and line of each."""
    made = np.zeros(len(lines), LINES.dtype)
    made["t_ns"], made["step"], made["samples"] = seconds * S, step, 10
    made["phase"], made["line_id"] = zip(*lines, strict=True)
    return made


@pytest.mark.parametrize("step", [65, 66, -1], ids=["between steps", "in a step", "at the end of the process"])
def test_what_runs_after_the_last_step_has_no_part_in_its_phases(step):
    """Step 65 ends after 8 s; of the five seconds in which it does, it is not known what was seen after it."""
    counts = LineCounts(NAMES)
    for flushed in (rows(5, 30, (LINE_OTHER, 1)), rows(10, 65, (LINE_OTHER, 1), (LINE_OTHER, 2))):
        counts.add(0, flushed)

    for seconds in range(15, 500, 5):
        counts.add(0, rows(seconds, step, (LINE_OTHER, 2), (LINE_OUTSIDE, 3)))

    found = {(each.part, each.line): each.samples for each in counts.lines([8 * S])}

    assert found == {("other", 1): 20, ("other", 2): 10, ("outside", 3): 970}


def test_what_runs_after_the_last_step_of_an_ended_run_has_its_own_part():
    """While the run goes on, it may be the next step."""
    counts = LineCounts(NAMES)
    for flushed in (rows(5, 65, (LINE_OTHER, 1)), rows(10, -1, (LINE_OTHER, 2), (LINE_OUTSIDE, 3))):
        counts.add(0, flushed)

    running, ended = (counts.lines([6 * S], has_ended=has_ended) for has_ended in (False, True))

    assert {(each.part, each.line) for each in running} == {("other", 1), ("outside", 3)}
    assert {(each.part, each.line) for each in ended} == {("other", 1), ("after", 2), ("after", 3)}
    assert all(each.part != "after" for each in counts.lines([0], has_ended=True))  # without any step


@pytest.mark.parametrize(("evaluated_s", "part"), [(0, "after"), (6, "after"), (18, "outside")])
def test_only_what_follows_the_last_evaluation_is_after_the_training(evaluated_s, part):
    """A script evaluates once it has trained, until 6 s or 18 s, and then computes its statistics."""
    counts = LineCounts(NAMES)
    for flushed in (rows(5, 65, (LINE_OTHER, 1)), rows(10, 65, (LINE_OUTSIDE, 2)), rows(20, -1, (LINE_OUTSIDE, 3))):
        counts.add(0, flushed)

    if evaluated_s:
        counts.evaluated(0, evaluated_s * S)

    found = {each.line: each.part for each in counts.lines([5 * S], has_ended=True)}
    without_steps = {each.line: each.part for each in counts.lines([0], has_ended=True)}

    assert found == {1: "other", 2: part, 3: part}
    assert without_steps[3] == "outside"


def test_what_hangs_soon_after_samples_were_sent_has_no_part_in_the_steps():
    """Nearly all of the five seconds in which step 65 ended are after it."""
    counts = LineCounts(NAMES)
    for flushed in (rows(5, 65, (LINE_OTHER, 1)), rows(10, 65, (LINE_OTHER, 2))):
        counts.add(0, flushed)

    assert [each.line for each in counts.lines([6 * S])] == [1]


def test_samples_of_a_step_count_when_the_next_one_has_begun():
    """Steps may take longer than it takes to send samples, which come in one call or in several."""
    counts = LineCounts(NAMES)
    counts.add(0, np.concatenate([rows(5, 4, (LINE_OTHER, 1)), rows(10, 5, (LINE_OTHER, 1))]))
    counts.add(0, rows(15, 5, (LINE_OTHER, 1)))
    assert [each.samples for each in counts.lines([8 * S])] == [20]

    counts.add(0, rows(20, 6, (LINE_OTHER, 1)))
    assert [each.samples for each in counts.lines([18 * S])] == [40]


def test_samples_count_by_the_time_that_they_stand_for():
    """The first ones are denser: a line that runs in the second half of a run has half of it, not a sixth."""
    counts = LineCounts(NAMES)
    for seconds, number in ((5, 5), (10, 5), (15, 1), (20, 1)):
        flushed = rows(seconds, 10 * seconds, (LINE_OTHER, 1 + seconds // 13), (LINE_OUTSIDE, 3))
        flushed["samples"] *= number
        counts.add(0, flushed)

    found = {(each.part, each.line): each.samples for each in counts.lines([20 * S])}

    assert found == {("other", 1): 60, ("other", 2): 60, ("outside", 3): 120}


@pytest.mark.parametrize("last", [200, -1], ids=["in a step", "at the end of the process"])
def test_lines_of_some_steps_are_told_from_those_of_the_others(last):
    """By the steps in which most of an interval is; what is counted after the last step is in neither."""
    counts = LineCounts(NAMES)
    for seconds, step, line in ((5, 60, 1), (10, 110, 1), (15, 160, 2), (20, last, 2), (60, last, 3)):
        counts.add(0, rows(seconds, step, (LINE_OTHER, line)))

    slow, usual = counts.divided([199], [20 * S], range(105, 1 << 62))

    assert [(each.line, each.samples) for each in slow] == [(2, 20)]
    assert [(each.line, each.samples) for each in usual] == [(1, 20)]
    assert counts.divided([], [], range(105, 200)) == ((), ())


def test_lines_apart_from_a_step_are_of_times_in_which_it_was_not_open():
    """Not those of the second in which it began, nor of that in which it ended."""
    counts = LineCounts(NAMES)
    for seconds, step, line in ((5, 60, 1), (10, 110, 2), (15, 110, 2), (20, 160, 3), (25, 210, 1)):
        counts.add(0, rows(seconds, step, (LINE_OTHER, line)))

    assert [(each.line, each.samples) for each in counts.apart_from([210], [30 * S], {110})] == [(1, 20)]
    assert counts.apart_from([], [], {110}) == ()


def test_many_intervals_are_joined():
    """Ten thousand seconds have no more intervals than some, and the same samples."""
    counts = LineCounts(NAMES)
    for step in range(1, 2001):
        counts.add(0, rows(5 * step, step, (LINE_OTHER, 1 + step // 1001)))

    slow, usual = counts.divided([2000], [10_000 * S], range(1000, 1 << 62))

    assert sum(each.samples for each in (*slow, *usual)) == pytest.approx(20_000, abs=10)
    assert sum(each.samples for each in slow if each.line == 2) == pytest.approx(10_000, rel=0.05)


NAMES = {0: {number: f"/x/train.py:{number} step" for number in (1, 2, 3)}}
