"""A run in a notebook: `traceml.load_run().show()` draws verdict and charts; elsewhere it writes text."""

from __future__ import annotations

import html
import io
import os
import sys
from typing import Any, TextIO

from traceml.database.store.reader import StoreReader
from traceml.diagnosis.findings import Finding
from traceml.errors import StoreError
from traceml.renderers.html.report_page import finding_html, inline_html
from traceml.run_folder import STORE_NAME
from traceml.runs import run as stored
from traceml.runs.report.report import full_report
from traceml.runs.rows.run_summary_reader import read_run_summary
from traceml.runs.rows.series import summary_series

__all__ = ["NotebookRun", "Run", "load_run"]


class NotebookRun(stored.Run):
    """A run on disk, running or ended, made by `load_run`; notebooks draw it.

    Examples:
        >>> run = traceml.load_run()
        >>> print(run.id, run.state, len(run.steps()), len(run.metrics()))
    """

    def show(self, file: TextIO | None = None) -> None:
        """Draw verdict and charts in a notebook; elsewhere write verdict, steps and phases as a few lines of text.

        A running run is shown in its current state.

        Args:
            file: write text to this file.

        Raises:
            StoreError: the store cannot be read.
        """
        if file is not None or getattr(_shell(), "kernel", None) is None:
            super().show(file)
            return

        from IPython.display import display

        page = self._repr_html_()  # first: it makes the report, of which the text is made, too
        text = io.StringIO()
        super().show(text)
        display({"text/html": page, "text/plain": text.getvalue()}, raw=True)

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows for a run at the end of a cell; its text where the store is damaged."""
        try:
            with StoreReader(self.path / STORE_NAME) as reader:
                summary = read_run_summary(reader)
                self._report = full_report(summary, reader, self.path)
                return inline_html(self._report, summary_series(summary, reader))
        except StoreError:
            text = io.StringIO()
            super().show(text)
            return f"<pre>{html.escape(text.getvalue())}</pre>"


Run = NotebookRun
"""The public name, `traceml.Run`."""


def load_run(path: str | os.PathLike[str] | None = None) -> NotebookRun:
    """Return a run, running or ended.

    Examples:
        >>> run = traceml.load_run()
        >>> print(run.verdict.kind, run.verdict.summary)

    Args:
        path: its folder, id or name, the latest where left out; ids and names are those in `runs_dir` of the settings.

    Raises:
        ArgumentTypeError: the path is no text or path.
        RunNotFoundError: there is no such run.
    """
    run = NotebookRun(stored.load_run(path).path)
    if (shell := _shell()) is not None:
        _draw_findings(shell)

    return run


def _draw_findings(shell: Any) -> None:
    """Let a notebook draw `run.verdict` as a card, and a terminal of IPython write it as lines."""
    formatters = shell.display_formatter.formatters
    formatters["text/html"].for_type(Finding, finding_html)
    formatters["text/plain"].for_type(
        Finding, lambda finding, printer, _cycle: printer.text("\n".join(stored.finding_lines(finding)))
    )


def _shell() -> Any:
    """Return IPython's shell of this process; None outside of IPython."""
    ipython: Any = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None
