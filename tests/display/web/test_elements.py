"""Elements of the pages."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace
from nicegui import Client, ui

from tests.renderers.reports import healthy
from traceml.display.web.elements import Prose, TextNode
from traceml.display.web.run_page import RunPage
from traceml.display.web.run_sources import RunState
from traceml.display.web.runs_page import RunsPage
from traceml.display.web.verdict_card import VerdictCard
from traceml.renderers.views import run_view
from traceml.runs.runs_source import RunsState


def test_commands_in_a_text_are_code() -> None:
    """Not between backticks, which are for terminals, and once; a text that is shown already is not built again."""
    with Client(ui.page("/elements"), request=None):
        prose = Prose("p", "summary")
        prose.set_text("Run `traceml stacks` <b>.")
        built = [(each.tag, each.text) for each in prose.default_slot.children]
        first = prose.default_slot.children[0]
        prose.set_text("Run `traceml stacks` <b>.")
        own_text = prose._to_dict().get("text")  # what browsers are sent

    assert own_text is None
    assert built == [("span", "Run "), ("code", "traceml stacks"), ("span", " <b>.")]
    assert prose.default_slot.children[0] is first


def test_commands_in_the_notes_of_a_verdict_are_code() -> None:
    """As in its sentences: steps that are not stored are told with the command that stores them."""
    made = healthy()
    view = run_view(replace(made, run=replace(made.run, steps_waiting=3)))
    with Client(ui.page("/verdict"), request=None) as client:
        VerdictCard().show(view)
        shown = [(each.tag, each.text) for each in client.elements.values() if isinstance(each, TextNode)]

    assert ("code", "traceml sync") in shown
    assert not any("`" in text for _, text in shown)


def test_a_run_that_is_not_read_yet_is_not_described() -> None:
    """Its empty parts would say that nothing was logged, recorded and sampled."""
    with Client(ui.page("/unread"), request=None) as client:
        page = RunPage(client, Path("run"), "light")
        unread = [each for each in client.elements.values() if "unread" in each.classes]
        hidden = {each.text for each in unread[0].descendants() if isinstance(each, TextNode)}
        shown = {each.text for each in client.elements.values() if isinstance(each, TextNode)} - hidden
        page.show(RunState("run", view=run_view(healthy())))

    assert "Reading the run ..." in shown
    assert not any("was logged" in text or "No lines" in text for text in shown)
    assert "unread" not in unread[0].classes


def test_a_list_that_is_not_read_yet_is_not_empty() -> None:
    with Client(ui.page("/unread-list"), request=None) as client:
        page = RunsPage(client, Path("runs"), {}, bool)
        shown = {each.text for each in client.elements.values() if isinstance(each, TextNode) and _is_visible(each)}
        page.show(RunsState(runs=()))
        later = {each.text for each in client.elements.values() if isinstance(each, TextNode) and _is_visible(each)}

    assert "Reading the runs ..." in shown
    assert not shown & {"No runs yet", "No run meets these conditions."}
    assert "No runs yet" in later


def _is_visible(element: ui.element) -> bool:
    return not any(each.props.get("hidden") for each in (element, *element.ancestors()))
