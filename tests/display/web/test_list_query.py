"""The query of the list of runs."""

from __future__ import annotations

from pathlib import Path

from traceml.display.web.runlist.list_query import COLUMNS, PAGE_RUNS, ListQuery
from traceml.runs.find import RunInfo
from traceml.runs.run_query import RunFields


def some(count: int) -> list[RunFields]:
    rest = {"samples_per_second": None, "step_ms": None, "steps": 0, "project": "", "tags": [], "note": "", "user": ""}
    return [
        RunFields(
            RunInfo(Path("/"), f"run-{at}", "n", "finished", at, 1.0, at % 3, None, None, 1, archived=at == 0, **rest)
        )
        for at in reversed(range(count))
    ]


def test_an_address_gives_its_query_back():
    """What is missing or wrong has its default."""
    query = ListQuery("lr<0.1 tag:é", "ranks", True, "state", ("state", "train/loss"), 3, True)
    values = dict(pair.split("=") for pair in query.address.removeprefix("/?").split("&"))

    assert ListQuery.of_address({name: _unquoted(value) for name, value in values.items()}) == query
    assert ListQuery().address == "/"
    assert ListQuery.of_address({"page": "-1", "columns": ",", "sort": "-"}) == ListQuery(reverse=True)


def test_a_page_of_the_list_has_fifty_runs():
    """A page after the last is the last; archived runs are left out."""
    runs = some(121)
    part = ListQuery(page=9).part(runs)

    assert (part.found, part.pages, len(part.runs)) == (120, 3, 20)
    assert ListQuery(archived=True).part(runs).found == 121
    assert len(ListQuery().part(runs).runs) == PAGE_RUNS
    assert ListQuery().is_light
    assert not ListQuery(columns=(*COLUMNS, "lr")).is_light


def test_groups_say_how_many_runs_they_have_on_all_pages():
    """The runs of a group are together, in the order of the list."""
    part = ListQuery(group="ranks").part(some(121))

    assert part.runs[0][0] == "ranks: 0 (40 runs)"
    assert [heading for heading, _ in part.runs] == ["ranks: 0 (40 runs)"] * 40 + ["ranks: 1 (40 runs)"] * 10


def test_conditions_that_are_not_understood_are_reported():
    """The list is shown without them."""
    part = ListQuery(where="lr<1").part(some(3))

    assert part.found == 2
    assert "'lr'" in part.problem


def test_an_order_that_is_not_understood_leaves_conditions_and_groups():
    """As in an address that was written by hand."""
    part = ListQuery(where="ranks<2", sort="nothing", group="ranks").part(some(7))

    assert "'nothing'" in part.problem
    assert [run.info.world_size for _, run in part.runs] == [0, 0, 1, 1]


def test_headings_sort_both_ways_then_not_at_all():
    """A third press gives the newest first again."""
    query = ListQuery().sorted_by("ranks")

    assert (query.sort, query.reverse) == ("ranks", False)
    assert query.sorted_by("ranks").reverse
    assert query.sorted_by("ranks").sorted_by("ranks") == ListQuery()


def _unquoted(value: str) -> str:
    from urllib.parse import unquote_plus

    return unquote_plus(value)
