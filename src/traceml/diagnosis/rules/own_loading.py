"""Loading that the training process does by itself, whatever the number of workers: the order of the samples."""

from __future__ import annotations

from traceml.diagnosis.facts.job_facts import JobFacts, LoaderFacts
from traceml.diagnosis.facts.sampled_lines import NAMED_SHARE, BlamedLine, main_library, ordering_share
from traceml.diagnosis.rules.epoch_starts import begins_each_step
from traceml.diagnosis.rules.loading_advice import Advised
from traceml.diagnosis.steps.loading import Pipeline, fetch_cpu
from traceml.formatting import count_text, gain_text

__all__ = ["of_new_iterators", "of_sampler"]

COMPUTES = 0.5
"""A training process that waits for its workers computes for a smaller share of the time."""
_PART = "input_wait"


def of_new_iterators(facts: JobFacts, pipeline: Pipeline | None) -> Advised | None:
    """Return advice on an iterator in each step, which orders all samples for one batch; None where it is not that.

    Args:
        facts: about the job.
        pipeline: its loading; None where it is not known.
    """
    loader = facts.loader or LoaderFacts()
    share = ordering_share(facts.lines)
    if loader.num_workers or pipeline is None or share < NAMED_SHARE or not begins_each_step(facts.epochs):
        return None

    gain = pipeline.gain_with(1 - share)
    samples = f"{count_text(loader.length)} samples" if loader.length else "samples"
    return Advised(
        f"Keep one iterator of the loader: iter(loader) in each step draws a new order of all {samples}, for one "
        f"batch; {gain_text(gain, 'about')}.",
        gain,
    )


def of_sampler(facts: JobFacts, line: BlamedLine | None) -> Advised | None:
    """Return advice on a sampler that the workers wait for; None where the training process only waits.

    Args:
        facts: about the job.
        line: line of the user's code in which the training process was seen meanwhile.
    """
    if facts.loader is None or not facts.loader.num_workers or line is None:
        return None

    computes = fetch_cpu(facts)
    if computes is None or computes < COMPUTES or _receives(main_library(facts.lines, _PART, line)):
        return None

    return Advised(
        "The sampler runs in the training process, so more workers will not help: make "
        f"{line.place} cheaper, or draw the indices of many batches at once."
    )


def _receives(called: str | None) -> bool:
    """Whether a library function takes batches from the workers, and does not order samples."""
    return called is not None and called.startswith(("_MultiProcessing", "_BaseDataLoader", "Connection", "rebuild_"))
