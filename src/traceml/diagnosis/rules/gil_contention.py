"""Other Python threads that compute: while one runs Python code, the training waits for the GIL.

The training thread then neither runs nor waits for a core, in phases in which it only computes. The kernel's counters
show that. The CPU time of the other threads shows that it waits for the lock: one of them runs meanwhile. On a host
whose cores others use, such a thread has the lock also while it waits for a core, for as much of its time as the main
thread does. There threads of torch may be waited for, too, where it has several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from traceml.diagnosis.facts.blamed_lines import BlamedLine, threads_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_shares import NAMED_SHARE, busy_share, thread_wait_share
from traceml.diagnosis.findings import Explanation, Finding, known_facts
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.rules.loading_advice import WORTHWHILE
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork
from traceml.diagnosis.steps.speedup import speedup
from traceml.formatting import cores_text, gain_text, ns_text, percent_text, ranks_text

__all__ = ["background_threads", "gil_contention"]

MIN_CORES = 0.25
"""Other threads that use fewer cores while they are busy are no cause."""
SIDE_RATIO = 3.0
"""Nor are those of late ranks that use less than this multiple of what the other ranks' do."""
EXPLAINED = 0.5
"""The other threads computed for at least this share of the time in which the training waited."""
MAX_BUSY = 0.9
"""A training thread that computes for more of its phases waits for nothing: the main thread is another one."""
_MIN_READY = 0.05


def gil_contention(work: OwnWork, facts: JobFacts, step_ns: float) -> Finding | None:
    """Return the finding about waits for the GIL on all ranks; those of some make these late.

    The time of a step outside the computing phases is taken for waiting of another kind, so it is the least.
    """
    if work.device or not facts.thread_lines:
        return None

    idle = facts.samples.idle_ns()
    waits = [asleep - max(wall - work.compute_ns, 0.0) for wall, asleep in idle.values()]
    cost, cores = min(waits, default=0.0), _cores(facts, idle)
    wanted = cores / max(1.0 - facts.wait_share, _MIN_READY) if facts.threads == 1 else cores
    if cost < least_cost_ns(step_ns) or wanted < max(MIN_CORES, EXPLAINED * cost / step_ns) or _computes(facts):
        return None

    cost = min(cost, step_ns)
    line = threads_line(facts.thread_lines)
    gain = speedup(step_ns, cost)
    return Finding.of(
        Kind.GIL_CONTENTION,
        summary=(
            f"Other threads {'of each rank' if facts.world_size > 1 else 'of the script'} use {cores_text(cores)}"
            f"{line.of_it if line else ''}. While one of them runs Python code, the training waits for the "
            f"interpreter's lock (GIL): at least {ns_text(cost)} of each {ns_text(step_ns)} step "
            f"({percent_text(cost / step_ns)}); without that steps would be {gain_text(gain, 'at least')}."
        ),
        next=_advice(line) + _if_steps_need_it(cores * step_ns, cost, step_ns),
        evidence=known_facts(
            step_ms=step_ns / 1e6,
            waiting_ms=cost / 1e6,
            background_cores=cores,
            **({} if line is None else {"file": line.file, "line": line.line, "function": line.function}),
        ),
        cost_share=cost / step_ns,
        speedup_if_fixed=gain,
    )


def _cores(facts: JobFacts, ranks: Iterable[int]) -> float:
    """Return the cores that other Python threads of each rank used while they were busy, the least over ranks."""
    cpu_ns, watched_ns = Counter[int](), Counter[int]()
    for each in facts.thread_lines:
        cpu_ns[each.rank] += each.cpu_ns
        watched_ns[each.rank] += each.watched_ns

    return min((cpu_ns[rank] / max(watched_ns[rank], 1) for rank in ranks), default=0.0)


def _computes(facts: JobFacts) -> bool:
    """Return whether the training computes in its phases, whatever the main thread does.

    Either its thread is on a core, or the main thread waits there for threads that train, as replicas do.
    """
    if thread_wait_share(facts.lines, COMPUTE) >= NAMED_SHARE:
        return True

    shares = [share for part in COMPUTE if (share := busy_share(facts.lines, part)) is not None]
    return min(shares, default=0.0) > MAX_BUSY


def _advice(line: BlamedLine | None, on_ranks: str = "") -> str:
    what = "what the other threads do (`py-spy dump` shows it)" if line is None else line.place
    return (
        f"Move {what} into another process{on_ranks} (multiprocessing, or a DataLoader's workers if it makes batches), "
        "or run it less often: a thread of Python code takes the interpreter from the training."
    )


def _if_steps_need_it(computed_ns: float, cost: float, step_ns: float) -> str:
    """Return further advice if one process, doing the work of the threads, could not keep up with the steps.

    Args:
        computed_ns: for how long the threads compute during a step.
    """
    if computed_ns <= step_ns - cost:
        return ""

    gain = step_ns / computed_ns
    with_one = f"with one, steps are {gain_text(gain, 'at most')}" if gain >= WORTHWHILE else "one alone gains nothing"
    return (
        f" It computes for {ns_text(computed_ns)} of each step: where steps need it, as batches, divide it among "
        f"several processes; {with_one}."
    )


def background_threads(facts: JobFacts, ranks: Sequence[int]) -> Explanation | None:
    """Explain late ranks by the cores that their other threads use; None if they use few, or the others' as many.

    Such a rank is slower in everything that runs Python, though it neither computes more nor waits for a core.
    """
    used = facts.samples.background_cores()
    mine = [used[rank] for rank in ranks if rank in used]
    others = [cores for rank, cores in used.items() if rank not in ranks]
    if len(mine) < len(ranks) or not others or min(mine) < max(MIN_CORES, SIDE_RATIO * max(others)):
        return None

    line = threads_line([each for each in facts.thread_lines if each.rank in ranks])
    whose, each = ranks_text(ranks), " each" if len(ranks) > 1 else ""
    use, usual = cores_text(float(np.mean(mine))), cores_text(float(np.median(others)))
    text = (
        f" Other threads of {whose} used {use}{each}{line.of_it if line else ''} (those of the others {usual}): while "
        "one runs Python code, the training waits for the GIL."
    )
    return Explanation(text, _advice(line, f" on {whose}"))
