"""Sentences about ranks whose data ended before that of the others, and what is no such hang."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.diagnosis.hangs.standing import TORCH, call, found, group, in_backward, line, snapshot
from traceml.database.snapshots.rank_snapshot import FrameSnapshot, RankSnapshot
from traceml.diagnosis.facts.ends import RankExit


def in_barrier(rank: int, number: int = 15, **known: object) -> RankSnapshot:
    """Return a snapshot of a rank that has left its loop and waits in a barrier."""
    return snapshot(rank, call("barrier"), line(40), phase="comm", groups=(group(number, "barrier"),), **known)


ENDED = in_barrier(1, batches=51, epoch=1, data_ended=True)
GOES_ON = in_backward(0, batches=52, epoch=1)


def test_the_numbers_of_batches_are_told():
    """Instead of different code paths, which is only what follows from it."""
    finding = found(GOES_ON, ENDED)

    assert finding is not None
    assert finding.summary == (
        "Rank 1 never reached all_reduce #15: its data ended (51 batches, the others 52), and it has been in "
        "barrier #15 (train.py:40 main) for 75 s; rank 0 waits for it in all_reduce #15 in backward (train.py:28 main)."
    )
    assert finding.next.startswith("Give each rank the same number of batches")
    assert finding.headline == "The data of rank 1 ended, and the others wait"
    assert (finding.ranks, finding.evidence["cause"]) == ((1,), "data_ended")
    assert (finding.evidence["batches"], finding.evidence["batches_of_others"]) == (51, 52)


def test_a_rank_in_join_answers_no_collective_of_the_script():
    """It has ended early, as it may: the advice to use Join would be none."""
    shadow = FrameSnapshot(file=f"{TORCH}/distributed/algorithms/join.py", line=240, function="Join.__exit__")
    joined = snapshot(
        1, call("all_reduce"), shadow, line(8), phase="comm", groups=(group(15, "all_reduce"),), batches=30, epoch=1,
        data_ended=True,
    )  # fmt: skip
    waiting = snapshot(0, call("barrier"), line(13), phase="comm", groups=(group(15, "barrier"),), batches=40, epoch=1)
    finding = found(waiting, joined)

    assert finding is not None
    assert finding.evidence["cause"] == "data_ended"
    assert finding.next.startswith("Move collectives of the script out of `with Join(...)`")


def test_ranks_that_can_never_meet_hang_at_once():
    """As with different operations."""
    assert found(*(replace(each, quiet_s=7.0) for each in (GOES_ON, ENDED))) is not None


UNREAD = {"groups": ()}


@pytest.mark.parametrize("unread", [(0,), (1,), (0, 1)])
def test_a_rank_whose_collective_could_not_be_read_in_time_waits_all_the_same(unread: tuple[int, ...]) -> None:
    """Its line and its data are known. They may meet yet, as far as is known, so this takes the usual time."""
    seen = [replace(each, **UNREAD) if each.rank in unread else each for each in (GOES_ON, ENDED)]
    finding = found(*seen)

    assert finding is not None
    assert (finding.ranks, finding.evidence["cause"]) == ((1,), "data_ended")
    assert "its data ended (51 batches, the others 52), and it has been in barrier" in finding.summary
    assert finding.summary.endswith("in backward (train.py:28 main).")
    assert found(*(replace(each, quiet_s=7.0) for each in seen)) is None


def test_a_rank_in_join_may_answer_a_collective_that_could_not_be_read():
    """Then its data is no reason: all may be in the same collective."""
    shadow = FrameSnapshot(file=f"{TORCH}/distributed/algorithms/join.py", line=240, function="Join.__exit__")
    joined = replace(ENDED, frames=(call("all_reduce"), shadow, line(8)), groups=(group(15, "all_reduce"),))
    finding = found(replace(GOES_ON, **UNREAD), joined)

    assert finding is not None
    assert finding.evidence["cause"] == "unanswered"


def test_what_the_rank_does_after_its_data_is_told_too():
    """It is not in a collective: it may still come, so this takes the usual time."""
    asleep = snapshot(1, line(50, "save"), batches=51, epoch=1, data_ended=True, wchan="hrtimer_nanosleep",
                      groups=(group(14, "all_reduce", flying=False),))  # fmt: skip
    finding = found(GOES_ON, asleep)

    assert finding is not None
    assert (
        "its data ended (51 batches, the others 52), and it has been in train.py:50 save, sleeping" in finding.summary
    )
    assert found(*(replace(each, quiet_s=7.0) for each in (GOES_ON, asleep))) is None


def test_several_ranks_are_told_with_the_least_and_most():
    """Of both sides."""
    finding = found(
        replace(GOES_ON, groups=(group(15, "all_reduce", members=(0, 1, 2, 3)),)),
        *(replace(ENDED, rank=rank, batches=48 + rank, groups=(group(15, "barrier", members=(0, 1, 2, 3)),))
          for rank in (1, 2)),
        in_backward(3, batches=54, epoch=1, groups=(group(15, "all_reduce", members=(0, 1, 2, 3)),)),
        ranks=4,
    )  # fmt: skip

    assert finding is not None
    assert finding.summary.startswith(
        "Ranks 1, 2 never reached all_reduce #15: their data ended (49 to 50 batches, the others 52 to 54), and they "
        "have been in barrier #15"
    )
    assert finding.ranks == (1, 2)


@pytest.mark.parametrize(
    ("goes_on", "ended"),
    [
        (GOES_ON, replace(ENDED, data_ended=False)),  # it has more batches, and called another operation
        (GOES_ON, replace(ENDED, batches=52)),  # the same number
        (GOES_ON, replace(ENDED, batches=-1)),  # an iterator was left early
        (replace(GOES_ON, batches=-1), ENDED),  # the others have no loader
        (replace(GOES_ON, data_ended=True), ENDED),  # all have left their loops
        (replace(GOES_ON, epoch=2), ENDED),  # the others are in the next epoch, and came past this one
    ],
)
def test_other_ranks_call_different_collectives(goes_on: RankSnapshot, ended: RankSnapshot) -> None:
    """The data does not explain it."""
    finding = found(goes_on, ended)

    assert finding is not None
    assert finding.evidence["cause"] == "mismatch"
    assert "data ended" not in finding.summary
    assert "batches" not in finding.evidence


def test_a_rank_that_saves_after_an_epoch_has_no_fewer_data():
    """The others are in the next epoch already."""
    saves = snapshot(1, line(50, "save"), batches=52, epoch=1, data_ended=True,
                     groups=(group(14, "all_reduce", flying=False),))  # fmt: skip
    finding = found(replace(GOES_ON, batches=53, epoch=2), saves)

    assert finding is not None
    assert finding.evidence["cause"] == "never_came"


def test_a_stuck_rank_is_named_before_one_without_data():
    """Rank 2 sleeps; that rank 1 has left its loop is not what they wait for."""
    of_all = group(15, "all_reduce", members=(0, 1, 2))
    finding = found(
        replace(GOES_ON, groups=(of_all,)),
        replace(ENDED, groups=(group(15, "barrier", members=(0, 1, 2)),)),
        snapshot(2, line(6, "stuck"), batches=52, epoch=1, groups=(replace(of_all, number=14, in_flight=False),)),
        ranks=3,
    )

    assert finding is not None
    assert (finding.ranks, finding.evidence["cause"]) == ((2,), "never_came")


@pytest.mark.parametrize(
    ("known", "is_told"),
    [
        ({"batches": 51, "epoch": 1, "data_ended": True}, True),
        ({"batches": 51, "epoch": 1, "data_ended": False}, False),  # it left its loop
        ({}, False),
    ],
)
def test_the_data_of_a_rank_that_has_ended_is_told(known: dict[str, int], is_told: bool) -> None:
    """Its script has ended by itself after its loop, and the others wait."""
    ended = RankExit(rank=1, state="finished", code=0, last_step=39, **known)
    finding = found(GOES_ON, exits=(ended,))

    assert finding is not None
    assert finding.summary.startswith("Rank 1's script ended after 40 steps")
    assert finding.evidence["cause"] == ("data_ended" if is_told else "ended")
    assert ("The data of rank 1 had ended (51 batches, the others 52)." in finding.summary) is is_told
    assert finding.next.startswith("Give each rank the same number" if is_told else "If the data ended there, give")
    assert found(replace(GOES_ON, quiet_s=7.0), exits=(ended,)) is not None
