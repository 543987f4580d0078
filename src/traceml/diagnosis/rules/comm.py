"""Communication: waiting that is not caused by a slow rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np

from traceml.diagnosis import advice
from traceml.diagnosis.facts.blamed_lines import COLLECTIVES, BlamedLine, blamed_line, calls_code, own_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_shares import broadcasts_buffers
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork
from traceml.diagnosis.steps.speedup import speedup
from traceml.formatting import capitalized, cores_text, gain_text, ns_text, percent_text, ranks_text

__all__ = ["calling_line", "comm_bound", "min_wait_ns"]

SHARE = 0.25
"""The median of the minimum wait over ranks is this share of the median step; healthy small models reach 0.2."""
FLOOR_NS = 3e6
"""Shorter waiting is the normal cost of gloo's ring for two ranks on the CPU."""
DEVICE_FLOOR_NS = 1e6
"""The same for device times, which include no scheduling, and for collectives that a line of the script calls."""
MIN_REDUCTIONS = 1.5
"""With more reductions than this per step, the gradients of an accumulated step are averaged needlessly often."""
_MAX_LISTED = 64
_FOR_BUFFERS = (
    "Rank 0 sends its buffers (the statistics of BatchNorm) to all ranks before each forward. With broadcast_buffers="
    "False of DistributedDataParallel (forward_sync_buffers=False in newer versions) each rank keeps its own."
)
_COUNTED = ("backwards_per_step", "reductions_per_step")


def min_wait_ns(work: OwnWork) -> float:
    """Return the communication left when no rank is late: the median over steps of the minimum wait over ranks."""
    return float(np.median(work.wait)) if work.wait.size else 0.0


def _for_cores_ns(work: OwnWork, facts: JobFacts, step: float) -> float:
    """Return the time of a step in which the rank that waits most for a core does while others may wait for it.

    It is 0 where the ranks do not lack cores: then it is the cost of the threads that communicate beside the others.
    What it waits for a core while it computes is in its own work. The main thread that computes on the CPU either runs
    or waits for a core, so the time beyond that which it ran is such waiting. While it sleeps in a collective, the
    threads that communicate wait.
    """
    if not facts.oversubscribed:
        return 0.0

    known = facts.wait_of_wall_time
    if not known or work.device:
        return step * max(known.values(), default=facts.waited_share)

    parts = (work.parts[part].mean(axis=1) for part in COMPUTE if part in work.parts)
    computing = sum(parts, np.zeros(len(work.ranks))) / work.step_ns
    shares = dict(zip(work.ranks.tolist(), computing.tolist(), strict=True))
    left = (
        facts.communication_waits.get(rank, 0.0)
        + waited
        - min(max(shares.get(rank, 0.0) - facts.core_runs.get(rank, inf), 0.0), waited)
        for rank, waited in known.items()
    )
    return float(step * max(left))


