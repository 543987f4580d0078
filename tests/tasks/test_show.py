"""The picture of the progress, on a terminal and without one."""

from __future__ import annotations

import io
import threading

from rich.console import Console

from tests.tasks.conftest import until
from traceml import Runtime
from traceml.tasks.show import showing, view


def _text(progress: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(view(progress))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_view_counts_and_names_what_runs(rt: Runtime) -> None:
    release = threading.Event()

    def crunch() -> None:
        rt.progress(40)
        release.wait()

    rt.submit(len, "a")
    rt.submit(len, 1)
    rt.submit(crunch)
    until(lambda: (told := rt.get_progress())["running"] == 1 and told["tasks"][-1]["progress_pct"] == 40)
    until(lambda: rt.get_progress()["failed"] == 1)
    text = _text(rt.get_progress())
    release.set()

    assert "2/3, 1 running, 1 failed" in text
    assert "crunch" in text


def test_an_empty_runtime_can_be_shown(rt: Runtime) -> None:
    assert "0/0" in _text(rt.get_progress())


def test_a_terminal_is_drawn_on_until_the_block_ends(rt: Runtime) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with showing(rt, console):
        rt.submit(len, "a").wait()

    assert "1/1" in console.file.getvalue()  # type: ignore[attr-defined]


def test_without_a_terminal_nothing_is_drawn(rt: Runtime, capfd: object) -> None:
    """show() still waits for all tasks."""
    handle = rt.submit(threading.Event().wait, 0.05)
    rt.show()

    assert handle.done()
    assert tuple(capfd.readouterr()) == ("", "")  # type: ignore[attr-defined]
