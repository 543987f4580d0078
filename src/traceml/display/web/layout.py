"""Parts of every page: document head, list of keys, top bar, banner."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from nicegui import ui

from traceml.display.web.chart_cache import THEMES
from traceml.display.web.elements import Container, TextNode, link, set_visible
from traceml.renderers.charts.palette import DARK, LIGHT, css_variables

__all__ = ["Banner", "add_head", "draw", "theme_of", "top_bar"]

_THEME_COOKIES = ("traceml_theme", "traceml_chosen_theme")  # the last theme, and the one that the user has chosen
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
    names = ("page.css", "charts.js", "page.js")
    style, charts, script = (static.joinpath(name).read_text(encoding="utf-8") for name in names)
    colors = f":root{{{css_variables(LIGHT)}}}[data-theme=dark]{{{css_variables(DARK)}}}"
    return f"<style>{colors}\n{style}</style><script>{charts}\n{script}</script>"


# The list of keys that `?` opens: the same on every page, so it is no part of what NiceGUI builds for each visit.
_KEYS_DIALOG = f"""
<dialog id="keys" aria-label="keys">
  <h2>Keys</h2>
  <dl class="facts">{"".join(f"<div><dt>{what}</dt><dd>{key}</dd></div>" for key, what in _KEYS)}</dl>
  <button class="tool" id="close-keys" type="button">Close</button>
</dialog>
"""


def add_head(cookies: Mapping[str, str]) -> None:
    """Add style sheet, script and the list of keys to the page that is being built."""
    themes = {name: cookies[name] for name in _THEME_COOKIES if cookies.get(name) in THEMES}
    ui.add_head_html(f"<script>tracemlCookies={json.dumps(themes)}</script>{_head()}")
    ui.add_body_html(_KEYS_DIALOG)


def theme_of(cookies: dict[str, str]) -> str:
    """Return the theme that this browser used last; `light` for a new one, which then reports its own."""
    theme = cookies.get(_THEME_COOKIES[0], "light")
    return theme if theme in THEMES else "light"


def draw(client: Any, charts: Iterable[str | None]) -> None:
    """Make a browser draw what `ChartCard.show` returned."""
    if new := [chart for chart in charts if chart is not None]:
        client.run_javascript(f"tracemlCharts.draw({{{','.join(new)}}})")


def top_bar(crumb: str = "", tabs: Sequence[tuple[str, str]] = ()) -> tuple[TextNode, Container]:
    """Build the bar; return the text next to the product name, and the links to sections.

    Args:
        crumb: that text: the run shown.
        tabs: id and name of each section.
    """
    link("Skip to content", "#content", "skip")
    with Container("div", "top"):
        with Container("div", "bar"):
            link("traceml", "/", "brand")
            crumb_node = TextNode("span", crumb, "crumb")
            set_visible(crumb_node, bool(crumb))
            Container("span", "spacer")
            TextNode("button", "Dark", "tool", id="theme", type="button", title="light or dark (t)")
            TextNode("button", "?", "tool", id="help", type="button", aria_label="keys", title="keys (?)")

        with Container("nav", "tabs", aria_label="sections") as sections:
            for section, name in tabs:
                link(name, f"#{section}")

    set_visible(sections, bool(tabs))
    return crumb_node, sections


class Banner:
    """A line below the bar for problems, hidden while there is none."""

    def __init__(self) -> None:
        with Container("div", "banner", role="status") as self._block, Container("div"):
            self._text = TextNode("span")

        set_visible(self._block, False)

    def show(self, text: str) -> None:
        """Show a problem, or hide the banner for an empty text."""
        self._text.set_text(text)
        set_visible(self._block, bool(text))
