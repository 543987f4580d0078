"""Loader workers that are restarted in each epoch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_shares import dataset_share, ordering_share
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.loading import is_taken_ahead
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork
from traceml.diagnosis.steps.speedup import saved_ns, speedup
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import gain_text, ns_text, percent_text, plural

__all__ = ["KeptWorkers", "begins_each_step", "keeping_workers", "workers_restarted"]

EACH_STEP_SHARE = 0.5
"""A script makes an iterator in each step if this share of its steps wait for the first batch of one."""
_MIN_STARTS = 10
_ANEW_SHARE = 0.5  # the number of loaders is known to a factor of two
_MUCH = 0.25
"""From this share of the step on, no workers may be better than ones that are kept: epochs are short."""
_LONG_BEGIN_NS, _LONG_BEGIN = 3e8, 3.0
"""A forked worker that has started is ready in less time, and in less than so many times what its start took."""
_PART, _FORK = "input_wait", "fork"


def begins_each_step(facts: JobFacts) -> bool:
    """Return whether each step makes an iterator for one batch: an epoch of one batch would end its iterator.

    With workers, one that is dropped ends, too; then the data shows that it has more batches.
    """
    epochs = facts.epochs
    if len(epochs) < _MIN_STARTS:
        return False

    steps = int(epochs["step"][-1]) - int(epochs["step"][0]) + 1
    ends = bool((epochs["drain_ns"] > 0).mean() >= EACH_STEP_SHARE)
    return len(epochs) >= EACH_STEP_SHARE * steps and (not ends or _has_more_batches(facts))


def _has_more_batches(facts: JobFacts) -> bool:
    """Return whether an epoch certainly has more batches than a step takes."""
    loader = facts.loader or LoaderFacts()
    if not loader.num_workers or not loader.length or not loader.batch_size:
        return False

    return loader.length >= 2 * facts.micro_batches * loader.batch_size * facts.world_size


class KeptWorkers(NamedTuple):
    """Advice to keep the loader's workers from epoch to epoch."""

    action: str  # what to do, a sentence without its end
    setting: str  # the same as a further argument of the loader
    because: str  # how each epoch starts them now


def keeping_workers(facts: JobFacts) -> KeptWorkers | None:
    """Return how to keep the loader's workers; None if they are kept, or its trainer cannot do that."""
    loader = facts.loader or LoaderFacts()
    epochs = len(facts.epochs)
    if loader.made > 1 and epochs != 1 and loader.made >= _ANEW_SHARE * epochs:
        return KeptWorkers(
            "Make the DataLoader once, before the loop over epochs, with persistent_workers=True",
            "persistent_workers=True in one DataLoader for all epochs",
            "the script makes a new one for each epoch, and a new one starts its workers",
        )

    if not loader.can_keep_workers:
        return None

    setting = f"{loader.option('persistent_workers')}=True"
    return KeptWorkers(
        f"Set {setting} in the {loader.place}, and use the same DataLoader in all epochs",
        setting,
        "otherwise each epoch restarts its workers",
    )


def workers_restarted(
    window: AlignedSteps, work: OwnWork, facts: JobFacts, step_ns: float
) -> tuple[list[Finding], dict[str, Floats]]:
    """Return the finding about workers that each epoch restarts, and the waiting as it would be without that."""
    workers = facts.loader_workers
    keeping = keeping_workers(facts)
    if not workers or keeping is None or _PART not in work.parts:
        return [], {}

    # Where a script takes all batches of an epoch at once, it waits for these, and not for the first one. One iterator
    # for all steps has batches ahead, and draws the order once.
    each_step = begins_each_step(facts)
    usual_ns = 0.0 if each_step else workers * float(np.median(work.step))
    fetch_ns = np.inf if is_taken_ahead(work, facts) else usual_ns
    columns, start_ns, rest_ns = _restarts(window, facts, fetch_ns)
    if len(columns) < 2:
        return [], {}

    # Kept workers draw the order of the samples as often, and begin an iterable data set as often.
    ordered = 0.0 if each_step else ordering_share(facts.lines)
    drawn_ns = ordered * float(work.parts[_PART].mean(axis=0).sum()) / len(columns)
    loader = facts.loader or LoaderFacts()
    in_samplers = min(sum(dataset_share(facts.lines, name) for name in loader.samplers), 1.0)
    restart_ns = np.maximum(start_ns + rest_ns - drawn_ns, 0) * (1 - in_samplers)
    least_ns = max(_LONG_BEGIN_NS, _LONG_BEGIN * float(start_ns.mean()))
    # An iterable data set begins with its forked workers, which take no time after that.
    is_forked, is_long = loader.start_method in (None, _FORK), float(rest_ns.mean()) - drawn_ns >= least_ns
    starts_over = not each_step and loader.length is None and is_forked and is_long
    kept = {_PART: work.parts[_PART].copy()}
    kept[_PART][:, columns] = np.maximum(kept[_PART][:, columns] - restart_ns, 0)
    if not starts_over and is_forked:
        copied_ns = _copied_ns(work, columns)
        restart_ns = restart_ns + sum(float(each.mean()) for each in copied_ns.values())
        for part, excess in copied_ns.items():
            kept[part] = work.parts[part].copy()
            kept[part][:, columns] = np.maximum(kept[part][:, columns] - excess, 0)

    saved = saved_ns(work, kept)
    if saved < least_cost_ns(step_ns):
        return [], {}

    return [_finding(work, facts, restart_ns, saved, step_ns, None if starts_over else keeping)], kept


