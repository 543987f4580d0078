"""Trainings that go wrong: losses and gradients that are not finite, data that ranks share, no gradient exchange."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.database.states import RunStatus
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.shared_batches import COMPARED_WORKERS
from traceml.diagnosis.findings import Explanation, Finding, known_facts
from traceml.diagnosis.kinds import WARNING_SHARE, Kind, Severity
from traceml.formatting import capitalized, count_text, percent_text, plural, ranks_text

__all__ = [
    "duplicate_data", "loss_not_finite", "never_cleared", "never_synchronized", "repeated_by_workers", "same_order",
    "steps_skipped", "trained_in_evaluation_mode", "trainings_not_finite", "weights_unchanged",
]  # fmt: skip

MIN_LOST_STEPS = 3
"""A loss that is not finite in fewer steps than this may be one that GradScaler skips."""
SKIPPED_SHARE = 0.8
"""Where this share of the steps without a finite loss was skipped, the model was not harmed."""
_TOLD_SHARE = 0.01  # of the steps: those of earlier trainings that are lost
MIN_STEPS = 50
"""Ranks are said to never exchange gradients after this many steps; while they run, after `MIN_LIVE_STEPS`."""
MIN_LIVE_STEPS = 500
_AT_ONCE_STEPS = 20
"""A loss that is not finite after fewer steps is one of the initial weights, the data or the learning rate."""
_STOP_TRAINING = (
    "Stop such a training at once (if not math.isfinite(loss.item()): break), and leave it out of the results. A lower "
    "learning rate or clipped gradients may keep its loss finite; torch.autograd.set_detect_anomaly(True) names the "
    "operation."
)
_UNLESS_DIVIDED = " If they divide the sequences of a batch (context parallelism), it is right that they share it."
_EXCHANGE = "{}. If the models are meant to differ, run them as separate jobs."


def loss_not_finite(facts: JobFacts) -> Finding | None:
    """Return the finding about a loss that is no longer finite.

    Steps that GradScaler skips leave the model as it was: they are a finding of their own.
    """
    found, steps, world_size = facts.losses.first(), facts.last_step + 1, facts.world_size
    if found is None or steps - found[0] < MIN_LOST_STEPS:
        return None

    since, ranks, word, last_finite = found
    if facts.skipped.share_since(since) >= SKIPPED_SHARE:
        return None

    ranks = () if len(ranks) == world_size else ranks
    subject = "The run" if world_size == 1 else capitalized(ranks_text(ranks))
    wasted = steps - since
    share = wasted / max(steps, 1)
    since_then = [begin for begin in facts.trainings_begin if begin > since]
    where = f", in {len(since_then) + 1} trainings one after the other" if since_then else ""
    action = _for_lost_training(since, facts)
    return Finding.of(
        Kind.NUMERIC,
        ranks=ranks,
        phase="backward",
        summary=(
            f"{subject} had a loss of {word} in step {count_text(since)}, and it has not been finite since{where}: "
            f"{count_text(wasted)} of {count_text(steps)} steps ({percent_text(share)}) trained nothing useful."
        ),
        next=action.action,
        evidence={
            "since_step": since,
            "wasted_steps": wasted,
            "steps": steps,
            "loss": word,
            "last_finite_loss": last_finite,
            **action.evidence,
        },
        cost_share=share,
    )


def _for_lost_training(since: int, facts: JobFacts) -> Explanation:
    if facts.trainings_begin:  # a checkpoint from before may be of another model
        return Explanation(action=_STOP_TRAINING)

    if facts.unread_skips:
        skips = "GradScaler has the fused optimizer skip a step whose gradients are not finite."
        return Explanation(action=f"{skips} {_FOR_LOSS}")

    if since < _AT_ONCE_STEPS and not facts.resumes_at:
        return Explanation(
            action="Start again with a lower learning rate, a warm-up or clipped gradients, and look at the first "
            "batches; torch.autograd.set_detect_anomaly(True) names the operation."
        )

    action = (
        f"Go back to a checkpoint from before step {count_text(since - 1)}. Look at the batches of that step, whose "
        f"update it may be, and of step {count_text(since)}, lower the learning rate or clip gradients; "
        "torch.autograd.set_detect_anomaly(True) names the operation."
    )
    return Explanation(action=action, evidence={"checkpoint_before_step": since - 1})


def trainings_not_finite(facts: JobFacts) -> Finding | None:
    """Return the finding about trainings before the last, as folds and trials are, that ended without a finite loss.

    Losses that are finite again within the same training did not harm its model for good.
    """
    lost: list[tuple[int, int, str]] = []
    for span in facts.losses.ended_spans:
        end = max((begin for begin in facts.trainings_begin if span.first < begin <= span.until), default=span.first)
        harmless = facts.skipped.share_since(span.first, end) >= SKIPPED_SHARE
        if end - span.first >= MIN_LOST_STEPS and not harmless:
            lost.append((span.first, end, span.word))

    wasted, steps = sum(end - first for first, end, _ in lost), facts.last_step + 1
    share = wasted / max(steps, 1)
    if share < _TOLD_SHARE:
        return None

    first, end, word = lost[0]
    until = f"the next training began at step {count_text(end)}"
    more = "" if len(lost) == 1 else f"; the same happened in {plural(len(lost) - 1, 'more training')}"
    return Finding.of(
        Kind.NUMERIC,
        severity=Severity.WARNING if share >= WARNING_SHARE else Severity.INFO,
        phase="backward",
        summary=(
            f"The run trains several models one after the other. One had a loss of {word} in step "
            f"{count_text(first)}, and it was no longer finite until {until}{more}: {count_text(wasted)} of "
            f"{count_text(steps)} steps ({percent_text(share)}) trained nothing useful."
        ),
        next=_STOP_TRAINING,
        evidence={
            "since_step": first,
            "until_step": end,
            "trainings": len(lost),
            "wasted_steps": wasted,
            "steps": steps,
            "loss": word,
        },
        cost_share=share,
    )


def duplicate_data(facts: JobFacts) -> Finding | None:
    """Return the finding about ranks that train on identical batches."""
    world_size = facts.world_size
    found = facts.batches.duplicates(world_size, facts.topology)
    if not found:
        return None

    ranks = tuple(sorted(rank for equal, _ in found for rank in equal))
    needless = len(ranks) - len(found)
    share = needless / max(len(facts.topology.with_own_batches(range(world_size))), len(ranks))
    may_divide = facts.batches.tokens and not facts.topology.divides_sequences
    compared = found[0][1]
    whose = ranks if len(found) == 1 else found[0][0]
    more = "" if len(found) == 1 else f" ({len(found)} such groups of ranks)"
    return Finding.of(
        Kind.DUPLICATE_DATA,
        ranks=() if len(ranks) == world_size and len(found) == 1 else ranks,
        summary=(
            f"{capitalized(ranks_text(whose))} had identical batches in {compared} of {compared} steps that were "
            f"compared{more}: {percent_text(share)} of the ranks' work repeats that of others."
        ),
        next=(
            "Give each rank its own part of the data: DataLoader(sampler=DistributedSampler(dataset)) with "
            "sampler.set_epoch(epoch), or another seed and another shard by rank." + _UNLESS_DIVIDED * may_divide
        ),
        evidence={"compared_batches": compared, "groups": [list(equal) for equal, _ in found]},
        cost_share=share,
    )


def repeated_by_workers(facts: JobFacts) -> Finding | None:
    """Return the finding about loader workers that each read the whole data set."""
    workers, epochs = facts.loader_workers, facts.epochs_of_repeats
    if not epochs:
        return None

    data = "the data set" if facts.loader is None or facts.loader.dataset is None else facts.loader.dataset
    compared = f"those of {COMPARED_WORKERS} workers, " if workers > COMPARED_WORKERS else ""
    return Finding.of(
        Kind.DUPLICATE_DATA,
        summary=(
            f"Each of the {workers} loader workers reads the same data: their first batches were identical "
            f"({compared}compared in {plural(epochs, 'epoch')}), so each sample is trained on {workers} times in "
            "an epoch."
        ),
        next=(
            f"Divide {data} among the workers: in its __iter__, torch.utils.data.get_worker_info() has the id of "
            "the worker and num_workers. If it draws random numbers, seed them by get_worker_info().seed."
        ),
        evidence={"workers": workers, "compared_epochs": epochs},
        cost_share=1 - 1 / workers,
    )


def same_order(facts: JobFacts) -> Finding | None:
    """Return the finding about a DistributedSampler whose epoch is never set: each epoch has the order of the first."""
    number = None if facts.loader is None else facts.loader.number
    if number not in facts.same_order:
        return None

    return Finding.of(
        Kind.DUPLICATE_DATA,
        severity=Severity.INFO,
        summary=(
            "The DistributedSampler of the training's loader draws the same order in each epoch, as its "
            "set_epoch() is not called: each rank has the same samples in the same batches in every epoch."
        ),
        next="Call loader.sampler.set_epoch(epoch) at the start of each epoch, before the loop over its batches.",
        evidence={"same_order": True},
    )


def never_synchronized(facts: JobFacts) -> Finding | None:
    """Return the finding about ranks of one process group that exchange no gradients."""
    batches, world_size, steps = facts.batches, facts.world_size, facts.steps_made
    least = MIN_LIVE_STEPS if facts.state == RunStatus.RUNNING else MIN_STEPS
    if world_size < 2 or not batches.are_alone or steps < least:
        return None

    numbers = batches.only_numbers
    at_most = f"no collective of more than {plural(numbers, 'number')}" if numbers else "no collective"
    return Finding.of(
        Kind.NO_GRADIENT_SYNC,
        summary=(
            f"The {world_size} ranks share a process group, but called {at_most} in {count_text(steps)} steps: "
            "each trains a model of its own, and only one of them will be saved or used."
        ),
        next=_EXCHANGE.format(
            "Call the DistributedDataParallel model itself in forward, not its .module, and run the last backward "
            "of each step outside no_sync()"
            if batches.reductions is not None
            else "Wrap the model in DistributedDataParallel, or average the gradients by all_reduce after backward"
        ),
        evidence={"ranks": world_size, "steps": steps},
    )


def trained_in_evaluation_mode(facts: JobFacts) -> Finding | None:
    """Return the finding about a model that is trained in `eval()`; a remark if it is so from the first step on."""
    found, steps = facts.evaluation_mode, facts.steps_made
    if found is None:
        return None

    share = min(found.steps / max(steps, 1), 1.0)
    since = max(found.step, facts.first_step)  # a script may number its steps after it has loaded the model
    never = since == facts.first_step
    how = "before the loop: from_pretrained returns a model in eval()" if never else "after each evaluation"
    return Finding.of(
        Kind.EVAL_MODE,
        severity=Severity.WARNING if share >= WARNING_SHARE and not never else Severity.INFO,
        summary=(
            f"{found.model} was in eval() in {count_text(found.steps)} of {count_text(steps)} training steps "
            f"({percent_text(share)}), from step {count_text(since)} on: its layers of {', '.join(found.layers)} "
            "work there as in an evaluation."
        ),
        next=f"Call its train() {how}. If that is meant, as to keep what BatchNorm has learned, nothing needs fixing.",
        evidence={"since_step": since, "steps": found.steps, "layers": list(found.layers)},
    )


def never_cleared(facts: JobFacts) -> Finding | None:
    """Return the finding about a training without `zero_grad()`."""
    if facts.keeps_gradients is None:
        return None

    return Finding.of(
        Kind.NO_ZERO_GRAD,
        summary=(
            f"The gradients of what {facts.keeps_gradients} trains are never cleared: each step updates by their sum "
            "over all steps so far."
        ),
        next="Call the optimizer's zero_grad() in each step, after step() or before the first backward.",
        evidence={"optimizer": facts.keeps_gradients},
    )


def weights_unchanged(facts: JobFacts) -> Finding | None:
    """Return the finding about a training that changes no parameter of its optimizers.

    Steps that GradScaler skips are `STEPS_SKIPPED`. While the job runs, gradients may be added for the first update.
    """
    by_rank, steps = facts.unchanged_weights, facts.steps_made
    is_running = facts.state == RunStatus.RUNNING
    if len(by_rank) < facts.world_size or steps < (MIN_LIVE_STEPS if is_running else MIN_STEPS):
        return None

    found = by_rank[min(by_rank)]
    is_mixed = any(each.stepped != found.stepped for each in by_rank.values())
    if is_mixed or len(facts.skipped.steps) or (is_running and not found.stepped):
        return None

    none_of_them = f"has changed none of its {plural(found.parameters, 'parameter tensor')}"
    in_steps = f"in {count_text(steps)} steps"
    if not found.stepped:
        summary = f"No optimizer was stepped {in_steps}: {found.optimizer} {none_of_them}."
        action = _STEP
    elif any(each.trainable for each in by_rank.values()):
        summary = f"{found.optimizer} {none_of_them} {in_steps}, as backward gave them no gradients."
        action = _FOR_NO_GRADIENTS
    else:
        summary = f"{found.optimizer} {none_of_them} {in_steps}, as all are frozen (requires_grad is False)."
        action = "Set requires_grad_(True) on what is to be trained, or give the optimizer the parameters that have it."

    return Finding.of(
        Kind.WEIGHTS_UNCHANGED,
        severity=Severity.CRITICAL if found.stepped else Severity.WARNING,
        summary=summary,
        next=action,
        evidence={"optimizer": found.optimizer, "parameters": found.parameters, "steps": steps},
    )


_STEP = (
    "Call the optimizer's step() after backward, in each step or after the batches whose gradients are to be added. If "
    "only gradients are wanted, nothing needs fixing."
)
_FOR_NO_GRADIENTS = (
    "Make the optimizer from the parameters of the model that is trained, after that is made, and after fully_shard(), "
    "which makes new ones. If it has these, look for what cuts the loss off from the model: detach(), item(), "
    "torch.tensor(loss), torch.no_grad()."
)
LASTING_SHARE = 0.25
"""Share of the last quarter of the steps that is skipped, if skipping is not over. A scaler skips a few at first."""
MIN_SKIPPED = 5
"""Fewer skipped steps than this are not a finding."""
_DENSE_SHARE = 0.8
_READ_EVERY = 64  # losses of fast steps are read in every 16th or 64th


def steps_skipped(facts: JobFacts) -> Finding | None:
    """Return the finding about updates that are skipped up to now; of losses, if they are the cause."""
    skipped = facts.skipped
    if len(skipped.steps) < MIN_SKIPPED:
        return None

    count, last = len(skipped.steps), skipped.latest + 1
    span = max(last - skipped.first, 1)
    if skipped.share_since(last - max(span // 4, 1)) < LASTING_SHARE:
        return None

    since = _since(skipped.steps, last, skipped.taken_share)
    share = count / max(skipped.rows, count)
    most = "most of them " if since > skipped.steps[0] else ""
    lost = facts.losses.first()
    loss = None if lost is None or lost[0] > since + _READ_EVERY else lost[2]
    until = "and still does" if facts.state == RunStatus.RUNNING else "up to the end"
    cause = "their gradients were" if loss is None else f"their loss ({loss}), and so their gradients, were"
    return Finding.of(
        Kind.STEPS_SKIPPED,
        phase="optimizer",
        summary=(
            f"The optimizer skipped {count_text(count)} of {count_text(skipped.rows)} steps "
            f"({percent_text(share)}), {most}since step {count_text(since)}, {until}: {cause} "
            "not finite, so these steps trained nothing."
        ),
        next=_FOR_GRADIENTS if loss is None else _FOR_LOSS,
        evidence={"skipped": count, "steps": skipped.rows, "since_step": since, **known_facts(loss=loss)},
        cost_share=share,
    )


_FOR_GRADIENTS = (
    "Look at the loss from that step on (torch.autograd.set_detect_anomaly(True) names the operation); a lower "
    "learning rate, gradient clipping, or bfloat16 instead of float16 usually help."
)
_FOR_LOSS = (
    "Look at the batch of that step and at what computes the loss (a logarithm or a division of 0, an overflow); the "
    "model was not changed since. torch.autograd.set_detect_anomaly(True) names the operation."
)


def _since(steps: NDArray[np.int64], end: int, taken: float) -> int:
    """Return the step from which on nearly all steps were skipped, most of those that were; else the first one."""
    left = np.arange(len(steps), 0, -1)
    dense = (left >= _DENSE_SHARE * taken * (end - steps)) & (2 * left >= len(steps))
    return int(steps[np.argmax(dense)])
