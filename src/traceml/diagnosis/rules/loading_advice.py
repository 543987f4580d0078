"""Advice against waiting for data, and what following it gains."""

from __future__ import annotations

from typing import NamedTuple

from traceml.diagnosis.facts.job_facts import JobFacts, LoaderFacts
from traceml.diagnosis.steps.loading import Pipeline
from traceml.formatting import cores_text, gain_text, percent_text, plural

__all__ = ["Advised", "for_input"]

CHEAP_SAMPLE_NS = 50e3
"""A sample that is fetched in less time was in memory: workers would only add copies."""
WORTHWHILE = 1.05
"""Advice with a smaller gain is not given."""
_WHOLE_BATCH = 0.1  # a batch that is taken by one index costs this share of single samples


class Advised(NamedTuple):
    """Advice on loading.

    Attributes:
        text: what to do.
        gain: old / new step time if it is done; None where that is not known.
        workers: advised number of loader workers; None where the advice is another.
    """

    text: str
    gain: float | None = None
    workers: int | None = None


def for_input(facts: JobFacts, pipeline: Pipeline | None) -> Advised:
    """Return advice against waiting for data.

    Args:
        facts: about the job.
        pipeline: its loading; None where the waits are pauses.
    """
    loader = facts.loader or LoaderFacts()
    if pipeline is None:
        return _against_pauses(loader)

    if loader.num_workers is None:
        return _prefetch(pipeline)

    if pipeline.worker_cores and pipeline.gain_on_all_cores() >= WORTHWHILE:
        return _all_cores(pipeline, pipeline.worker_cores)

    if is_in_memory(loader, pipeline):
        return _whole_batches(loader, pipeline)

    cores = _on(pipeline, facts)
    return _more_workers(loader, pipeline, cores) or _cheaper_samples(loader, pipeline, cores)


def is_in_memory(loader: LoaderFacts, pipeline: Pipeline) -> bool:
    """Return whether samples are in memory, and fetching one costs next to nothing."""
    per_sample_ns = pipeline.fetch_ns / (loader.batch_size or 1)
    return bool(loader.in_memory) and per_sample_ns <= CHEAP_SAMPLE_NS


def _against_pauses(loader: LoaderFacts) -> Advised:
    if loader.num_workers and not loader.persistent_workers:
        return Advised(
            "Set persistent_workers=True in the DataLoader: otherwise each epoch restarts its workers, and they fetch "
            "the first batches while the training waits."
        )

    return Advised("Look at the samples of the steps that wait: larger files, or a slow disk or network at times.")


def _prefetch(pipeline: Pipeline) -> Advised:
    gain = pipeline.gain(1)
    return Advised(
        "Fetch the next batch while the model computes, in another process (a DataLoader with num_workers=1): that "
        f"makes the run {gain_text(gain, 'at most')}.",
        gain,
        1,
    )


def _all_cores(pipeline: Pipeline, allowed: int) -> Advised:
    gain = pipeline.gain_on_all_cores()
    return Advised(
        f"The {plural(pipeline.workers, 'worker')} may use only {cores_text(allowed)} of {pipeline.cores}: the "
        "training process was bound to it when it started them (taskset, OMP_PROC_BIND, KMP_AFFINITY). Call "
        f"os.sched_setaffinity(0, range(os.cpu_count())) in worker_init_fn: {gain_text(gain, 'about')}.",
        gain,
    )


def _whole_batches(loader: LoaderFacts, pipeline: Pipeline) -> Advised:
    gain = pipeline.gain_with(_WHOLE_BATCH, workers=0)
    instead = "use no workers, which add copies, and " if loader.num_workers else ""
    return Advised(
        f"{_data(loader)} is in memory: {instead}take whole batches by indexing its tensors (data[indices]) instead of "
        f"collating single samples; {gain_text(gain, 'about')}.",
        gain,
        0 if loader.num_workers else None,
    )


def _more_workers(loader: LoaderFacts, pipeline: Pipeline, cores: str) -> Advised | None:
    workers = pipeline.best_workers()
    gain = pipeline.gain(workers)
    if workers <= pipeline.workers or gain < WORTHWHILE:
        return None

    before = (
        f"{pipeline.workers} worker{'s' if pipeline.workers > 1 else ''} do{'' if pipeline.workers > 1 else 'es'} not "
        "keep up"
        if pipeline.workers
        else f"{_data(loader)} is read by the training process itself (num_workers=0)"
    )
    text = f"{before}: set num_workers={workers}{_persistent(loader)}; {gain_text(gain, 'about')}{cores}."
    return Advised(text + (_cached(pipeline, gain) or _waits(pipeline, workers)), gain, workers)


def _cheaper_samples(loader: LoaderFacts, pipeline: Pipeline, cores: str) -> Advised:
    gain, cached = pipeline.gain_with(0.5), pipeline.gain_with(0.0)
    how = (
        "decode once and cache, smaller samples, transforms on the device"
        if pipeline.takes_cpu
        else "larger files, a faster or local disk, a cache in memory"
    )
    crowd = f"; more workers will not help{cores}" if pipeline.workers or pipeline.cores else ""
    return Advised(
        f"Make {_data(loader)}'s __getitem__ cheaper ({how}){crowd}. Half its time makes the run {gain_text(gain)}, a "
        f"cache {gain_text(cached, 'at most')}.",
        gain,
    )


def _cached(pipeline: Pipeline, gain: float) -> str:
    cached = pipeline.gain_with(0.0, workers=0)
    if not pipeline.takes_cpu or cached < WORTHWHILE * gain:
        return ""

    return f" Its samples take CPU time: made once and cached, {gain_text(cached, 'at most')}."


def _waits(pipeline: Pipeline, workers: int) -> str:
    if pipeline.takes_cpu or pipeline.cores is None or workers <= pipeline.cores:
        return ""

    waits = percent_text(1 - pipeline.fetch_cpu)
    return f" A fetch waits for {waits} of its time, so there may be more workers than cores."


def _on(pipeline: Pipeline, facts: JobFacts) -> str:
    """Return the cores that a gain is for; while others use them, it is not to be had."""
    if pipeline.cores is None:
        return ""

    own = " of its own" if facts.oversubscribed else ""
    return f" on {pipeline.cores} core{'s' if pipeline.cores > 1 else ''}{own}"


def _persistent(loader: LoaderFacts) -> str:
    return "" if loader.persistent_workers else " and persistent_workers=True"


def _data(loader: LoaderFacts) -> str:
    return loader.dataset or "the dataset"
