"""Advice on steps that became slower: by how they changed, then by the line, then by the phase."""

from __future__ import annotations

from traceml.diagnosis.advice import WAITED_FOR, flush_denormals
from traceml.diagnosis.facts.blamed_lines import COLLECTIVES, calls_code, outside_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.rules.slowdowns.slow_parts import COMM, PASSES, SlowParts
from traceml.formatting import phases_text, ranks_text

__all__ = ["slowdown_advice"]


def slowdown_advice(shape: str, where: SlowParts, ranks: tuple[int, ...], facts: JobFacts) -> str:
    """Return what to do.

    Args:
        shape: of the change, as in `LevelChange`.
        where: what became slower.
        ranks: that alone became slower; empty for all.
    """
    part = where.parts[0] if len(where.parts) == 1 else None
    known = _for_shape(shape, part, where, facts)
    if known is not None:
        return known

    may_read_ahead = part == "input_wait" and facts.loader is not None and not facts.loader_workers
    meanwhile = " Loader workers (num_workers) can read ahead meanwhile." if may_read_ahead else ""
    if where.line is not None:
        waits = part is not None and facts.waits_in(part, where.line)
        what = f"waits for then ({WAITED_FOR}): it does not compute" if waits else "does only then"
        return f"Look at what {where.line.place} {what}.{meanwhile}"

    if part == COMM:
        return _for_waiting(facts)

    return _for_part(part, where, f" of {ranks_text(ranks)}" if ranks else "", meanwhile)


def _for_shape(shape: str, part: str | None, where: SlowParts, facts: JobFacts) -> str | None:
    """Return the advice on what makes a part slower in this way; None if nothing is known of it."""
    denormals = flush_denormals(facts)
    if part == "optimizer" and shape in ("growth", "stays") and denormals:
        return (
            f"{denormals} If that changes nothing, look at what else changes in {phases_text(where.parts, None)} then."
        )

    if part == "input_wait" and shape == "first":
        what = "the data set" if where.line is None else where.line.place
        return (
            f"If {what} fills a cache then, or the files are in memory afterwards, its share is smaller in a longer "
            "run, and loader workers (num_workers) would fetch samples while the model computes. Each of them fills a "
            "cache of its own, and without persistent_workers=True anew in each epoch. Otherwise look at what it does "
            "only then."
        )

    if shape != "growth":
        return None

    if PASSES.issubset(where.parts):
        keeps = "the script" if where.line is None else where.line.place
        return (
            "Forward and backward grow, too: the model is called more often in a step, or with more at once. If that "
            "is meant (longer episodes or sequences), nothing needs fixing. Otherwise look for a list or history that "
            f"{keeps} adds to and passes to the model."
        )

    if part == "backward":
        return (
            "Look for what links the graph to that of the steps before: a state that is not detached "
            "(detach_()), a loss that is added up with its graph, retain_graph=True. Otherwise at growing batches."
        )

    if where.line is not None:
        return (
            f"Look at {where.line.place} for what it keeps, repeats or sends: a list, a history or a graph that grows."
        )

    return _for_growing_messages(facts) if COMM in where.parts else None


def _for_growing_messages(facts: JobFacts) -> str:
    """Return the advice about communication that takes longer from step to step."""
    caller = outside_line(facts.lines, COMM)
    is_known = caller is not None and calls_code(facts.lines, COMM, caller, COLLECTIVES)
    return (
        f"Look at how much {caller.place if caller and is_known else 'the script'} sends: an object that grows "
        "(all_gather_object of a list), or larger tensors. Otherwise at the links between the ranks, and at what "
        "else uses them."
    )


def _for_waiting(facts: JobFacts) -> str:
    """Return the advice about communication that takes longer for a time, with the ranks' own work as before."""
    look = "look at the links between the ranks at that time, at what else uses them"
    if facts.backend == "gloo" and facts.world_size <= facts.ranks_beside_first:
        look = "look at what takes the host's cores at that time, as gloo's threads need them (`top` names it)"

    return f"No rank's own work is longer: {look}, and at how much data is reduced."


def _for_part(part: str | None, where: SlowParts, of_ranks: str, meanwhile: str) -> str:
    """Return the advice where no line is known.

    Args:
        of_ranks: ` of ranks 1 and 2`, if only some became slower.
        meanwhile: a sentence about reading ahead, or nothing.
    """
    of_host = f"other programs on the host{of_ranks}, clocks lowered by heat or power, and swapping at that time."
    if not where.parts and not where.leading:  # also where cores were taken
        return (
            "All phases are slower, so no single piece of code is the cause. If steps have no more work then "
            f"(longer episodes or sequences), look for {of_host}"
        )

    if part == "input_wait":
        return (
            f"Look at the data{of_ranks} from that step on: larger files, another shard, a page cache that no longer "
            f"holds it.{meanwhile}"
        )

    phases = phases_text(where.parts or where.leading, None)
    what = "batch size, sequence length, recompilation, a growing list"
    if where.parts:
        return f"Look at what changes in {phases}{of_ranks} then: {what}."

    return f"If {phases} have more work then ({what}), look at that. Otherwise for {of_host}"
