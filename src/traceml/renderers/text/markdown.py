"""Parts of Markdown documents: tables, and texts of users that mean nothing in Markdown or HTML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

__all__ = ["markdown_code", "markdown_table", "plain_markdown"]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table; the cells after the first are aligned to the right.

    Args:
        head: names of the columns, as Markdown.
        rows: texts of the cells; a code span is kept.
    """
    yield _line(head)
    yield _line(["---", *["---:"] * (len(head) - 1)])
    yield from (_line([_cell(cell) for cell in row]) for row in rows)


def plain_markdown(text: str) -> str:
    """Return a text without meaning in Markdown or HTML: names and values are the user's."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#~" else sign for sign in text)


def markdown_code(text: str) -> str:
    """Return the content of a code span."""
    return text.replace("`", "'")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Return a text that stays in its cell; a code span is kept."""
    return text.replace("|", "\\|") if text.startswith(("`", "A `")) else plain_markdown(text)
