"""HTML elements of the pages. Text is always escaped: nothing here takes HTML from a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from traceml.formatting import code_parts

__all__ = ["EMIT_VALUE", "ChartCard", "Container", "DataTable", "FactList", "Prose", "TextNode", "link", "run_path",
           "search_box", "section", "set_classes", "set_visible", "top_heading", "web_link"]  # fmt: skip

EMIT_VALUE = "(event) => emit(event.target.value)"
"""Handler in the browser that sends the value of an input."""


class TextNode(TextElement):  # type: ignore[misc]  # types are checked without NiceGUI
    """An HTML element that holds text; in names of attributes, `_` stands for `-`."""

    text: str

    def __init__(self, tag: str, text: str = "", classes: str = "", **attributes: Any) -> None:
        super().__init__(tag=tag, text=text)
        _apply(self, classes, attributes)


class Container(ui.element):  # type: ignore[misc]
    """An HTML element that holds others."""

    def __init__(self, tag: str = "div", classes: str = "", **attributes: Any) -> None:
        super().__init__(tag)
        _apply(self, classes, attributes)


class Prose(Container):
    """A text with commands and names of code in it, between backticks."""

    def __init__(self, tag: str, classes: str = "") -> None:
        super().__init__(tag, classes)
        self._prose = ""

    def set_text(self, text: str) -> None:
        """Replace the text."""
        if text == self._prose:
            return

        self._prose = text
        self.clear()
        with self:
            for part, is_code in code_parts(text):
                TextNode("code" if is_code else "span", part)


def section(anchor: str, heading: str, label: str = "") -> Container:
    """Return a section of a page with its heading; `label` names it for screen readers where the heading does not."""
    made = Container("section", "", id=anchor, aria_label=label or heading.lower())
    with made:
        TextNode("h2", heading)

    return made


def top_heading(text: str) -> TextNode:
    """Return the heading of a page that has nothing to show; it is hidden once the page's own `h1` is there."""
    return TextNode("h2", text, role="heading", aria_level="1")


def link(text: str, href: str, classes: str = "") -> TextNode:
    """Return a link to a place on this page's server."""
    return TextNode("a", text, classes, href=href)


def web_link(text: str, href: str) -> TextNode:
    """Return a link to another site, or plain text where the address is not one of the web."""
    if not href.startswith(("https://", "http://")):
        return TextNode("span", text)

    return TextNode("a", text, href=href, target="_blank", rel="noreferrer noopener")


def search_box(words: str, of: str) -> Container:
    """Return a search field that hides what does not contain its words; `page.js` does it.

    Args:
        words: what is searched, for screen readers.
        of: the id of the element whose parts with `data-words` are searched.
    """
    attributes = {"type": "search", "placeholder": f"Search {words}", "aria_label": f"search {words}"}
    return Container("input", "search", data_filter=of, autocomplete="off", **attributes)


def run_path(run_id: str) -> str:
    """Return the address of a run's page."""
    return f"/run/{quote(run_id, safe='')}"


class ChartCard:
    """A titled chart; it keeps its space while it is empty, so that nothing on the page moves.

    Args:
        waiting: text while there is nothing to draw.
        words: what a search field finds the card by; empty if none does.
    """

    def __init__(self, title: str, hint: str = "", *, waiting: str = "", classes: str = "", words: str = "") -> None:
        self._drawn: str | None = None
        attributes = {"data_words": words.lower()} if words else {}
        with Container("section", f"card chart {classes}", aria_label=title, **attributes) as self.card:
            with Container("header"):
                TextNode("h3", title, title=title)  # of a long one the screen shows the beginning
                TextNode("p", hint, "hint")
                _chart_menu(title)

            with Container("div", "plot") as self.plot:
                self._canvas = ui.echart({}).classes("canvas")
                # NiceGUI would set its own, empty option a moment after the browser has drawn ours, and erase it.
                self._canvas._update_method = None
                self._empty = TextNode("p", waiting or "No data", "empty")

            label = f"data of {title}"
            Container("div", "datatable", hidden=True, tabindex="0", role="region", aria_label=label)

    def show(self, option: str | None) -> str | None:
        """Take a chart; return the argument for the browser's `tracemlCharts.draw`, None when it is drawn already.

        Args:
            option: ECharts' option as JSON. It bypasses NiceGUI's properties, which would wrap each number.
        """
        set_visible(self._empty, option is None)
        if option is None or option == self._drawn:
            return None

        self._drawn = option
        return f'"{self._canvas.id}":{option}'

    def height(self, px: int) -> None:
        """Set the height of the drawing."""
        self.plot.style(f"height: {px}px")

    def visible(self, wanted: bool) -> None:
        """Show or hide the card."""
        set_visible(self.card, wanted)


