"""Notices of commands on standard error: standard output may be JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from traceml.fail_open import print_notice
from traceml.formatting import printable

if TYPE_CHECKING:
    from traceml.settings import Config

__all__ = ["print_left_out", "print_unused_address", "spinner"]

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


def print_unused_address(config: Config, program: str) -> None:
    """Say that a program with an aggregator of its own does not use the one whose address was set."""
    if config.quiet or config.supervised or not config.address_given:
        return

    settings = [name for name in ("host", "port") if config.sources.get(name, "default") != "default"]
    sources = " and ".join(f"{name}={getattr(config, name)} ({config.sources[name]})" for name in settings)
    print_notice(
        printable(
            f"traceml: not used: {sources}. `{program}` stores the run itself. To store it by the aggregator there, "
            "start the script without this command, with TRACEML=1"
        )
    )
