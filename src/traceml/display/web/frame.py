"""What all pages have: the head of the document, the bar at the top, the banner, the keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from nicegui import ui

from traceml.display.web.drawn import THEMES
from traceml.display.web.parts import Block, Facts, Words, link, shown
from traceml.renderers.palette import DARK, LIGHT, css_variables

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


def top_bar(crumb: str = "", tabs: Sequence[tuple[str, str]] = ()) -> Words:
    """Build the bar; return what stands behind the name of the product.

    Args:
        crumb: where we are.
        tabs: (id of a section, its name).
    """
    link("Skip to content", "#content", "skip")
    with Block("div", "top"):
        with Block("div", "bar"):
            link("traceml", "/", "brand")
            said = Words("span", crumb, "crumb")
            shown(said, bool(crumb))
            Block("span", "push")
            Words("button", "Dark", "tool", id="theme", type="button", title="light or dark (t)")
            Words("button", "?", "tool", id="help", type="button", aria_label="keys", title="keys (?)")

        if tabs:
            with Block("nav", "tabs", aria_label="sections"):
                for section, name in tabs:
                    link(name, f"#{section}")

    return said


class Banner:
    """A line below the bar about what is wrong; away while nothing is."""

    def __init__(self) -> None:
        with Block("div", "banner", role="status") as self._block, Block("div"):
            self._words = Words("span")

        shown(self._block, False)

    def say(self, text: str) -> None:
        """Say what is wrong, or nothing."""
        self._words.say(text)
        shown(self._block, bool(text))


def keys_dialog() -> None:
    """Build the list of keys, which `?` opens."""
    with Block("dialog", "", id="keys", aria_label="keys"):
        Words("h2", "Keys")
        Facts().show((what, key) for key, what in _KEYS)
        Words("button", "Close", "tool", id="close-keys", type="button")