def _copied_ns(work: OwnWork, columns: NDArray[np.intp]) -> dict[str, Floats]:
    """Return by how much computation takes longer than usual in these steps, by rank: memory that it shares is copied.

    After a fork, a page of weights, gradients or an optimizer's state is copied when it is written for the first time.
    """
    medians = {
        part: [np.median(values, axis=1, keepdims=True) for values in (work.parts[part][:, columns], work.parts[part])]
        for part in COMPUTE
        if part in work.parts
    }
    return {part: np.maximum(then - usual, 0) for part, (then, usual) in medians.items()}


def _restarts(
    window: AlignedSteps, facts: JobFacts, fetch_ns: float
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps that waited for new workers, as columns of the window, and how long.

    The first time is that of starting them and ending the ones before, the second one the wait for a batch after it.
    Persistent workers, too, fetch the first batch only on request, so that wait is not a cost of the restart. It is at
    most the time in which all workers, which keep up with the steps, fetch one batch each (`fetch_ns`).
    """
    rows = facts.epochs
    _, columns, at = np.intersect1d(window.steps, rows["step"], return_indices=True)
    rows = rows[at]
    certain = rows["create_ns"] + rows["drain_ns"]
    return columns, certain.astype(np.float64), np.maximum(rows["ns"] - certain - fetch_ns, 0.0)


def _finding(
    work: OwnWork,
    facts: JobFacts,
    waits_ns: NDArray[np.float64],
    saved: float,
    step_ns: float,
    keeping: KeptWorkers | None,
) -> Finding:
    """Return the finding about restarted workers; about first batches that take long if there is nothing to keep."""
    count, each_ns, share, gain = len(waits_ns), float(np.mean(waits_ns)), saved / step_ns, speedup(step_ns, saved)
    workers, loader, each_step = facts.loader_workers, facts.loader or LoaderFacts(), begins_each_step(facts)
    if keeping is None:
        data = loader.dataset or "The data set"
        summary = (
            f"{data} starts over in each epoch: the wait for its first batch is {ns_text(each_ns)} longer than for "
            f"the others, {plural(count, 'time')}, {percent_text(share)} of step time; without that steps would be "
            f"{gain_text(gain)}."
        )
        action = (
            f"Look at what {data} does before its first batch (filling a shuffle buffer, listing or opening files), "
            f"and at worker_init_fn: make it cheaper, or keep it from epoch to epoch; {gain_text(gain, 'at most')}. "
            "With persistent workers worker_init_fn runs once, but the data set still starts over."
        )
    else:
        who = "The worker of the data loader is" if workers == 1 else f"The {workers} workers of the data loader are"
        times = "for each step" if each_step else f"{plural(count, 'time')}, at the start of an epoch"
        summary = (
            f"{who} restarted {times}: {ns_text(each_ns)} each, {percent_text(share)} of step time; with "
            f"{'one iterator' if each_step else 'persistent workers'}, steps would be "
            f"{gain_text(gain, 'at most' if each_step else '')}."
        )
        without = (
            f" Without workers ({loader.option('num_workers')}=0) none has to start: that is faster than now, too, if "
            f"a batch takes less than {ns_text(saved)} to make."
        )
        action = f"{keeping.action}: {keeping.because}.{without if share >= _MUCH else ''}"
        if each_step:
            action = "Keep one iterator of the loader: iter(loader) in each step starts its workers again."

    return Finding.of(
        Kind.INPUT_BOUND,
        phase=_PART,
        summary=summary,
        next=action,
        evidence={
            "epochs": count,
            "first_batch_ms" if keeping is None else "restart_ms": each_ns / 1e6,
            "num_workers": workers,
            "step_ms": step_ns / 1e6,
            "steps": work.parts[_PART].shape[1],
            **({"each_step": True} if each_step else {}),
        },
        cost_share=share,
        speedup_if_fixed=gain,
    )
