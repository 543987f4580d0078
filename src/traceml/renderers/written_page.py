"""Written pages: nothing is loaded, and no script runs but our own, should a text ever be markup."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from traceml.renderers.charts.palette import DARK, LIGHT, css_variables

__all__ = ["content_policy", "static_text", "written_page"]


def written_page(title: str, rules: str, body: str, script: str = "") -> str:
    """Return a page with the colors of both themes; printed, it is light.

    Args:
        title: as HTML.
        rules: of the style sheet.
        script: the only script that may run; empty for none.
    """
    light, dark = css_variables(LIGHT), css_variables(DARK)
    style = f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{rules}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{content_policy(script)}"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{style}</style></head>"
        f"<body>{body}{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


@cache
def static_text(name: str) -> str:
    """Return a style sheet or a script of the pages."""
    return (Path(__file__).parent / "html" / "static" / name).read_text(encoding="utf-8")


def content_policy(script: str = "") -> str:
    """Return the `meta` element of a page's head, before anything else in it that counts.

    Args:
        script: the only script that may run; empty for none.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"script-src 'sha256-{digest}'; " if script else ""
    policy = (
        f"default-src 'none'; {scripts}style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
