"""A page without scripts in place of one that is not shown: the token is missing, or there is no such page."""

from __future__ import annotations

from importlib import resources

__all__ = ["notice"]


def notice(status: int, what: str, how: str) -> str:
    """Return the HTML of the page.

    Args:
        status: of the response.
        what: why nothing is shown.
        how: what to do about it, as HTML.
    """
    page = resources.files("traceml.display.web").joinpath("static/notice.html").read_text(encoding="utf-8")
    return page.replace("{{status}}", str(status)).replace("{{what}}", what).replace("{{how}}", how)
