"""Elements of the pages."""

from __future__ import annotations

from nicegui import Client, ui

from traceml.display.web.elements import Prose


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