def comm_bound(window: AlignedSteps, work: OwnWork, facts: JobFacts, *, uneven: bool) -> list[Finding]:
    """Find communication that costs much while no rank is late, which the caller has checked.

    Args:
        uneven: whether ranks wait for the largest batch, which is reported beside it.
    """
    if facts.rpc and not work.grouped:
        return _waiting_for_answers(work, facts)

    usual_ns = float(np.median(work.step))
    cost_ns = min_wait_ns(work) - _for_cores_ns(work, facts, usual_ns)
    step_ns = float(window.total.mean())  # rare long steps do not communicate for longer, and are a part of the run
    if _is_little(cost_ns, usual_ns, DEVICE_FLOOR_NS) or cost_ns < least_cost_ns(step_ns):
        return []

    explicit = float(np.median(window.times["comm"].mean(axis=0)))
    share, is_explicit = float(window.times["comm"].mean() / max(window.total.mean(), 1.0)), explicit > cost_ns / 2
    line = calling_line(share, facts) if is_explicit else None
    if cost_ns < FLOOR_NS and line is None and not work.device:
        return []

    cost = _Cost(cost_ns, step_ns, _evidence(work, facts, cost_ns, step_ns, explicit))
    none_late = "no rank is late" + (" but for the size of its batch" if uneven else "")
    known = facts.batches.reductions  # backward passes of a step, and reductions of gradients
    if not is_explicit and known is not None and known[1] >= MIN_REDUCTIONS:  # one would do
        return [_too_many_reductions(*known, cost, none_late)]

    if unseen := facts.unseen_ranks:
        return [_waiting_for_unseen(unseen, cost)]

    # Ranks may train no steps, as one that only plays, evaluates or serves.
    without_steps = [rank for rank, step in enumerate(facts.latest[: facts.world_size]) if step < 0]
    if is_explicit and without_steps:
        how = "for messages of other ranks" if facts.batches.messages else "in collectives"
        return [_waiting_for_others(without_steps, how, cost)]

    if is_explicit and facts.batches.messages:
        return [_waiting_for_messages(cost)]

    buffers = is_explicit and broadcasts_buffers(facts.lines)
    collectives = "DDP's broadcast of buffers" if buffers else "collectives"
    where = f"in {collectives}" if is_explicit else "while backward waits for gradients"
    where += line.of_it if line else ""
    gain = speedup(step_ns, cost_ns)
    summary = (
        f"{cost.text('Communication takes')}, {where}, and {none_late}; without it steps would be {gain_text(gain)}."
    )
    usual = advice.for_comm(facts, "comm" if is_explicit else "backward", cost_ns, line)
    action = _FOR_BUFFERS if buffers else usual
    if shared := _shared_cores(work, facts):
        summary += f" {shared}, which the threads that communicate need, too."
        action += " Or start fewer ranks on a host: with a core each they communicate faster."

    return [cost.finding(summary, action, gain, **(line.evidence(share) if line else {}))]


def _shared_cores(work: OwnWork, facts: JobFacts) -> str | None:
    """Return `4 ranks share 2 cores`, if they wait for these; what they send waits in turns then, too."""
    if work.device or not facts.oversubscribed:
        return None

    ranks, cores = facts.ranks_beside_first, facts.cores.get(facts.hosts.get(0, ""), 0)
    return f"{ranks} ranks share {cores_text(cores)}" if 0 < cores < ranks else None


def calling_line(share: float, facts: JobFacts) -> BlamedLine | None:
    """Return the line that calls most of the collectives itself; None if a sharded model does it, or in no line."""
    if facts.batches.sharding is not None:
        return None

    line = own_line(facts.lines, "comm", share)
    return line if line is not None and calls_code(facts.lines, "comm", line, COLLECTIVES) else None


def _is_little(cost: float, step: float, floor_ns: float) -> bool:
    """Return whether communication costs too little to be reported."""
    return cost / max(step, 1.0) < SHARE or cost < floor_ns


class _Cost(NamedTuple):
    """Communication of a step."""

    ns: float
    step_ns: float
    evidence: Mapping[str, Any]

    @property
    def share(self) -> float:
        return self.ns / max(self.step_ns, 1.0)

    def text(self, what: str) -> str:
        return f"{what} {ns_text(self.ns)} of each {ns_text(self.step_ns)} step ({percent_text(self.share)})"

    def finding(self, summary: str, action: str, gain: float = 1.0, **more: Any) -> Finding:
        """Return the finding, with more evidence; its gain is 1 where none can be promised."""
        return Finding.of(
            Kind.COMM_BOUND,
            phase="comm",
            summary=summary,
            next=action,
            evidence={**self.evidence, **more},
            cost_share=self.share,
            speedup_if_fixed=gain,
        )


def _waiting_for_unseen(ranks: Sequence[int], cost: _Cost) -> Finding:
    """Return the finding on waiting where not all ranks are in the run: one of the others may be late."""
    who = f"{'one of ' if len(ranks) > 1 else ''}{ranks_text(ranks)}"
    summary = (
        f"{cost.text('The ranks of this run wait')} for others: for communication, or because {who} is "
        "late, which this run cannot show."
    )
    action = (
        "Trace all ranks in one run: it names a late one. To get one run from several nodes, use `traceml launch`, or "
        "`traceml run --nnodes` on each, or start `traceml serve --host 0.0.0.0` on one of them and set TRACEML=1, "
        "TRACEML_HOST and TRACEML_TOKEN on all."
    )
    return cost.finding(summary, action, unseen_ranks=list(ranks[:_MAX_LISTED]))


