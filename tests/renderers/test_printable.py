"""What a script calls things does nothing to the terminal of whoever looks at its run."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from tests.diagnosis.fabricated import Job
from tests.renderers.reports import REPORTS, finding, report, straggler
from tests.runs.fabricated_store import store_run
from traceml import cli
from traceml.errors import AgentFailedError, WorkerFailedError
from traceml.renderers.printable import printable_copy
from traceml.renderers.text.card import card
from traceml.renderers.text.comparison import compared_card
from traceml.renderers.text.live_panel import live_lines
from traceml.renderers.text.top_screen import Tab, table_lines
from traceml.renderers.text.top_tables import TableColumn, TableRow, TableView, phases_table, ranks_table
from traceml.renderers.text.trace_analysis import analysis_lines
from traceml.renderers.text.viewport import Viewport
from traceml.renderers.views import run_view
from traceml.runs.comparison.compare import compare_runs
from traceml.runs.report.report_types import Report

# A title, a cleared screen, a question that the terminal answers by typing, a link, a C1 control, text from right to
# left, a line that rewrites itself, a separator of lines.
PAYLOADS = (
    "\x1b]0;PWNED\x07", "\x1b[2J\x1b[31m", "\x1b[6n", "\x1b]8;;http://evil\x1b\\", "\x9b31m", "\u202egnp.exe", "a\rb",
    "\u2066x\u2069", "a\u2028b",
)  # fmt: skip
NASTY = "".join(PAYLOADS)
_HARM = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff]")


def nasty_report(state: str = "failed") -> Report:
    """Return a report in which every text of a script, host or tracker has the payloads."""
    texts = {"summary": f"Phase '{NASTY}' is slow.", "next": f"Look at {NASTY}.", "phase": NASTY}
    worst = straggler(**texts, evidence={NASTY: NASTY})
    made = report(
        [{"forward": 2.0, NASTY: 30.0}, {"forward": 2.0, NASTY: 3.0}],
        worst,
        state=state,
        others=(finding("RANK_LOST", summary=f"Rank 0 ended with RuntimeError: {NASTY}"),),
        exits={0: {"exception": f"RuntimeError: {NASTY}", "open_phase": NASTY, "last_step": 3, "code": 1}},
    )
    made.run.name = made.run.project = made.run.id = NASTY
    made.run.hosts, made.run.command = [NASTY], NASTY
    for rank in made.ranks:
        rank.host = NASTY
        rank.state = "failed"

    return made


def texts(value: object) -> Iterator[str]:
    """Yield every text in a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, known in value.items():
            yield from (key, *texts(known))
    elif isinstance(value, list):
        for known in value:
            yield from texts(known)


def of_console(shown: object) -> str:
    out = io.StringIO()
    Console(file=out, width=100, color_system=None, highlight=False).print(shown, soft_wrap=True)
    return out.getvalue()


def of_table(table: TableView) -> str:
    view = run_view(nasty_report())
    return "\n".join(line.plain for line in table_lines(view, (Tab("t", "t"),), table, 0, Viewport(100, 40)))


def of_panel() -> str:
    return "\n".join(line.plain for line in live_lines(run_view(nasty_report("running")), Viewport(100, 40)))


def values_table() -> TableView:
    """Return a table as of metrics and logs, whose cells come from rows."""
    return TableView("metrics", (TableColumn("name"), TableColumn("text", fills=True)), (TableRow((NASTY, NASTY)),))


SCREENS: dict[str, Callable[[], str]] = {
    "card": lambda: of_console(card(run_view(nasty_report()), Viewport(100, 40))),
    "live view": of_panel,
    "top, ranks": lambda: of_table(ranks_table(run_view(nasty_report()))),
    "top, phases": lambda: of_table(phases_table(nasty_report())),
    "top, metrics and logs": lambda: of_table(values_table()),
    "lost agent": lambda: str(AgentFailedError("node1", "it is gone", words=[NASTY])),
    "failed worker": lambda: str(WorkerFailedError("node1", 0, 0, exit_code=1, log_tail=[NASTY])),
}


@pytest.mark.parametrize("screen", SCREENS)
def test_screens_show_payloads_as_escapes(screen: str) -> None:
    """The terminal obeys nothing; what was tried can be read."""
    shown = SCREENS[screen]()

    assert not _HARM.search(shown)
    assert r"\x1b]0;PWNED" in shown


def test_every_text_of_a_view_is_printable() -> None:
    """Whatever a screen takes from the view is safe; the report itself keeps what the script said."""
    made = nasty_report()
    view = run_view(made)

    assert not any(_HARM.search(text) for text in texts(msgspec.to_builtins(view.report)))
    assert not any(_HARM.search(row.end or "") for row in view.ranks)
    assert made.run.name == NASTY


@pytest.mark.parametrize("name", REPORTS)
def test_a_document_of_plain_texts_is_not_copied(name: str) -> None:
    """A live view asks several times a second, for up to 10,000 ranks."""
    made = REPORTS[name]()

    assert printable_copy(made) == made


def test_ends_of_lines_stay_where_several_lines_are_meant() -> None:
    """A stack has lines; a name with a line of its own could pose as another finding."""
    made = nasty_report()
    made.ranks[0].exit.stack = ["  File 'a'\n    x()\x1b[2J"]
    made.run.name = "train\nHEALTHY"

    shown = printable_copy(made)

    assert shown.ranks[0].exit.stack == ["  File 'a'\n    x()\\x1b[2J"]
    assert shown.run.name == r"train\nHEALTHY"


def test_a_comparison_shows_payloads_as_escapes(tmp_path: Path) -> None:
    """Names of runs, hosts and models, and commands."""
    runs = [store_run(tmp_path / name, Job(steps=60), facts={"name": NASTY, "command": NASTY}) for name in "ab"]

    shown = of_console(compared_card(compare_runs(*runs), Viewport(100, 40)))

    assert not _HARM.search(shown)


def test_an_analysis_shows_payloads_as_escapes() -> None:
    """Names of events are those of the traced program."""
    times = dict.fromkeys(("sum_us", "self_us", "mean_us", "min_us", "max_us", "p50_us", "p99_us"), 1.0)
    result = {"by": ["name"], "groups": [{"name": NASTY, "count": 1, **times}], "events": 1, "spans": 1, "files": []}

    shown = "\n".join(line.plain for line in analysis_lines(result, Viewport(200, 40)))

    assert not _HARM.search(shown)
    assert r"\x1b" in shown


def test_errors_and_lists_of_commands_show_payloads_as_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of a run may have any name, as may an argument."""
    monkeypatch.chdir(tmp_path)
    name = NASTY.replace("/", "")
    store_run(tmp_path / "traceml_runs" / name, Job(steps=60))

    assert cli.main(["runs"]) == 0
    assert cli.main(["report", f"{name}x"]) == 3

    output = capsys.readouterr()
    assert not _HARM.search(output.out + output.err)
    assert "PWNED" in output.out
    assert "PWNED" in output.err
