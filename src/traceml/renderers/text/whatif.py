"""Cost of stragglers in a job, as sentences and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.text import Text

from traceml.formatting import count_text, factor_text, ms_text, percent_text, printable
from traceml.renderers.text.bars import bar
from traceml.renderers.text.card import wrapped_lines
from traceml.renderers.text.viewport import Viewport
from traceml.whatif.straggler_cost import WhatIf

__all__ = ["what_if_lines"]

_MAX_WIDTH = 100
_ROWS = 8
_LABEL, _SCORE = 28, 8


def what_if_lines(result: WhatIf, viewport: Viewport) -> Iterator[Text]:
    """Yield the lines that show a result: the cause, step times, and the slowdown of each group alone."""
    width = min(viewport.width, _MAX_WIDTH)
    yield Text(f"Stragglers make a step {factor_text(result.slowdown)} as long.", style="bold")
    yield from wrapped_lines(printable(result.cause), width)
    yield Text()
    yield from _facts(result)
    for title, scores in _tables(result):
        yield Text()
        yield from _table(title, scores, width, viewport)


def _facts(result: WhatIf) -> Iterator[Text]:
    job = result.job
    left_out = f" ({count_text(result.steps_left_out)} with other operations left out)" if result.steps_left_out else ""
    if job.trial_name:
        yield _fact("job", printable(job.trial_name))

    yield _fact("ranks", f"{job.world_size:,}: data {job.dp_size} x pipeline {job.pp_size} x tensor {job.tp_size}")
    yield _fact("steps", f"{count_text(result.steps)}{left_out}")
    yield _fact("step, recorded", ms_text(1e3 * result.recorded_step_s))
    yield _fact("step, simulated", ms_text(1e3 * result.simulated_step_s))
    yield _fact("step without stragglers", ms_text(1e3 * result.ideal_step_s))
    yield _fact("explained by the worst 3 %", _share(result.worker_share))
    yield _fact("explained by the last stage", _share(result.stage_share))


def _fact(label: str, text: str) -> Text:
    return Text(label.ljust(_LABEL), style="dim").append(text, style="not dim")


def _share(share: float | None) -> str:
    return "-" if share is None else percent_text(min(max(share, 0.0), 1.0))


def _tables(result: WhatIf) -> Iterator[tuple[str, Mapping[str, float]]]:
    yield "Kind of operation alone", {printable(kind): score for kind, score in result.by_optype.items()}
    yield "Data-parallel rank alone", {f"dp rank {number}": score for number, score in result.by_dp_rank.items()}
    yield "Stage alone", {f"stage {number}": score for number, score in result.by_stage.items()}
    yield "Worker", {f"dp rank {worker.replace(',', ', stage ')}": score for worker, score in result.by_worker.items()}


def _table(title: str, scores: Mapping[str, float], width: int, viewport: Viewport) -> Iterator[Text]:
    shown = list(scores.items())[:_ROWS]
    most = max((score - 1 for score in scores.values()), default=0.0)
    yield Text(title.ljust(_LABEL), style="dim").append("slowdown".rjust(_SCORE))
    for label, score in shown:
        line = Text(label[: _LABEL - 1].ljust(_LABEL)).append(f"{score:>{_SCORE}.3f}  ")
        share = max(score - 1, 0.0) / most if most > 0 else 0.0
        yield line.append_text(bar(share, width - _LABEL - _SCORE - 2, viewport, style="red"))

    if len(scores) > len(shown):
        yield Text(f"and {len(scores) - len(shown):,} more: --json lists all", style="dim")