def _waiting_for_others(ranks: Sequence[int], how: str, cost: _Cost) -> Finding:
    """Return the finding on collectives with ranks whose work is not known, or on their messages."""
    who, they, have = ranks_text(ranks), *(("they do", "have") if len(ranks) > 1 else ("it does", "has"))
    summary = (
        f"{cost.text(f'The ranks that train wait {how} for')}. {capitalized(who)} {have} no training "
        f"steps: they may wait for what {they}."
    )
    action = (
        f"Look at what {who} {'do' if len(ranks) > 1 else 'does'} meanwhile (`traceml stacks`, `traceml report "
        "--lines`): work ahead there while the others train, or divide that work among more processes."
    )
    return cost.finding(summary, action, ranks_without_steps=list(ranks[:_MAX_LISTED]))


def _waiting_for_messages(cost: _Cost) -> Finding:
    """Return the finding on ranks that send each other messages: most of the waiting is for what others compute."""
    summary = (
        f"{cost.text('Waiting for messages of other ranks takes')}, and no rank is late: each needs what "
        "the others compute."
    )
    action = (
        "In a pipeline, split the batch into more micro-batches, so that all stages work at the same time: of S stages "
        "with M micro-batches each waits for (S - 1) / (S - 1 + M) of a step. Elsewhere, begin to receive earlier "
        "(irecv)."
    )
    return cost.finding(summary, action, waits_for="messages")


def _waiting_for_answers(work: OwnWork, facts: JobFacts) -> list[Finding]:
    """Return the finding on ranks that call functions of others, as of a parameter server; they need no other rank."""
    waits = work.parts.get("comm", np.zeros_like(work.own))
    callers = waits.any(axis=1)
    if not callers.any():
        return []

    cost_ns, step_ns = (float(np.median(values[callers].mean(axis=0))) for values in (waits, work.own))
    if _is_little(cost_ns, step_ns, FLOOR_NS):
        return []

    cost = _Cost(cost_ns, step_ns, _evidence(work, facts, cost_ns, step_ns, cost_ns))
    line = blamed_line(facts.lines, "comm", cost.share)
    of_it = line.of_it if line else ""
    summary = f"{cost.text('Calls of functions in other processes (RPC) take')}{of_it}."
    action = (
        "Make the functions that are called faster, or call them less often, with more data each time; begin calls "
        "early (rpc_async), and wait for their results where these are needed."
    )
    return [cost.finding(summary, action, waits_for="answers", **(line.evidence(cost.share) if line else {}))]


def _evidence(work: OwnWork, facts: JobFacts, cost: float, step: float, explicit: float) -> dict[str, Any]:
    reductions = facts.batches.reductions
    counted = {} if reductions is None else dict(zip(_COUNTED, reductions, strict=True))
    return {
        "step_ms": step / 1e6,
        "comm_ms": cost / 1e6,
        "explicit_collectives_ms": explicit / 1e6,
        "own_work_ms": float(work.own.mean()) / 1e6,
        "measured_steps": int(work.measured.sum()),
        "backend": facts.backend,
        "cpu_wait_share": facts.wait_share,
        **counted,
    }


def _too_many_reductions(backwards: float, reductions: float, cost: _Cost, none_late: str) -> Finding:
    gain, passes, reduced = speedup(cost.step_ns, cost.ns * (1 - 1 / reductions)), round(backwards), round(reductions)
    which = f"all {passes}" if reduced == passes else f"{reduced} of the {passes}"
    summary = (
        f"{cost.text('Communication takes')}, and {none_late}: {which} backward passes of a step "
        "average the gradients, where the last one is enough."
    )
    action = (
        f"Run all but the last of the {passes} micro-batches of a step, forward and backward, under model.no_sync()."
    )
    return cost.finding(summary, action, gain)
