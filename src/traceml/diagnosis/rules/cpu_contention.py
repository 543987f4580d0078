"""Too few CPU cores: the training is ready to run and does not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from traceml.database.schema import Resource
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Explanation, Finding, known_facts
from traceml.diagnosis.kinds import WARNING_SHARE, Kind
from traceml.diagnosis.rules.near_limits import QUOTA_ADVICE
from traceml.diagnosis.steps.speedup import speedup_of_share
from traceml.formatting import capitalized, cores_text, percent_text, ranks_text

__all__ = ["cpu_contention", "is_oversubscribed_by_others"]

OTHERS_CORES = 0.5
"""Other programs are named if they use this many cores or more."""
_MAX_SHARE = 0.9
"""The gain is that of this share of the time at most."""
_MIN_COUNTED_S = 1.0
"""In less training than this the first steps and the start-up before them are most of what was counted."""
_MOSTLY = 0.5
"""From this share on, waiting for other programs is a finding of its own, not a remark on another one."""
_IN_SCRIPT = " (or torch.set_num_threads, where the script calls that)"
_MIN_OTHERS_SHARE = 0.1
"""Other programs use what the run does not if that is at least this share; less is noise of the counts."""
_NAMED = 3
_ADVICE_BOUND = (
    "Bind each rank to cores of its own, or none of them: look for os.sched_setaffinity in the script, taskset or "
    "numactl around it, and OMP_PROC_BIND, OMP_PLACES or GOMP_CPU_AFFINITY in the environment, which bind "
    "all processes of a host alike. If the job was given no others, ask for as many cores as ranks."
)
_OWN_CORES = ", or give the training cores of its own (a container's CPU limit, taskset, Slurm's --cpus-per-task)"
_ADVICE_OTHERS = "End or move the other programs on this host (`top` names them)"
_ADVICE_SCRIPT = (
    "Let the processes that the script starts take fewer cores (fewer processes, fewer threads in each), run them "
    "before the training or on another host"
)
_ADVICE_EITHER = (
    "Look at what uses the cores (`top` names it): end or move other programs, start fewer processes in the script"
)
_TOO_FEW = "The run itself needs more cores than there are"
_AT_ONCE = "Not all cores are used, but some are needed at the same moments"
_ALL_USED = 0.9
"""All cores of a host are used from this share on."""
_SOME_SHARE = 0.25
"""Some ranks of a job are named from this share on, where most of the others have their cores."""


def cpu_contention(facts: JobFacts) -> Finding | None:
    """Return the finding about ranks that had too few cores."""
    use, (ranks, waited) = facts.use, _waiting(facts)
    counted_s = list(facts.core_wait_s.values())
    if waited < WARNING_SHARE or (counted_s and np.median(counted_s) < _MIN_COUNTED_S):
        return None

    subject = "The ranks" if facts.world_size > 1 else "The training process"
    subject = f"{capitalized(ranks_text(ranks))} of {facts.world_size}" if ranks else subject
    bound = _bound_together(facts) or Explanation()
    throttled = next(
        (each.share for each in facts.limits if each.resource is Resource.CPU_QUOTA and each.is_near), None
    )
    return Finding.of(
        Kind.CPU_CONTENTION,
        ranks=ranks,
        summary=f"{subject} waited for a CPU core for {percent_text(waited)} of the time.{_who(facts, throttled)}"
        f"{bound.text}",
        next=QUOTA_ADVICE if throttled is not None else bound.action or _advice(facts),
        evidence=known_facts(
            cpu_wait_share=waited,
            cores_per_rank=facts.cores_per_rank,
            busy_cores_per_rank=use.busy_cores,
            others_cores=facts.others_cores,
            competing_processes=dict(facts.competing_processes) or None,
            started_processes=dict(facts.started_processes or {}) or None,
            throttled_share=throttled,
            **bound.evidence,
        ),
        cost_share=waited,
        speedup_if_fixed=speedup_of_share(min(waited, _MAX_SHARE)),
    )


def is_oversubscribed_by_others(facts: JobFacts) -> bool:
    """Return whether the ranks spent most of the time waiting for cores that other programs use.

    All their other work then takes less than half of the time, however long it looks by the wall clock. Processes that
    they have started count, but for loader workers.
    """
    return facts.waited_share >= _MOSTLY and _foreign_cores(facts) + _started_cores(facts) >= OTHERS_CORES


def _waiting(facts: JobFacts) -> tuple[tuple[int, ...], float]:
    """Return the ranks that waited, none for all, and their share of the time: the median over them."""
    shares = {rank: facts.wait_of_wall_time.get(rank, share) for rank, share in facts.wait_of_ready_time.items()}
    least = WARNING_SHARE if facts.oversubscribed else _SOME_SHARE
    some = tuple(sorted(rank for rank, share in shares.items() if share >= least))
    if len(some) in (0, len(shares)) or len(shares) < facts.world_size:
        return (), facts.waited_share if facts.oversubscribed else 0.0

    return some, float(np.median([shares[rank] for rank in some]))


def _bound_together(facts: JobFacts) -> Explanation | None:
    """Explain waiting by ranks of a host that are bound to fewer cores than they are; None if there are none."""
    for rank, cores in sorted(facts.bound_cores.items()):
        host = facts.hosts.get(rank)
        here = ((one, own) for one, own in sorted(facts.bound_cores.items()) if facts.hosts.get(one) == host)
        ranks = [one for one, own in here if set(own) <= set(cores)]
        if len(ranks) > len(cores):
            which = f"{'core' if len(cores) == 1 else 'cores'} {', '.join(map(str, sorted(cores)))}"
            text = f" {capitalized(ranks_text(ranks))} may run on {which} only."
            return Explanation(text, _ADVICE_BOUND, {"bound_ranks": ranks, "bound_cores": sorted(cores)})

    return None


def _foreign_cores(facts: JobFacts) -> float:
    """Return the cores that other programs use at least: those that no process of the run can use."""
    others = facts.others_cores or 0.0
    own = _cores_of_workers(facts) if facts.started_processes is None else sum(facts.started_processes.values())
    return others - own if others - own >= _MIN_OTHERS_SHARE * others else 0.0


def _started_cores(facts: JobFacts) -> float:
    """Return the cores that processes of the script use, without loader workers; 0 if it is not known."""
    started = sum((facts.started_processes or {}).values())
    return max(min(started, facts.others_cores or 0.0) - _cores_of_workers(facts), 0.0)


def _cores_of_workers(facts: JobFacts) -> float:
    busy = 1.0 if facts.worker_use is None else facts.worker_use.busy
    return facts.ranks_beside_first * facts.loader_workers * busy


def _others_text(facts: JobFacts) -> str | None:
    """Return who else uses the cores, in words; None if nobody does, or it is not known."""
    others = facts.others_cores
    if others is None or others < OTHERS_CORES:
        return None

    own = ", its loader workers among them," if facts.loader_workers else ""
    if facts.started_processes is None:
        return f"other processes{own} used {cores_text(others)}{_names_text(facts.competing_processes)}"

    started, foreign = min(sum(facts.started_processes.values()), others), _foreign_cores(facts)
    who = "they" if facts.world_size > 1 else "it"
    texts = []
    if started > 0:
        names = _names_text(facts.started_processes)
        texts.append(f"processes that {who} started{own} used {cores_text(started)}{names}")

    if foreign >= OTHERS_CORES:
        texts.append(f"other programs used {cores_text(foreign)}{_names_text(facts.competing_processes)}")

    return ", ".join(texts) or None


def _who(facts: JobFacts, throttled: float | None) -> str:
    if throttled is not None:  # other programs have the cores that the container may not use
        return (
            f" Its container was throttled in {percent_text(throttled)} of the scheduling periods, because its CPU "
            "quota was used up."
        )
    if not facts.cores or facts.use.busy_cores is None:
        return ""

    here = max(facts.cores.values())
    ranks = max(len(facts.hosts), 1)
    each = " each" if ranks > 1 else ""
    others = _others_text(facts)
    own = f"{'a rank' if ranks > 1 else 'it'} used {cores_text(facts.use.busy_cores)}{each if others is None else ''}"
    if others and (facts.others_cores or 0.0) > here:  # of the machine, of which the ranks are bound to a part
        return f" {capitalized(own)}, {others}."

    return f" Of {cores_text(here)}, {own}" + (f", {others}." if others else ".")


def _names_text(processes: Mapping[str, float]) -> str:
    """Return ` (ffmpeg 1.2 cores, processes of other users 0.5)`; empty if no process is known."""
    found = [(name or "processes of other users", cores) for name, cores in processes.items()][:_NAMED]
    if not found:
        return ""

    (first, cores), *rest = found
    return f" ({', '.join([f'{first} {cores_text(cores)}', *(f'{name} {used:.1f}' for name, used in rest)])})"


def _advice(facts: JobFacts) -> str:
    cores = facts.cores_per_rank
    many = bool(facts.threads and cores and facts.threads > cores)
    also = f" Torch has {facts.threads} threads: set OMP_NUM_THREADS={cores}{_IN_SCRIPT}, too." if many else ""
    if _foreign_cores(facts) >= OTHERS_CORES:
        return f"{_ADVICE_OTHERS if facts.started_processes is not None else _ADVICE_EITHER}{_OWN_CORES}.{also}"

    if _started_cores(facts) >= OTHERS_CORES:
        return f"{_ADVICE_SCRIPT}{_OWN_CORES}.{also}"

    threads = f"OMP_NUM_THREADS={cores}{_IN_SCRIPT}" if cores else "a smaller OMP_NUM_THREADS"
    what = ["fewer ranks per host"] if facts.world_size > 1 else []
    what += ["fewer loader workers"] if facts.loader_workers else []
    what += [threads] if facts.threads is None or facts.threads > (cores or 1) else []
    tries = ", or ".join(what or ["more cores"])
    if facts.others_cores is None or (facts.loader_workers and facts.worker_use is None and _others_text(facts)):
        return f"If other programs use the cores (`top` names them), end or move them; otherwise try {tries}."

    used = facts.ranks_beside_first * (facts.use.busy_cores or 0.0) + facts.others_cores
    has_free = used < _ALL_USED * max(facts.cores.values(), default=0)
    return f"{_AT_ONCE if has_free else _TOO_FEW}: try {tries}."
