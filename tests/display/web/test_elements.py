"""Elements of the pages."""

from __future__ import annotations

from msgspec.structs import replace
from nicegui import Client, ui

from tests.renderers.reports import healthy
from traceml.display.web.elements import Prose, TextNode
from traceml.display.web.verdict_card import VerdictCard
from traceml.renderers.views import run_view


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
