"""First paint of a page: its elements as HTML, which the browser shows until its scripts have built them.

The scripts are a megabyte. Without this HTML the browser shows nothing of a run before it has run them.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from nicegui.elements.mixins.text_element import TextElement

if TYPE_CHECKING:
    from nicegui import Client, ui
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["HasHtml", "with_first_paint"]

# Parts of NiceGUI's template: style sheets that our own replaces, and the element that Vue empties and fills. Where
# another version has none like them, the page is shown later.
_STYLE_SHEET = re.compile(rb'@import url\("[^"]*"\) layer\(\w+\);')
_APP = re.compile(rb'<div id="app"[^>]*>')
_VOID = ("br", "img", "input")
# These do nothing before the scripts run; a click or a key would be lost.
_INERT = {"button": " inert", "input": " inert readonly", "select": " inert"}


@runtime_checkable
class HasHtml(Protocol):
    """An element that a component of its own builds in the browser."""

    def html(self) -> str:
        """Return what the component builds."""


def with_first_paint(client: Client, request: Request) -> Response:
    """Return NiceGUI's response to a request of a page, with the page's elements as HTML in it."""
    response = client.build_response(request)
    if response.headers["content-type"].startswith("text/html"):
        painted = f'<div id="first-paint">{"".join(map(_html, client.content.default_slot.children))}</div>'.encode()
        body = _STYLE_SHEET.sub(b"", bytes(response.body))
        response.body = _APP.sub(lambda found: found[0] + painted, body, count=1)
        response.headers["content-length"] = str(len(response.body))

    return response


def _html(element: ui.element) -> str:
    if isinstance(element, HasHtml):
        return element.html()

    tag, attributes = ("div", {}) if element.component else (element.tag, dict(element.props))
    attributes["class"] = " ".join(element.classes)
    attributes["style"] = "".join(f"{name}:{value};" for name, value in element.style.items())
    start = f"<{tag}{_INERT.get(tag, '')}{''.join(_attribute(*each) for each in attributes.items())}>"
    if tag in _VOID:
        return start

    text = escape(element.text) if isinstance(element, TextElement) else ""
    return f"{start}{text}{''.join(map(_html, element.default_slot.children))}</{tag}>"


def _attribute(name: str, value: object) -> str:
    if value is None or value is False or value == "":
        return ""

    name = name.removeprefix("^")  # NiceGUI's mark of an attribute that Vue sets once
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