_CHART_ACTIONS = (
    ("full", "Full screen"),
    ("unzoom", "Whole range"),
    ("png", "Save as PNG"),
    ("csv", "Save as CSV"),
    ("table", "Show as table"),
)


def _chart_menu(title: str) -> None:
    """Build the menu of a chart; `charts.js` does what it says."""
    with Container("details", "menu"):
        TextNode("summary", "\N{VERTICAL ELLIPSIS}", aria_label=f"actions of {title}")
        with Container("div"):
            for name, text in _CHART_ACTIONS:
                TextNode("button", text, type="button", data_chart=name)


class FactList:
    """Pairs of label and value, updated in place."""

    def __init__(self, classes: str = "") -> None:
        self._list = Container("dl", f"facts {classes}")
        self._pairs: list[tuple[Container, TextNode, TextNode]] = []

    def show(self, items: Iterable[tuple[str, str]]) -> None:
        """Replace the pairs."""
        count = 0
        for count, (label, value) in enumerate(items, start=1):
            if count > len(self._pairs):
                self._add()

            pair, term, detail = self._pairs[count - 1]
            set_visible(pair, True)
            term.set_text(label)
            detail.set_text(value)
            set_classes(pair, "lines" if "\n" in value else "")

        for pair, _, _ in self._pairs[count:]:
            set_visible(pair, False)

    def _add(self) -> None:
        with self._list, Container("div") as pair:
            self._pairs.append((pair, TextNode("dt"), TextNode("dd")))


class DataTable:
    """A table whose cells are updated in place.

    Args:
        columns: (heading, classes of its cells).
        caption: its content, for screen readers.
        searched: whether a search field finds rows by their texts.
    """

    def __init__(self, columns: Sequence[tuple[str, str]], caption: str, *, searched: bool = False) -> None:
        self._searched = searched
        self._rows: list[tuple[Container, list[TextNode]]] = []
        with (
            Container("div", "scroll", tabindex="0", role="region", aria_label=f"table of {caption}"),
            Container("table"),
        ):
            TextNode("caption", caption, "visually-hidden")
            with Container("thead") as self._head:
                self._columns: list[tuple[str, str]] = []

            self._body = Container("tbody")

        self.columns(columns)

    def columns(self, columns: Sequence[tuple[str, str]]) -> None:
        """Replace the columns."""
        if list(columns) == self._columns:
            return

        self._columns = list(columns)
        self._rows.clear()
        self._body.clear()
        self._head.clear()
        with self._head, Container("tr"):
            for heading, classes in columns:
                TextNode("th", heading, classes, scope="col")

    def show(self, rows: Sequence[Sequence[str]], row_classes: Sequence[str] = ()) -> None:
        """Replace the rows."""
        for number, texts in enumerate(rows):
            if number == len(self._rows):
                self._add()

            row, cells = self._rows[number]
            set_visible(row, True)
            set_classes(row, row_classes[number] if row_classes else "")
            for cell, text in zip(cells, texts, strict=True):
                cell.set_text(text)

            if self._searched and row.props.get("data-words") != (words := " ".join(texts).lower()):
                row.props["data-words"] = words

        for row, _ in self._rows[len(rows) :]:
            set_visible(row, False)

    def _add(self) -> None:
        with self._body, Container("tr") as row:
            self._rows.append((row, [TextNode("td", "", classes) for _, classes in self._columns]))


def _apply(element: ui.element, classes: str, attributes: dict[str, Any]) -> None:
    element.classes(classes)
    for name, value in attributes.items():
        element.props[name.rstrip("_").replace("_", "-")] = value


def set_classes(element: ui.element, classes: str) -> None:
    """Replace the classes of an element."""
    if element.classes != classes.split():
        element.classes(replace=classes)


def set_visible(element: ui.element, wanted: bool) -> None:
    """Show or hide an element."""
    if element.props.get("hidden", False) is wanted:
        element.props["hidden"] = not wanted
