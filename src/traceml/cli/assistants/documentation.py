"""Pages of the documentation that commands show: packed into the wheel, in `docs/` of a checkout."""

from __future__ import annotations

import re
from pathlib import Path

from traceml.errors import TraceMLError

__all__ = ["kind_text", "page_text"]

_PACKED = Path(__file__).parent / "pages"
_CHECKOUT = Path(__file__).parents[4] / "docs"
_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


def page_text(name: str) -> str:
    """Return a page of the documentation.

    Args:
        name: its file name, such as `verdicts.md`.

    Raises:
        TraceMLError: the installation does not have it.
    """
    for folder in (_PACKED, _CHECKOUT):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")

    raise TraceMLError(f"the page {name} is missing in this installation: install traceml-torch again")


def kind_text(kind: str) -> str | None:
    """Return when a kind of finding is raised, and its details; None where the rules have no section of it.

    Args:
        kind: name of the kind, in capitals.
    """
    page = page_text("verdicts.md")
    section = re.search(rf"^### .*`{re.escape(kind)}`.*\n((?:(?!#).*\n)*)", page, re.MULTILINE)
    return None if section is None else _LINK.sub(r"\1", " ".join(section.group(1).split()))
