"""A picture of which workers slow a job down: one cell for each data-parallel rank and pipeline stage."""

from __future__ import annotations

from pathlib import Path

from traceml.errors import UsageError
from traceml.formatting import factor_text
from traceml.installation import install_command
from traceml.whatif.straggler_cost import WhatIf

__all__ = ["draw_heatmap"]

_LOWEST, _HIGHEST = 1.0, 1.5  # slowdowns at the ends of the color scale, as in the paper's figure 14
_LABELED_CELLS = 256


def draw_heatmap(result: WhatIf, path: Path) -> None:
    """Write the scores of workers as a picture.

    Args:
        path: file to write; its suffix chooses the format, `.png` (also without one) or any that Matplotlib writes.

    Raises:
        UsageError: Matplotlib is not installed, or does not write this format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"--heatmap needs Matplotlib: {install_command('whatif')}") from error

    dp_ranks, stages = sorted(result.by_dp_rank), sorted(result.by_stage)
    scores = [[result.by_worker[f"{dp_rank},{stage}"] for dp_rank in dp_ranks] for stage in stages]
    figure = Figure(figsize=(max(4.0, 0.5 * len(dp_ranks) + 2), max(2.5, 0.5 * len(stages) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(scores, cmap="Reds", vmin=_LOWEST, vmax=_HIGHEST, aspect="auto")
    axes.set(xlabel="data-parallel rank", ylabel="pipeline stage")
    axes.set_title(
        f"{result.job.trial_name}: {factor_text(result.slowdown)} as long by stragglers".lstrip(": "), fontsize=10
    )
    axes.set_xticks(range(len(dp_ranks)), [str(each) for each in dp_ranks])
    axes.set_yticks(range(len(stages)), [str(each) for each in stages])
    if len(dp_ranks) * len(stages) <= _LABELED_CELLS:
        middle = (_LOWEST + _HIGHEST) / 2
        for row, line in enumerate(scores):
            for column, score in enumerate(line):
                color = "white" if score > middle else "black"
                axes.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=8, color=color)

    figure.colorbar(image, ax=axes, label="slowdown", extend="both")
    try:
        figure.savefig(path, dpi=150, format=path.suffix[1:] or "png")
    except ValueError as error:
        raise UsageError(f"cannot write {path}: {error}") from error
