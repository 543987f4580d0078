"""A comparison on a terminal."""

from __future__ import annotations

import io

import pytest
from msgspec.structs import replace
from rich.console import Console

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import store_run
from traceml.renderers.text.compared_runs import compared_runs
from traceml.renderers.text.comparison import (
    change_text,
    compared_card,
    compared_headline,
    compared_sentences,
    delta_text,
    interval_text,
    step_changes,
)
from traceml.renderers.text.viewport import ASCII, Viewport
from traceml.runs.comparison.compare import compare_runs
from traceml.runs.comparison.comparison_types import Comparisons, ParamChange, StatisticChange


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "a": store_run(folder / "a", Job(steps=200), seed=1),
        "again": store_run(folder / "again", Job(steps=200), seed=5),
        "slow": store_run(folder / "slow", Job(steps=200), adds("forward", 5, (1,)), seed=2),
        "short": store_run(folder / "short", Job(steps=12), seed=2),
        "wide": store_run(folder / "wide", Job(ranks=20, steps=200), seed=2),
        "stage": store_run(
            folder / "stage", Job(ranks=20, steps=200), adds("forward", 5, (*range(10, 15), 17)), seed=3
        ),
    }


@pytest.fixture
def compared(runs):
    return lambda a, b: compare_runs(runs[a], runs[b])


def _shown(comparison, width):
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False)
    console.print(compared_card(comparison, Viewport(width, 40, ASCII)), soft_wrap=True)
    return out.getvalue()


def test_a_slower_run_is_reported_in_words(compared):
    """The text has the change, its confidence, rank and phase, and the new verdict."""
    comparison = compared("a", "slow")
    said = compared_sentences(comparison)

    assert compared_headline(comparison).startswith("B is slower: a step takes ")
    assert "With 99 % confidence" in said[0]
    assert said[1].startswith("Rank 1's own work grew by 4.97 ms")
    assert "forward" in said[1]
    assert said[2] == "The verdict went from HEALTHY to COMPUTE_STRAGGLER."


def test_a_faster_run_names_the_rank_that_was_mended(compared):
    """Not the communication in which the other ranks waited for it; no rank where all changed alike."""
    assert compared_sentences(compared("slow", "a"))[1].startswith(
        "Rank 1's own work fell by 4.97 ms, most of it in forward; the others waited for it in A."
    )
    assert not any("own work" in sentence for sentence in compared_sentences(compared("slow", "slow")))


def test_all_ranks_whose_work_has_changed_are_named(compared):
    """As those of a stage or a switch: the others wait for all of them."""
    slower, faster = compared_sentences(compared("wide", "stage")), compared_sentences(compared("stage", "wide"))

    assert slower[1].startswith("The own work of ranks 10-14, 17 grew by 5.0")
    assert slower[1].endswith(" ms, most of it in forward; the others wait for them.")
    assert faster[1].startswith("The own work of ranks 10-14, 17 fell by 5.0")
    assert faster[1].endswith("; the others waited for them in A.")


def test_other_batches_are_compared_by_sample(compared):
    """Headline, phase and table speak of samples; ranks, whose work is of a step, are not blamed."""
    comparison = compared("a", "slow")
    comparison.a.samples_per_step, comparison.b.samples_per_step = 10, 20
    comparison.sample_time = StatisticChange(a_ms=1.5, b_ms=1.0, change=-1 / 3, low=-0.4, high=-0.2, p=0.001, real=True)
    comparison.outcome = "faster"

    assert compared_headline(comparison) == "B is faster: a sample takes 1.50 ms -> 1.00 ms (-33 %)"
    assert (
        compared_sentences(comparison)[0] == "With 99 % confidence the change is between -40 % and -20 % (p = 0.001)."
    )
    assert "less per sample" in compared_sentences(comparison)[1]
    assert "per sample       1.50 ms   1.00 ms     -33 %  yes, p = 0.001" in _shown(comparison, 80)


def test_a_table_tells_changes_of_a_sample_from_those_of_a_step(compared):
    """The mean step, which stands beside it, may have changed the other way."""
    each = [compared("a", "slow"), compared("a", "again")]
    each[0].sample_time = StatisticChange(a_ms=1.5, b_ms=1.0, change=-1 / 3, low=-0.4, high=-0.2, p=0.001, real=True)
    out = io.StringIO()
    table = compared_runs(Comparisons(baseline="a", comparisons=each), Viewport(80, 40, ASCII))
    Console(file=out, width=80, color_system=None).print(table)

    heading, _, slow, again = out.getvalue().splitlines()[:4]
    assert " -33 %/sample  " in slow
    assert "/sample" not in again
    assert slow.index("/sample") + len("/sample") == heading.index("change") + len("change")


