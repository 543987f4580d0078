"""Notices of commands on standard error: standard output may be JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from traceml.formatting import printable

__all__ = ["print_left_out", "spinner"]

_SHOWN = 5


@contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """Show that a command works, on a terminal only; yield the function that changes the text."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return

    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(text)) as status:
        yield lambda changed: status.update(Text(changed))


def print_left_out(program: str, messages: Sequence[str]) -> None:
    """Report what could not be read."""
    for message in messages[:_SHOWN]:
        print(printable(f"{program}: left out: {message}"), file=sys.stderr)

    if len(messages) > _SHOWN:
        print(f"{program}: and {len(messages) - _SHOWN} more", file=sys.stderr)
