"""Samples and tokens that the whole job trains on in a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from traceml.diagnosis.findings import significant
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.step_split import Floats
from traceml.runs.report.report_types import StepsSection
from traceml.runs.rows.run_summary_reader import RunSummaryReader
from traceml.runs.rows.step_totals import StepTotals

__all__ = ["put_batch_sizes"]

_MOST = 0.9
_KNOWN = 0.95
_DISTINCT_SHARE = 0.1  # accumulation and the last batches of epochs make few sizes
_FEW_SIZES = 3  # in a run of a few steps


def put_batch_sizes(
    section: StepsSection, summary: RunSummaryReader, steps: AlignedSteps | StepTotals, counts: Sequence[int]
) -> None:
    """Set the samples and tokens of a mean step of the job, where they are known.

    Args:
        section: where they are set.
        counts: number of steps by rank: one with less data ends before the others.
    """
    batches, ranks = summary.facts_builder.batches, steps.ranks.tolist()
    distinct = batches.distinct_ranks(ranks)
    rows = [ranks.index(rank) for rank in distinct]
    samples, elements = _by_rank(steps.samples, steps), _by_rank(steps.elements, steps)
    if not rows or not samples.size or not samples[rows].all() or not _are_known(summary) or _are_parts(summary):
        return

    section.data_ranks = len(distinct)
    has_step = np.array([counts[rank] for rank in distinct]) / section.count
    if batches.batch_first:
        section.samples_per_step = significant(float(samples[rows] @ has_step))
    if batches.tokens:
        section.tokens_per_step = significant(float(elements[rows] @ has_step))


def _are_known(summary: RunSummaryReader) -> bool:
    """Return whether nearly all steps have a size: in the others the model's parts may have been called alone."""
    samples = summary.all_aligned().samples
    return not samples.size or bool((samples > 0).mean() >= _KNOWN)


def _are_parts(summary: RunSummaryReader) -> bool:
    """Return whether the input's first dimension counts parts of samples, as the nodes of a batch of graphs.

    The loader's batches have a fixed size, and most inputs are larger than one and of different sizes.
    """
    loader, samples = summary.facts_builder.build().loader, summary.all_aligned().samples
    if loader is None or not loader.batch_size or not samples.size:
        return False

    larger = samples > loader.batch_size
    sizes = np.unique(samples[larger])
    return bool(larger.mean() > _MOST and len(sizes) > max(_FEW_SIZES, _DISTINCT_SHARE * samples.shape[1]))


def _by_rank(values: Floats, steps: AlignedSteps | StepTotals) -> Floats:
    """Return the mean of each rank's steps; of a window, of those whose batch is known."""
    count = np.count_nonzero(values, axis=1) if isinstance(steps, AlignedSteps) else steps.count.sum(axis=1)
    return np.asarray(values.sum(axis=1, dtype=np.float64) / np.maximum(count, 1))