def test_a_phase_is_blamed_where_no_rank_is(runs, tmp_path):
    """When all ranks got slower in the same part, the part is named."""
    all_slow = store_run(tmp_path / "all", Job(steps=200), adds("forward", 5), seed=2)

    assert any("forward: 5." in line for line in compared_sentences(compare_runs(runs["a"], all_slow)))


def test_no_difference_is_no_difference(compared):
    """A difference by chance is not significant."""
    assert compared_headline(compared("a", "again")).startswith("No significant difference")


def test_what_is_left_out_is_counted(compared):
    """One by one; of a rank without a change, no part of it is named."""
    same = replace(compared("wide", "wide"), params=[ParamChange(name=f"p{n}", a=1, b=2) for n in range(9)])
    shown = _shown(replace(same, ranks=same.ranks[:7]), 100)

    assert " and 1 rank that changed less: --json has all\n" in shown
    assert " and 1 other parameter: --json has all\n" in shown
    assert "most in" not in shown
    assert " most in forward" in _shown(compared("a", "slow"), 100)


def test_what_cannot_be_told_is_not(compared):
    """With too few steps or different world sizes there is no result."""
    assert compared_headline(compared("a", "short")).startswith("Too few steps")
    assert compared_headline(compared("a", "wide")).startswith("A and B are not comparable")


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("pair", [("a", "slow"), ("a", "wide"), ("a", "short")], ids="-".join)
def test_it_fits_the_terminal(compared, pair, width):
    """No line is wider than the terminal, nor than 100 columns, in plain ASCII; a figure that is cut shows it."""
    shown = _shown(compared(*pair), width)

    assert max(len(line) for line in shown.splitlines()) <= min(width, 100)
    assert shown.isascii()
    whole = {line for line in _shown(compared(*pair), 100).splitlines() if line.startswith((" mean ", " p"))}
    table = [line for line in shown.splitlines() if line.startswith((" mean ", " p"))]
    assert [line for line in table if line not in whole and not line.endswith("...")] == []


@pytest.mark.parametrize("width", [60, 70, 80, 200])
def test_the_table_of_several_runs_has_their_verdicts(compared, width):
    """Whole, where the ids of the runs leave no room: these are cut in the middle."""
    each = [compared("a", "slow"), compared("a", "again")]
    for side in (side for comparison in each for side in (comparison.a, comparison.b)):
        side.id = "20260101-000000-train-abcd"

    found = Comparisons(baseline="a", comparisons=each)
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(compared_runs(found, Viewport(width, 40, ASCII)))

    _, *rows = out.getvalue().splitlines()[:4]
    assert [row.split()[-1] for row in rows] == ["HEALTHY", "COMPUTE_STRAGGLER", "HEALTHY"]
    assert all("abcd " in row and len(row) <= width for row in rows)
    assert ("..." in rows[0]) == (width < 79)


@pytest.mark.parametrize(
    ("change", "text"),
    [(0.042, "+4.2 %"), (-0.123, "-12 %"), (2.1, "3.1x"), (None, "-"), (0.0, "0 %"), (-0.0004, "0 %")],
)
def test_changes_as_text(change, text):
    """Percent up to a doubling, factors beyond."""
    assert change_text(change) == text


@pytest.mark.parametrize(("ms", "text"), [(4.95, "+4.95 ms"), (-0.114, "-114 us"), (0.0, "0 us"), (-0.0, "0 us")])
def test_differences_of_times_as_text(ms, text):
    """What is the same has no sign."""
    assert delta_text(ms) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (-0.03, 0.042, "-3.0 % and +4.2 %"),
        (-1.0, 1.04, "0x and 2.04x"),
        (3.8, 4.2, "4.8x and 5.2x"),
        (None, None, "-"),
    ],
)
def test_both_ends_of_an_interval_have_one_unit(low, high, text):
    """Percent, or factors where the upper end is a doubling."""
    assert interval_text(low, high) == text


def test_changes_of_a_table_have_one_unit():
    """Factors where one of them, or an end of an interval, is a doubling."""
    small = StatisticChange(a_ms=10.0, b_ms=9.0, change=-0.1, low=-0.2, high=0.0, p=0.001, real=True)
    wide = StatisticChange(a_ms=10.0, b_ms=4.0, change=-0.6, low=-0.9, high=2.0, p=0.2, real=False)

    assert step_changes([small]) == [("-10 %", "-20 % and 0 %")]
    assert step_changes([small, wide]) == [("0.9x", "0.8x and 1x"), ("0.4x", "0.1x and 3x")]
