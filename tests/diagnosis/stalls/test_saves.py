"""Facts of checkpoints in their finding."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import MS, Job, adds, window_of
from traceml.database.schema import PAUSES, Pause
from traceml.diagnosis.advice import for_straggler
from traceml.diagnosis.facts.blamed_lines import BlamedLine
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.pauses import PauseHistory
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)


def saves(size_bytes: int = 80 << 20, line: int = 5, files: int = 1) -> PauseHistory:
    rows = np.zeros(11, PAUSES.dtype)
    rows["step"], rows["ns"], rows["count"], rows["cause"] = np.arange(10, 220, 20), int(100 * MS), 1, int(Pause.SAVE)
    rows["size_bytes"], rows["line_id"], rows["text_id"] = size_bytes, line, 6
    pauses = PauseHistory({0: {5: "/x/train.py:93 train", 6: "/data/last.pt"}})
    rows["ns"] //= files
    pauses.add(0, np.repeat(rows, files))
    return pauses


def found(pauses: PauseHistory) -> Finding:
    return diagnose(window_of(ALONE, adds("checkpoint", 100, every=20)), JobFacts(pauses=pauses))[0]


def test_line_size_and_speed_are_reported():
    """The file too, as evidence."""
    finding = found(saves())

    assert finding.kind is Kind.CHECKPOINT_STALLS
    assert "in train.py:93 train (80.0 MiB, 800 MiB/s)" in finding.summary
    assert finding.evidence["target"] == "/data/last.pt"
    assert finding.evidence["bytes_per_s"] == pytest.approx(800 << 20)


def test_files_of_one_save_are_added_up():
    """Model, optimizer and random states, as `save_state` of Accelerate writes them."""
    assert "(120 MiB, 1.17 GiB/s)" in found(saves(size_bytes=40 << 20, files=3)).summary


def test_what_is_not_known_is_left_out():
    """A file that is gone has no size, and a library's call no line."""
    finding = found(saves(size_bytes=-1, line=-1))

    assert " each; without it" in finding.summary
    assert not {"size_bytes", "bytes_per_s", "file"} & set(finding.evidence)


@pytest.mark.parametrize(("function", "is_inside"), [("Net.on_save_checkpoint", True), ("train", False)])
def test_code_of_the_script_inside_a_save_is_named(function: str, *, is_inside: bool) -> None:
    """A hook that a trainer calls takes the time, and not the disk."""
    rows = (("checkpoint", function, 90), ("forward", "main", 210))
    lines = tuple(SampledLine(0, part, "/x/train.py", 40, name, None, count) for part, name, count in rows)
    facts = JobFacts(pauses=saves(), lines=lines)
    finding = diagnose(window_of(ALONE, adds("checkpoint", 100, every=20)), facts)[0]

    assert ("in train.py:93 train, all of it in train.py:40 Net.on_save_checkpoint;" in finding.summary) is is_inside
    assert finding.next.startswith("Make train.py:40 Net.on_save_checkpoint cheaper, or save half as") is is_inside
    assert ("800 MiB/s" in finding.summary) is not is_inside


def test_the_gain_is_that_of_saving_half_as_often():
    """Half of the time is left."""
    finding = found(saves())

    assert finding.speedup_if_fixed == pytest.approx(1 / (1 - finding.cost_share / 2), rel=0.01)
    assert "Save half as often" in finding.next


@pytest.mark.parametrize(("saving", "named"), [((0,), (0,)), (None, ()), ((0, 1), ())])
def test_the_rank_that_alone_saves_is_named(saving, named):
    """The other waits for it: three saves are too few to call it late."""
    finding = diagnose(window_of(Job(steps=190), adds("checkpoint", 400.0, saving, every=60)), JobFacts(world_size=2))[
        0
    ]

    assert (finding.kind, finding.ranks) == (Kind.CHECKPOINT_STALLS, named)
    assert ("steps save on rank 0, for " in finding.summary) is bool(named)


def test_saving_in_the_background_is_not_advised_to_who_does():
    """What is left is the copy that `async_save` makes before it returns."""
    history = saves(size_bytes=-1)
    finding = found(history)
    assert "async_save" in finding.next
    assert "asynchronous" not in finding.evidence

    later = PauseHistory({0: {5: "train.py:93 train", 6: "step.pt"}})
    rows = history.rows(0, Pause.SAVE).copy()
    rows["detail"] = 1
    later.add(0, rows)
    finding = found(later)
    assert "in the background" not in finding.next
    assert "async_save copies all tensors before it returns" in finding.next
    assert finding.evidence["asynchronous"] is True


def test_who_saves_for_all_is_told_to_do_it_less_often():
    """A line that only one rank runs is no riddle where it saves, nor where the samples show it."""
    line = BlamedLine("train.py", 93, "train", share=0.9, samples=40)

    assert for_straggler("checkpoint", (0,), JobFacts(), line).startswith(
        "The others wait while rank 0 saves: save less"
    )
    assert "Find out why rank 0" in for_straggler("other", (0,), JobFacts(), line)

    of_saver = [SampledLine(0, "other", "train.py", 93, "train", None, 30)]
    for samples, is_alone in ((1, True), (20, False)):  # of the others in that function
        of_others = [
            SampledLine(1, "other", "train.py", 93, "train", None, samples),
            SampledLine(1, "comm", "train.py", 80, "main", None, 60 - samples),
        ]
        told = for_straggler("other", (0,), JobFacts(lines=(*of_saver, *of_others)), line)
        assert told.startswith("Only rank 0 spends time in train.py:93 train: do it less often") == is_alone


@pytest.mark.parametrize("part", ["comm", "other"])
def test_ranks_that_save_one_after_the_other_lose_the_time_of_all(part):
    """Each of three waits for the two others; where it runs other code in that step, it waits for nobody."""
    window = window_of(Job(ranks=3, steps=220), adds("checkpoint", 100, every=20))
    long = window.times["checkpoint"].any(axis=0)
    for times in (window.times[part], window.total, *([window.wait] if part == "comm" else [])):
        times[:, long] += 200 * MS

    finding = next(each for each in diagnose(window, JobFacts(world_size=3)) if each.kind is Kind.CHECKPOINT_STALLS)

    in_turns = part == "comm"
    assert ("one rank after the other, for 30" in finding.summary) == in_turns
    assert ("Or save on all ranks at the same time" in finding.next) == in_turns
    assert finding.cost_share == pytest.approx((15 if in_turns else 5) / window.total.mean() * MS, rel=0.1)
