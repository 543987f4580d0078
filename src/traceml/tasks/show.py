"""The progress of a Runtime, drawn on a terminal while it works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from traceml.tasks.runtime import Runtime

__all__ = ["showing", "view"]

_LINES = 8  # running tasks with a line of their own
_WIDTH = 40


@contextmanager
def showing(runtime: Runtime, console: Console | None = None) -> Iterator[None]:
    """Draw the progress of a Runtime while a block runs; nothing where there is no terminal.

    Args:
        runtime: whose tasks.
        console: where to; standard error when None, as what a program says on standard output is its own.
    """
    from rich.console import Console
    from rich.live import Live

    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield
        return

    with Live(get_renderable=lambda: view(runtime.get_progress()), console=console, refresh_per_second=8):
        yield


def view(progress: dict[str, Any]) -> RenderableType:
    """Make a picture of what `get_progress()` returned: all tasks together, and the running ones."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    ended = progress["total"] - progress["running"] - progress["queued"]
    bar = ProgressBar(total=max(1, progress["total"]), completed=ended, width=_WIDTH)
    table.add_row(Text("all tasks", style="bold"), bar, Text(_words(progress, ended)))
    for task in [one for one in progress["tasks"] if one["state"] == "running"][:_LINES]:
        pct = task["progress_pct"]
        line = ProgressBar(total=100, completed=pct, width=_WIDTH, pulse=pct == 0)
        table.add_row(Text(task["name"]), line, Text(f"{task['execution_duration_ms'] / 1e3:.1f} s"))

    return table


def _words(progress: dict[str, Any], ended: int) -> str:
    counts = [(progress[state], state.replace("_", " ")) for state in ("running", "failed", "timed_out", "cancelled")]
    return ", ".join([f"{ended}/{progress['total']}", *(f"{count} {word}" for count, word in counts if count)])
