"""The pieces that pages are made of. Text is always text: nothing here takes HTML from a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

__all__ = ["ChartCard", "Container", "DataTable", "FactList", "TextNode", "link", "run_path", "shown"]


class TextNode(TextElement):  # type: ignore[misc]  # NiceGUI is not there when types are checked
    """An HTML element that holds text.

    Args:
        tag: of the element.
        text: what it says.
        classes: of the style sheet.
        attributes: of the element; `_` stands for `-`.
    """

    text: str

    def __init__(self, tag: str, text: str = "", classes: str = "", **attributes: Any) -> None:
        super().__init__(tag=tag, text=text)
        _dress(self, classes, attributes)

    def say(self, text: str) -> None:
        """Say something else."""
        if text != self.text:
            self.text = text

    def look(self, classes: str) -> None:
        """Wear other classes."""
        _look(self, classes)


class Container(ui.element):  # type: ignore[misc]
    """An HTML element that holds others.

    Args:
        tag: of the element.
        classes: of the style sheet.
        attributes: of the element; `_` stands for `-`.
    """

    def __init__(self, tag: str = "div", classes: str = "", **attributes: Any) -> None:
        super().__init__(tag)
        _dress(self, classes, attributes)

    def look(self, classes: str) -> None:
        """Wear other classes."""
        _look(self, classes)


def link(text: str, href: str, classes: str = "") -> TextNode:
    """Return a link to a place on this page's server."""
    return TextNode("a", text, classes, href=href)


def run_path(run_id: str) -> str:
    """Return the address of a run's page."""
    return f"/run/{quote(run_id, safe='')}"


class ChartCard:
    """A titled chart; it keeps its room while there is nothing to draw, so that nothing on the page moves.

    Args:
        title: what it shows.
        hint: how to read it, in a few words.
        waiting: said while there is nothing.
        classes: of the style sheet.
    """

    def __init__(self, title: str, hint: str = "", *, waiting: str = "", classes: str = "") -> None:
        self._drawn: str | None = None
        with Container("section", f"card chart {classes}", aria_label=title) as self.card:
            with Container("header"):
                TextNode("h3", title)
                TextNode("p", hint, "hint")

            with Container("div", "plot") as self.plot:
                self._canvas = ui.echart({}).classes("canvas")
                self._empty = TextNode("p", waiting or "Nothing to show yet", "empty")

    def show(self, option: str | None) -> str | None:
        """Take what is to be drawn; return what the browser's `traceml.draw` is to be given, None when it is drawn.

        Args:
            option: ECharts' option as JSON. It goes around NiceGUI's properties, which would wrap each number.
        """
        shown(self._empty, option is None)
        if option is None or option == self._drawn:
            return None

        self._drawn = option
        return f'"{self._canvas.id}":{option}'

    def height(self, px: int) -> None:
        """Give the drawing this height."""
        self.plot.style(f"height: {px}px")

    def visible(self, wanted: bool) -> None:
        """Show the card, or take it out of the page."""
        shown(self.card, wanted)


class FactList:
    """Pairs of label and value, changed in place.

    Args:
        classes: of the style sheet.
    """

    def __init__(self, classes: str = "") -> None:
        self._list = Container("dl", f"facts {classes}")
        self._pairs: list[tuple[Container, TextNode, TextNode]] = []

    def show(self, items: Iterable[tuple[str, str]]) -> None:
        """Show these pairs and no others."""
        count = 0
        for count, (label, value) in enumerate(items, start=1):
            if count > len(self._pairs):
                self._add()

            pair, term, said = self._pairs[count - 1]
            shown(pair, True)
            term.say(label)
            said.say(value)

        for pair, _, _ in self._pairs[count:]:
            shown(pair, False)

    def _add(self) -> None:
        with self._list, Container("div") as pair:
            self._pairs.append((pair, TextNode("dt"), TextNode("dd")))


class DataTable:
    """A table whose cells are changed in place.

    Args:
        columns: (heading, classes of its cells).
        caption: what it holds, for those who cannot see it.
    """

    def __init__(self, columns: Sequence[tuple[str, str]], caption: str) -> None:
        self._rows: list[tuple[Container, list[TextNode]]] = []
        with Container("div", "scroll", tabindex="0", role="region", aria_label=caption), Container("table"):
            TextNode("caption", caption, "unseen")
            with Container("thead") as self._head:
                self._columns: list[tuple[str, str]] = []

            self._body = Container("tbody")

        self.columns(columns)

    def columns(self, columns: Sequence[tuple[str, str]]) -> None:
        """Have these columns."""
        if list(columns) == self._columns:
            return

        self._columns = list(columns)
        self._rows.clear()
        self._body.clear()
        self._head.clear()
        with self._head, Container("tr"):
            for heading, classes in columns:
                TextNode("th", heading, classes, scope="col")

    def show(self, rows: Sequence[Sequence[str]], looks: Sequence[str] = ()) -> None:
        """Show these rows and no others.

        Args:
            rows: texts of the cells.
            looks: classes of each row.
        """
        for number, texts in enumerate(rows):
            if number == len(self._rows):
                self._add()

            row, cells = self._rows[number]
            shown(row, True)
            row.look(looks[number] if looks else "")
            for cell, text in zip(cells, texts, strict=True):
                cell.say(text)

        for row, _ in self._rows[len(rows) :]:
            shown(row, False)

    def _add(self) -> None:
        with self._body, Container("tr") as row:
            self._rows.append((row, [TextNode("td", "", classes) for _, classes in self._columns]))


def _dress(element: ui.element, classes: str, attributes: dict[str, Any]) -> None:
    element.classes(classes)
    for name, value in attributes.items():
        element.props[name.rstrip("_").replace("_", "-")] = value


def _look(element: ui.element, classes: str) -> None:
    if element.classes != classes.split():
        element.classes(replace=classes)


def shown(element: ui.element, wanted: bool) -> None:
    """Show an element, or take it out of the page."""
    if element.props.get("hidden", False) is wanted:
        element.props["hidden"] = not wanted
