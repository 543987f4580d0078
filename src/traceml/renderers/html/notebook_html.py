"""A run in a notebook cell: verdict and charts as HTML without scripts, light and dark."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from traceml.diagnosis.findings import Finding
from traceml.renderers.charts.figures import figures
from traceml.renderers.charts.palette import DARK, LIGHT, css_variables
from traceml.renderers.html.report_page import chart_grid, run_line, sample_line, verdict_card
from traceml.renderers.views import run_view
from traceml.runs.report.report_types import Report
from traceml.runs.rows.series import RunSeries

__all__ = ["finding_html", "inline_html"]

# A notebook's own dark theme, which need not be the system's: JupyterLab, VS Code, Colab.
_DARK_GROUNDS = ('[data-jp-theme-light="false"]', ".vscode-dark", "html[theme=dark]")


def inline_html(report: Report, series: RunSeries) -> str:
    """Return the HTML fragment."""
    view = run_view(report)
    body = "".join(
        [
            *run_line(view),
            verdict_card(view.verdict, with_evidence=False),
            f'<p class="sub">{line}</p>' if (line := sample_line(view)) else "",
            *chart_grid(figures(view, series)),
        ]
    )
    return _fragment(body)


def finding_html(finding: Finding) -> str:
    """Return the HTML fragment of one finding, with its numbers."""
    return _fragment(verdict_card(finding))


def _fragment(body: str) -> str:
    # The light colors are set on the element itself: a notebook that removes style sheets still shows the charts.
    return f'<style>{_style_sheet()}</style><div class="tm-shown" style="{css_variables(LIGHT)}">{body}</div>'


@cache
def _style_sheet() -> str:
    rules = (Path(__file__).parent / "static" / "inline.css").read_text(encoding="utf-8")
    dark = css_variables(DARK).replace(";", "!important;")
    return rules + "".join(f"{ground} .tm-shown{{{dark}}}" for ground in _DARK_GROUNDS)
