"""Ranks that stand for others of their host, in the window of the rules."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, rows_of
from traceml.diagnosis.steps.kept_steps import KeptSteps
from traceml.diagnosis.steps.representatives import ExcessWork, HostChoice, Representatives, packed_ms

ROWS = rows_of(Job(ranks=8, steps=60))


def choice(host: str = "a", typical: int = 0, sent: tuple[int, ...] = (0,), **facts) -> HostChoice:
    """Return a choice of a host with the ranks 0 to 3, or 4 to 7."""
    ordinary = (0, 1, 2, 3) if host == "a" else (4, 5, 6, 7)
    return HostChoice(**{"host": host, "typical": typical, "ordinary": ordinary, "sent": sent, **facts})


def kept_of(*ranks: int, steps: int = 60) -> KeptSteps:
    kept = KeptSteps(128, 8)
    for rank in ranks:
        kept.scatter(np.full(steps, rank), ROWS[rank][:steps])

    return kept


def above(first_step: int, *values_ns: float) -> ExcessWork:
    return ExcessWork(first_step, packed_ms(np.array(values_ns, np.float32)))


def test_a_choice_passes_as_plain_data():
    """With the steps at which ranks have ended."""
    sent = choice(ended=(3,), ended_at=(17,))

    got = HostChoice.from_row(sent.to_row())

    assert got.is_same(sent)
    assert got.ended_at == (17,)


@pytest.mark.parametrize("row", [None, 7, [], ["a", 0, [0], [0], []], ["a", 0, 5, [0], [], []]])
def test_what_is_no_choice_is_refused(row):
    """A peer may send anything."""
    with pytest.raises(ValueError, match="the choice of a host cannot be read"):
        HostChoice.from_row(row)


@pytest.mark.parametrize("row", [None, 7, [], [0], [-1, b""], [2**62, b""], [0, "text"], [0, b"", 1], ["0", b""]])
def test_what_is_no_work_beyond_that_of_a_typical_rank_is_refused(row):
    """A peer may send anything."""
    with pytest.raises(ValueError, match="the own work beyond the typical rank's cannot be read"):
        ExcessWork.from_row(row)


def test_a_window_without_merged_hosts_has_no_representatives():
    """As in the aggregator of all ranks."""
    kept = kept_of(0, 1)

    assert not kept.representatives
    assert kept.aligned().represents == {}
    assert kept.reached().tolist() == kept.latest.tolist()


def test_typical_ranks_stand_for_ordinary_ones():
    """Not for those that have rows of their own."""
    kept = kept_of(0, 2, 4)
    kept.representatives.take(choice(sent=(0, 2)))
    kept.representatives.take(choice("b", 4, (4,)))

    assert kept.aligned().represents == {0: (0, 1, 3), 4: (4, 5, 6, 7)}
    assert kept.reached().tolist() == [59] * 8


def test_only_other_ranks_are_a_change():
    """The same choice again is none: it is not stored."""
    representatives = Representatives()

    assert representatives.take(choice())
    assert not representatives.take(choice())
    assert representatives.take(choice(sent=(0, 1)))


def test_the_longest_work_of_the_others_is_known_by_step():
    """To 0.1 %; 0 if it is not, and of ranks that stand for nobody."""
    kept = kept_of(0, 2)
    kept.representatives.take(choice(sent=(0, 2)))
    kept.representatives.add("a", ExcessWork.from_row(above(58, 5e6, np.nan).to_row()))

    aligned = kept.aligned(last=3)

    assert aligned.steps.tolist() == [57, 58, 59]
    np.testing.assert_allclose(aligned.excess_of_represented, [[0, 5e6, 0], [0, 0, 0]], rtol=1e-3)


def test_a_choice_like_the_one_before_stays_that_one() -> None:
    """A host sends its choice every second: what was derived from an equal one need not be made again."""
    representatives = Representatives()
    representatives.take(choice())
    kept = representatives.choice_of("a")

    assert not representatives.take(choice())
    assert representatives.choice_of("a") is kept

    assert not representatives.take(choice(ended_at=(31,)))
    assert representatives.choice_of("a") is not kept


def test_work_of_many_seconds_and_hosts_is_put_into_its_steps():
    """However much comes between two verdicts, and whatever a host sends again."""
    kept = kept_of(0, 4)
    for host, typical in (("a", 0), ("b", 4)):
        kept.representatives.take(choice(host, typical, (typical,)))

    for first_step in (0, *range(200)):
        kept.representatives.add("a", above(first_step % 60, 1e6 * (1 + first_step // 60)))
        kept.representatives.add("b", above(first_step % 60, 8e6))

    aligned = kept.aligned(last=2)
    assert aligned.steps.tolist() == [58, 59]
    np.testing.assert_allclose(aligned.excess_of_represented, [[3e6, 3e6], [8e6, 8e6]], rtol=1e-3)


def test_another_typical_rank_has_other_work_beyond_its_own():
    """What came for the one before is dropped; so is that of a host that is not known."""
    kept = kept_of(0, 1)
    kept.representatives.add("a", above(59, 5e6))
    kept.representatives.take(choice())
    kept.representatives.add("a", above(59, 6e6))
    kept.representatives.take(choice(typical=1, sent=(1,)))

    assert kept.aligned(last=1).excess_of_represented.tolist() == [[0]]

    kept.representatives.add("a", above(59, 7e6))
    np.testing.assert_allclose(kept.aligned(last=1).excess_of_represented, [[7e6]], rtol=1e-3)


def test_ranks_that_are_not_sent_any_more_do_not_hold_up_the_others():
    """Rank 2 differed for a while: its rows end, and the typical rank stands for it."""
    kept = kept_of(0, 4)
    kept.scatter(np.full(20, 2), ROWS[2][:20])
    kept.representatives.take(choice())
    kept.representatives.take(choice("b", 4, (4,)))

    assert kept.aligned(last=5).ranks.tolist() == [0, 4]
    assert kept.aligned(last=5).steps.tolist() == [55, 56, 57, 58, 59]
    assert kept.reached()[2] == 59


def test_hosts_out_of_reach_are_not_compared_until_they_are_back():
    """Their ranks are missing, also those that their typical rank stands for."""
    kept = kept_of(0, 4)
    kept.representatives.take(choice())
    kept.representatives.take(choice("b", 4, (4,)))
    kept.representatives.mark_unreachable("b")

    aligned = kept.aligned()

    assert (aligned.ranks.tolist(), aligned.missing_ranks) == ([0], (4,))
    assert kept.reached(aligned.missing_ranks).tolist() == [59, 59, 59, 59, 59, -1, -1, -1]
    kept.representatives.take(choice("b", 4, (4,)))
    assert kept.aligned().ranks.tolist() == [0, 4]


def test_ended_ranks_have_their_last_step():
    """Also where none of their rows was sent, and although the typical rank goes on."""
    kept = kept_of(0)
    kept.representatives.take(choice(ordinary=(0, 1, 2), ended=(3,), ended_at=(31,)))

    assert kept.reached().tolist()[:4] == [59, 59, 59, 31]


def test_chosen_ranks_are_json():
    """Exports write events as JSON."""
    sent = choice(ended=(3,), ended_at=(17,))

    assert HostChoice.from_row(json.loads(json.dumps(sent.to_row()))).is_same(sent)
