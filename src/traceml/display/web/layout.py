"""What all pages have: the head of the document, the bar at the top, the banner, the keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from nicegui import ui

from traceml.display.web.chart_cache import THEMES
from traceml.display.web.elements import Container, FactList, TextNode, link, shown
from traceml.renderers.charts.palette import DARK, LIGHT, css_variables

__all__ = ["Banner", "add_head", "draw", "keys_dialog", "theme_of", "top_bar"]

_KEYS = (
    ("1 to 9", "go to a section"),
    ("j, k", "next, previous run in the list"),
    ("/", "search"),
    ("r", "list of runs"),
    ("t", "light or dark"),
    ("?", "this list"),
)


@cache
def _head() -> str:
    static = resources.files("traceml.display.web").joinpath("static")
    style, script = (static.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    colors = f":root{{{css_variables(LIGHT)}}}[data-theme=dark]{{{css_variables(DARK)}}}"
    return f"<style>{colors}\n{style}</style><script>{script}</script>"


def add_head() -> None:
    """Add style sheet and script to the page that is being built."""
    ui.add_head_html(_head())


def theme_of(cookies: dict[str, str]) -> str:
    """Return the theme that this browser had last; `light` for a new one, which then tells its own."""
    theme = cookies.get("traceml_theme", "light")
    return theme if theme in THEMES else "light"


def draw(client: Any, charts: Sequence[str]) -> None:
    """Have a browser draw what `Chart.show` returned."""
    if charts:
        client.run_javascript(f"traceml.draw({{{','.join(charts)}}})")


def top_bar(crumb: str = "", tabs: Sequence[tuple[str, str]] = ()) -> TextNode:
    """Build the bar; return what stands behind the name of the product.

    Args:
        crumb: where we are.
        tabs: (id of a section, its name).
    """
    link("Skip to content", "#content", "skip")
    with Container("div", "top"):
        with Container("div", "bar"):
            link("traceml", "/", "brand")
            said = TextNode("span", crumb, "crumb")
            shown(said, bool(crumb))
            Container("span", "push")
            TextNode("button", "Dark", "tool", id="theme", type="button", title="light or dark (t)")
            TextNode("button", "?", "tool", id="help", type="button", aria_label="keys", title="keys (?)")

        if tabs:
            with Container("nav", "tabs", aria_label="sections"):
                for section, name in tabs:
                    link(name, f"#{section}")

    return said


class Banner:
    """A line below the bar about what is wrong; away while nothing is."""

    def __init__(self) -> None:
        with Container("div", "banner", role="status") as self._block, Container("div"):
            self._words = TextNode("span")

        shown(self._block, False)

    def say(self, text: str) -> None:
        """Say what is wrong, or nothing."""
        self._words.say(text)
        shown(self._block, bool(text))


def keys_dialog() -> None:
    """Build the list of keys, which `?` opens."""
    with Container("dialog", "", id="keys", aria_label="keys"):
        TextNode("h2", "Keys")
        FactList().show((what, key) for key, what in _KEYS)
        TextNode("button", "Close", "tool", id="close-keys", type="button")
