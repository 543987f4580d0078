"""Change over time: steps that grow, jump and stay, jump and recover, or are slow at first.

The rules look at the usual step in equal bins of the whole run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.diagnosis.advice import WAITED_FOR, flush_denormals
from traceml.diagnosis.facts.blamed_lines import BlamedLine, calls_collectives, changed_line, outside_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.sampled_shares import MIN_SAMPLES, of_part
from traceml.diagnosis.facts.trainings.trainer_calls import calls_trainer, own_line
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.kinds import Kind, Severity, least_cost_ns
from traceml.diagnosis.rules.coinciding_changes import CORE_WAITS, SideChange, changes, core_wait, larger_batches
from traceml.diagnosis.steps.change_points import MIN_FACTOR, LevelChange, growth, level_change
from traceml.diagnosis.steps.own_work import COMPUTE
from traceml.diagnosis.steps.speedup import speedup_of_share
from traceml.diagnosis.steps.step_history import StepHistory
from traceml.formatting import count_text, factor_text, ns_text, percent_text, phase_words, phases_text, ranks_text

__all__ = ["is_continued", "is_of_the_host", "slowdown", "with_steps_from_history", "with_steps_from_slowdown"]

MIN_FACTOR_ALIKE = 1.25
"""A slow part is slower by this factor where all phases are: on shared hosts, speed varies."""
MIN_ALIKE_NS = 10e9
"""And the slow part lasts so long: programs that come and go take cores for seconds."""
SIMILAR_FACTOR = 0.5
"""If the rest of the step is slower by this share of the blamed phase's factor, all phases are."""
MIN_COMPUTE_NS = 3e9
"""A slow part of one computing phase lasts so long where the ranks had their cores, as counted by the kernel."""
MIN_COMPARED_SHARE = 0.25
"""And the rest of a rank's work, which is not slower, is at least this share of that phase."""
NOT_OF_CORES = 2.5
"""By this factor steps do not become slower because a core does: another thread on it, or its clock."""
FAR_SLOWER = 4.0
"""Phases that become slower by this factor more than the rest, which is as long, do so on any host."""
FEWEST_SAMPLES = 5
"""Fewer samples of the slow steps do not show that they run no other line than the steps before."""
HAS_CORE_WAIT = 0.05
"""A rank has its core if it waits for one for less of the time."""
OF_MEAN = 0.5
"""Steps became slower only if the mean step is longer by this share of what the usual one is, by medians of bins."""
SOME_RANKS_SHARE = 1 / 3
"""Ranks are blamed if the others' work grows by less than this share of theirs."""
SAME_CHANGE = 0.1
"""Changes whose first steps differ by less than this share of their number are the same."""
MIN_COST_RATIO = 0.5
"""Ranks that are late only in the slow part cost about as much as it does; those late before it too, more than that."""
END_SHARE = 0.1
"""Ranks that are not late in a smaller rest of the run did not recover: the last steps are unlike the others."""
DOMINANT_SHARE = 0.7
"""The phase that has this share of the difference is blamed."""
JOINT_SHARE = 0.9
"""Else phases that have this share of it together are, the fewest that do."""
MIN_REST_SHARE = 0.02
"""The rest of the step is this share of it at least: one without time, as without communication, is no faster."""
EXPLAINED_LOSS = 0.5
"""What explains this share of what the steps lost is a cause of it."""
STILL_SLOWER = 2.5
"""Steps that are this many times as long, also if they had not lost cores, have another cause."""
SAME_PACE = 1.15
"""Steps that are longer by no more than this factor of the growth of their batches have more work, and no fault."""
_COMM = "comm"
_OTHER = "other"
_FOLLOWING = ("backward", "optimizer", _COMM)  # longer for what the phases before them do: a larger graph, more to send
_STEPS = ("shape", "since_step", "until_step", "growth_ms_per_step")
NEARLY_ALL = 0.9
"""If slow steps have this share of a phase, so they have of its samples."""
_OF_CORES = {*CORE_WAITS, "others_cores", "memory_share"}
_PASSES, _CORES_SHARE = {"forward", "backward"}, 0.5


class _SlowParts(NamedTuple):
    """Part of the step that became slower."""

    parts: tuple[str, ...] = ()  # phases that are blamed, the one that may be the cause first; empty if none is
    # phases that have nearly all of it, where fewer cores may be the cause of that; empty if all are alike
    mostly: tuple[str, ...] = ()
    is_loss_of_cores: bool = False  # whether the loss of cores explains it
    line: BlamedLine | None = None  # of the first phase, by which the slow steps are longer
    phase_share: float = 0.0  # that phase's share of them

    @property
    def text(self) -> str:
        """The end of the sentence; empty if cores were taken."""
        if len(self.parts) == 1:
            return f", in {phase_words(self.parts[0])}" + (self.line.of_it if self.line else "")

        if self.parts:
            return f", in {phases_text(self.parts, self.line.place if self.line else None)}"

        if self.mostly:
            return f", most of it in {phases_text(self.mostly, None)}"

        return "" if self.is_loss_of_cores else ", in all phases alike"

    def evidence(self) -> dict[str, Any]:
        """Return the phases, if there are several, and the line."""
        phases = {"phases": list(self.parts)} if len(self.parts) > 1 else {}
        return phases | (self.line.evidence(self.phase_share) if self.line else {})


def slowdown(bins: StepHistory, facts: JobFacts, late: Collection[tuple[int, ...]] = ()) -> list[Finding]:
    """Return the finding about steps that became slower, or were slow at first.

    Args:
        late: groups of ranks that are known to be late.
    """
    change = _change(bins, facts)
    if change is None or not _is_clear(bins, change, facts, late) or not _is_of_mean(bins, change):
        return []

    mean, lost = _mean_and_lost(bins, change)
    if lost < least_cost_ns(mean):
        return []

    return [_finding(bins, change, lost, mean, facts)]


def _mean_and_lost(bins: StepHistory, change: LevelChange) -> tuple[float, float]:
    mean = float(np.average(bins.step_ns, weights=bins.steps))
    lost = ((bins.step_ns - change.before_ns) * bins.steps)[change.bins].sum() / bins.steps.sum()
    return mean, float(lost)


def _change(bins: StepHistory, facts: JobFacts) -> LevelChange | None:
    """Return how the steps change; as steady growth where that of one phase looks like a jump on a busy host."""
    change = level_change(bins.step_ns)
    part = None if change is None or change.shape == "growth" else _part(bins, change, facts)
    if part in (None, *COMPUTE, _COMM):
        return change

    own = growth(bins.parts_ns[part])
    if own is None:
        return change

    rest_ns = float(np.median(bins.step_ns - bins.parts_ns[part]))
    return replace(own, before_ns=rest_ns + own.before_ns, after_ns=rest_ns + own.after_ns)


def _is_clear(bins: StepHistory, change: LevelChange, facts: JobFacts, late: Collection[tuple[int, ...]]) -> bool:
    """Return whether the slow part is slow enough; where a busy host makes the same picture, also long enough."""
    parts = _parts(bins, change, facts)
    if (len(parts) == 1 and parts[0] not in (*COMPUTE, _COMM)) or _ranks(bins, change) in late:
        return change.factor >= MIN_FACTOR

    lasted_ns = float((bins.step_ns * bins.steps)[change.bins].sum())
    is_known = bool(parts) and (_COMM not in parts or change.factor >= NOT_OF_CORES)
    is_sure = is_known and (_has_cores(bins, change, parts, facts) or _are_far_slower(bins, change, parts))
    return change.factor >= MIN_FACTOR_ALIKE and lasted_ns >= (MIN_COMPUTE_NS if is_sure else MIN_ALIKE_NS)


def _is_of_mean(bins: StepHistory, change: LevelChange) -> bool:
    """Return whether the mean step became longer, too, by much of what the usual one did.

    Steps that wait for several workers at once may come to wait for one each, which takes no longer.
    """
    if not len(bins.single_steps):
        return True

    until = np.concatenate([[0.0], bins.single_ns.cumsum()])
    starts = np.searchsorted(bins.single_steps, bins.first_step)
    means = (until[starts + bins.steps] - until[starts]) / bins.steps
    usual, slow = _usual_and_slow(bins, change)
    by_mean, by_median = (float(np.median(each[slow]) - np.median(each[usual])) for each in (means, bins.step_ns))
    return by_mean >= OF_MEAN * by_median


def _has_cores(bins: StepHistory, change: LevelChange, parts: Sequence[str], facts: JobFacts) -> bool:
    """Return whether ranks had their cores meanwhile: the kernel counted, and other work did not become slower.

    If there is no other work to compare with, the steps are far slower than a core that is shared would make them.
    """
    usual, _ = _levels_of(bins, change)
    own = sum(usual[part] for part in parts)
    compared = sum(value for name, value in usual.items() if name not in (*parts, _COMM))
    waited = facts.samples.use(*_steps_of(bins, change), _ranks(bins, change)).waited
    is_compared = compared >= MIN_COMPARED_SHARE * own or change.factor >= NOT_OF_CORES
    return waited is not None and waited < HAS_CORE_WAIT and is_compared


def _are_far_slower(bins: StepHistory, change: LevelChange, parts: Sequence[str]) -> bool:
    """Return whether some phases become slower by far more than the rest, which is as long: it is no lack of cores."""
    if change.shape != "stays":  # another program that comes and goes may take the core in these phases
        return False

    usual, slow = _levels_of(bins, change)
    rest = [name for name in usual if name not in (*parts, _COMM)]
    (own, own_then), (others, others_then) = ((_sum(usual, each), _sum(slow, each)) for each in (parts, rest))
    return others >= own > 0 and own_then / own >= FAR_SLOWER * max(others_then / others, 1.0)


def _finding(bins: StepHistory, change: LevelChange, lost: float, mean: float, facts: JobFacts) -> Finding:
    ranks = _ranks(bins, change)
    beside = [*_batches(bins, change), *_use(bins, change, facts, ranks)]
    is_loss_of_cores = _is_loss_of_cores(change, beside)
    share = lost / mean * bins.of_run
    # Where cores were taken, whatever runs takes longer: no phase or line is the cause.
    where = _SlowParts(is_loss_of_cores=True) if is_loss_of_cores else _place(bins, change, facts, ranks)
    part = where.parts[0] if where.parts else None
    if ranks:
        bins, change = _of_ranks(bins, change, ranks, part)

    is_meant = not ranks and any(each.is_work for each in beside)
    evidence = {
        **_steps_evidence(bins, change),
        "factor": change.factor,
        "before_ms": change.before_ns / 1e6,
        "after_ms": change.after_ns / 1e6,
        **({"changed": {each.name: [each.before, each.then] for each in beside}} if beside else {}),
        **where.evidence(),
    }
    whose = f", because of {ranks_text(ranks)}" if ranks else ""
    # A part that grew by more than the loss of cores explains has another cause, be its line known or not.
    is_other = where.line is not None or (bool(where.parts) and bool(beside) and beside[0].takes_cores)
    is_beside = bool(beside) and (is_meant or where.is_loss_of_cores or not is_other)
    return Finding.of(
        Kind.SLOWDOWN,
        severity=Severity.INFO if is_meant else None,
        ranks=ranks,
        phase=part,
        summary=_summary(change, evidence, None if is_meant else share, whose + where.text) + _meanwhile(beside),
        next=beside[0].advice if is_beside else _advice(change, where, ranks, facts),
        evidence=evidence,
        cost_share=share,
        speedup_if_fixed=1.0 if is_meant or _may_be_work(change, where) else speedup_of_share(share),
    )


def _may_be_work(change: LevelChange, where: _SlowParts) -> bool:
    """Return whether steps may have more work from one to the next, as longer episodes of a policy that learns.

    What a script keeps makes one pass longer, or code outside the model.
    """
    return change.shape == "growth" and _PASSES.issubset(where.parts)


def _place(bins: StepHistory, change: LevelChange, facts: JobFacts, ranks: tuple[int, ...]) -> _SlowParts:
    parts = _parts(bins, change, facts)
    if not parts:
        return _SlowParts(mostly=_together(*_levels_of(bins, change)))

    line, phase_share = (None, 0.0) if parts[0] == _COMM else _line(bins, change, facts, parts[0], ranks)
    if parts[0] == _OTHER and line is None and _may_be_cores(change, facts):
        return _SlowParts(is_loss_of_cores=True)

    return _SlowParts(parts, line=line, phase_share=phase_share)


def _steps_evidence(bins: StepHistory, change: LevelChange) -> dict[str, Any]:
    usual_ns, slow_ns = change.before_ns, change.after_ns
    since = int(bins.first_step[change.first])
    if change.first and change.shape != "growth":
        since = bins.edge(change.first, usual_ns, slow_ns)

    end = bins.edge(change.last, slow_ns, usual_ns) if change.last < len(bins.steps) else None
    per_step = (slow_ns - usual_ns) / max(int(bins.first_step[-1] - bins.first_step[change.first]), 1)
    return {
        "shape": change.shape,
        "since_step": since,
        **known_facts(until_step=end),
        **({"growth_ms_per_step": per_step / 1e6} if change.shape == "growth" else {}),
    }


def _of_ranks(
    bins: StepHistory, change: LevelChange, ranks: tuple[int, ...], part: str | None
) -> tuple[StepHistory, LevelChange]:
    """Return the history and its change by the work of these ranks alone: what else varies moves its first step."""
    alone = bins.of_ranks(ranks, part)
    own = level_change(alone.step_ns)
    return (bins, change) if own is None or own.shape != change.shape else (alone, own)


def _line(
    bins: StepHistory, change: LevelChange, facts: JobFacts, part: str, ranks: tuple[int, ...]
) -> tuple[BlamedLine | None, float]:
    """Return the line by which the slow steps are longer, and the share of them that the phase has.

    Without samples that are told apart by steps, it is the line that has most of the phase in the whole run.
    """
    usual, slow = _usual_and_slow(bins, change)
    starts = [*bins.first_step.tolist(), bins.end]
    at = np.flatnonzero(slow)
    seen, before = facts.divided_lines(range(starts[at[0]], starts[at[-1] + 1]))
    if not seen or not before:
        share = _share(bins, part, np.ones(len(slow), bool))
        return own_line(facts.lines, part, share, ranks), share

    if ranks:
        seen, before = ([each for each in some if each.rank in ranks] for some in (seen, before))

    share = _share(bins, part, slow)
    pace = float(np.median(bins.step_ns[usual]) / max(np.median(bins.step_ns[slow]), 1.0))
    line = changed_line(seen, part, share, before, pace)
    of_run = _share(bins, part, np.ones(len(slow), bool))
    if line is None and _part_ns(bins, part, slow) >= NEARLY_ALL * _part_ns(bins, part, slow | True):
        line = own_line([*seen, *before], part, of_run)  # whenever the samples were taken, they are of slow steps

    line = line or _line_of_few(seen, before, part, of_run)

    return None if line is None or calls_trainer(seen, line) else line, share


def _line_of_few(
    seen: Sequence[SampledLine], before: Sequence[SampledLine], part: str, share: float
) -> BlamedLine | None:
    """Return the line that has most of a phase in all steps, where slow ones have few samples, none of another.

    Beside other programs the sampler runs seldom, and its intervals may have nearly all samples of a short run before
    its last steps.
    """
    of_slow = of_part(seen, part)
    if not FEWEST_SAMPLES <= sum(each.samples for each in of_slow) < MIN_SAMPLES:
        return None

    line = own_line([*seen, *before], part, share)
    place = (line.file, line.function) if line else None
    return line if all((each.file, each.function) == place for each in of_slow) else None


def _part_ns(bins: StepHistory, part: str, at: NDArray[np.bool_]) -> float:
    return float((bins.parts_ns[part] * bins.steps)[at].sum())


def _share(bins: StepHistory, part: str, at: NDArray[np.bool_]) -> float:
    return _part_ns(bins, part, at) / max(float((bins.step_ns * bins.steps)[at].sum()), 1.0)


def _batches(bins: StepHistory, change: LevelChange) -> list[SideChange]:
    """Return that batches were larger, where that explains half of what the steps lost, or all of it."""
    if not len(bins.elements):
        return []

    parts = _usual_and_slow(bins, change)
    usual, slow = (float(np.median(bins.elements[at])) for at in parts)
    if usual <= 0 or 1 - usual / slow < EXPLAINED_LOSS * (1 - 1 / change.factor):
        return []

    usual_ns, slow_ns = (float(np.median(bins.step_ns[at])) for at in parts)
    return [larger_batches(usual, slow, explains_all=slow_ns / usual_ns <= SAME_PACE * slow / usual)]


def _use(bins: StepHistory, change: LevelChange, facts: JobFacts, ranks: tuple[int, ...]) -> list[SideChange]:
    """Return what else changed on the hosts in the slow steps; in the last third against the first where all grow."""
    starts = [*bins.first_step.tolist(), bins.end]
    hosts: set[str | None] = set(facts.hosts.values())
    is_limited = all(map(facts.has_memory_limit, hosts or {None}))
    if change.shape == "growth":
        end, begin = _ends_of_growth(change)
        usual, slow = (bins.start, starts[end]), (starts[begin], bins.end)
    else:
        usual = (bins.start, starts[change.first]) if change.first else (starts[change.last], bins.end)
        slow = _steps_of(bins, change)

    # Workers that have no core make batches late, while the training has its own.
    is_of_data = _part(bins, change, facts) == "input_wait"
    waits = (facts.workers_waited(*steps) if is_of_data else None for steps in (usual, slow))
    of_workers = core_wait("workers_wait_share", "the loader workers", *waits)
    found = changes(
        facts.samples.use(*usual, ranks=ranks),
        facts.samples.use(*slow, ranks=ranks),
        memory_of="container" if is_limited else "host",
        use_of=ranks_text(ranks) if ranks else "the training",
    )
    return found if of_workers is None else [of_workers, *found]


def _steps_of(bins: StepHistory, change: LevelChange) -> tuple[int, int]:
    starts = [*bins.first_step.tolist(), bins.end]
    return max(starts[change.first], 1), starts[change.last]


def _is_loss_of_cores(change: LevelChange, beside: Sequence[SideChange]) -> bool:
    """Return whether the loss of cores explains half of what the steps lost, and they would not be far slower without.

    A list that grows takes a core more often, too: what uses more of them waits more for them.
    """
    # What a step would be shorter by if its thread had its core as often as in the others.
    waits = [(each.before, each.then) for each in beside if each.name in CORE_WAITS]
    waited = max((1 - (1 - then) / max(1 - before, 0.01) for before, then in waits), default=0.0)
    taken = any(each.takes_cores and each.name not in CORE_WAITS for each in beside)
    is_cause = waited >= (0.25 if taken else EXPLAINED_LOSS) * (1 - 1 / change.factor)
    return is_cause and change.factor * (1 - waited) < STILL_SLOWER


def _may_be_cores(change: LevelChange, facts: JobFacts) -> bool:
    """Return whether the cause may be that the ranks had a core for a small and varying share of the time.

    Other code enters the kernel most often, and so loses its core there.
    """
    return facts.oversubscribed and change.factor * (1.0 - facts.wait_share) < 1.0


def _meanwhile(beside: Sequence[SideChange]) -> str:
    return "".join(f" {'Meanwhile' if not at else 'And'} {each.text}." for at, each in enumerate(beside[:2]))


def _part(bins: StepHistory, change: LevelChange, facts: JobFacts) -> str | None:
    """Return the phase that has most of the difference, and grew by far more than the rest; None if all grew.

    With too few cores each computing phase counts by itself: what else varies would hide that it grew.
    """
    usual, slow = _levels_of(bins, change)
    differences = {name: slow[name] - usual[name] for name in usual}
    whole = sum(value for value in differences.values() if value > 0)
    part = max(differences, key=lambda name: differences[name], default=None)
    if part is None or not differences[part] >= DOMINANT_SHARE * whole > 0:
        return None

    rest, more = (sum(values.values()) - values[part] for values in (usual, differences))
    similar = SIMILAR_FACTOR * differences[part] / max(usual[part], 1.0)
    if facts.oversubscribed and any(differences[name] >= similar * usual[name] for name in _compared(usual, part)):
        return None

    return part if more / max(rest, 1.0) < similar else None


def _parts(bins: StepHistory, change: LevelChange, facts: JobFacts) -> tuple[str, ...]:
    """Return the phases that became longer while the rest did not, the one that may be the cause first; none if all.

    Where a part of the run has fewer cores, or they are slower, some phases become longer than others, too: several are
    named together only if steps are slower than that would make them, or the ranks had their cores. Communication also
    takes longer where ranks meet later: it is among them only in the first case.
    """
    part = _part(bins, change, facts)
    if part is not None:
        return (part,)

    parts = _together(*_levels_of(bins, change))
    if change.factor >= NOT_OF_CORES:
        return parts

    return parts if parts and _COMM not in parts and _has_cores(bins, change, parts, facts) else ()


def _together(usual: Mapping[str, float], slow: Mapping[str, float]) -> tuple[str, ...]:
    """Return the fewest phases that have nearly all of the difference; none if the rest became slower, too."""
    differences = {name: slow[name] - usual[name] for name in usual}
    ordered = sorted(usual, key=lambda name: -differences[name])
    whole = sum(value for value in differences.values() if value > 0)
    some = next(
        (
            ordered[:count]
            for count in range(1, len(ordered))
            if _sum(differences, ordered[:count]) >= JOINT_SHARE * whole
        ),
        [],
    )
    rest = [name for name in ordered if name not in some]
    own, least = _sum(usual, some), SIMILAR_FACTOR * _sum(differences, some)
    if _sum(usual, rest) < MIN_REST_SHARE * sum(usual.values()):
        return ()

    if not some or whole <= 0 or _sum(differences, rest) * max(own, 1.0) >= least * max(_sum(usual, rest), 1.0):
        return ()

    return tuple(sorted(some, key=lambda name: name in _FOLLOWING))


def _sum(values: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(values[name] for name in names)


def _compared(usual: Mapping[str, float], part: str) -> list[str]:
    """Return the other computing phases that are long enough to compare one with."""
    least = MIN_COMPARED_SHARE * usual[part]
    return [name for name in COMPUTE if name != part and usual.get(name, 0.0) >= least] if part in COMPUTE else []


def _ranks(bins: StepHistory, change: LevelChange) -> tuple[int, ...]:
    """Return the ranks whose own work alone became longer; empty for all."""
    if len(bins.own_ns) < 2:
        return ()

    usual, slow = _usual_and_slow(bins, change)
    longer = np.median(bins.own_ns[:, slow], axis=1) - np.median(bins.own_ns[:, usual], axis=1)
    late = longer >= 0.5 * longer.max()
    whole = float(np.median(bins.step_ns[slow]) - np.median(bins.step_ns[usual]))
    if 2 * late.sum() > len(late) or longer.max() < DOMINANT_SHARE * whole:
        return ()

    return tuple(bins.ranks[late].tolist()) if longer[~late].max() < SOME_RANKS_SHARE * longer.max() else ()


def _ends_of_growth(change: LevelChange) -> tuple[int, int]:
    """Return the bin at which the usual steps end, and that at which the slow ones begin: the last third."""
    third = (change.last - change.first) // 3
    return change.first or third, change.last - third


def _usual_and_slow(bins: StepHistory, change: LevelChange) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the bins outside and inside the slow part; of growth the first third, or those before, and the last."""
    at = np.arange(len(bins.steps))
    if change.shape == "growth":
        end, begin = _ends_of_growth(change)
        return at < end, at >= begin

    slow = (at >= change.first) & (at < change.last)
    return ~slow, slow


def _levels_of(bins: StepHistory, change: LevelChange) -> tuple[dict[str, float], dict[str, float]]:
    usual, slow = _usual_and_slow(bins, change)
    return _medians(bins, usual), _medians(bins, slow)


def _medians(bins: StepHistory, at: NDArray[np.bool_]) -> dict[str, float]:
    return {name: float(np.median(values[at])) for name, values in bins.parts_ns.items()}


def _summary(change: LevelChange, evidence: Mapping[str, Any], share: float | None, where: str) -> str:
    usual, slow = ns_text(change.before_ns), ns_text(change.after_ns)
    cost = "." if share is None else f"; that costs {percent_text(share)} of step time."
    if change.shape == "growth":
        per_step = ns_text(1e6 * evidence["growth_ms_per_step"])
        since = f"Since step {count_text(evidence['since_step'])} steps" if change.first else "Steps"
        return f"{since} grow by {per_step} each, from {usual} to {slow}{where}{cost}"

    longer = f"a step takes {factor_text(change.factor)} as long ({slow} instead of {usual}){where}{cost}"
    since, until = (count_text(evidence.get(name)) for name in ("since_step", "until_step"))
    if change.shape == "stays":
        return f"Since step {since} {longer}"

    return f"Until step {until} {longer}" if change.shape == "first" else f"From step {since} to step {until} {longer}"


def with_steps_from_slowdown(late: Finding, slower: Finding) -> Finding:
    """Return a finding about late ranks with the steps in which they are; unchanged where others became slower."""
    if not _is_same_cause(late, slower):
        return late

    return _timed(late, {name: slower.evidence[name] for name in _STEPS if name in slower.evidence})


def with_steps_from_history(late: Finding, bins: StepHistory) -> Finding:
    """Return a finding about late ranks with the steps in which they are, by their work alone; others unchanged."""
    if not (late.kind.rule.is_straggler and late.ranks) or not len(bins.ranks):
        return late

    alone = bins.of_ranks(late.ranks, late.phase)
    change = level_change(alone.step_ns)
    if change is None or (change.shape == "first" and change.last > (1 - END_SHARE) * len(alone.step_ns)):
        return late

    mean, lost = _mean_and_lost(alone, change)
    return _timed(late, _steps_evidence(alone, change)) if lost >= MIN_COST_RATIO * late.cost_share * mean else late


def _timed(late: Finding, evidence: Mapping[str, Any]) -> Finding:
    since, until = (count_text(evidence.get(name)) for name in ("since_step", "until_step"))
    has, was = ("It has", "It was") if len(late.ranks) == 1 else ("They have", "They were")
    when = {
        "stays": f"{has} been slow since step {since}.",
        "first": f"{was} slow until step {until}.",
        "recovers": f"{was} slow from step {since} to step {until}.",
        "growth": f"The difference grows by {ns_text(1e6 * evidence.get('growth_ms_per_step', 0.0))} with each step.",
    }
    text = f"{late.summary} {when[evidence['shape']]}"
    return replace(late, summary=text, evidence={**late.evidence, **evidence})


def _is_same_cause(late: Finding, slower: Finding) -> bool:
    """Return whether steps became slower because of ranks that are late, and were not late before."""
    same = slower.phase in (None, late.phase)
    same = same and (slower.evidence["shape"] == "growth" or slower.cost_share >= MIN_COST_RATIO * late.cost_share)
    return late.kind.rule.is_straggler and bool(slower.ranks) and slower.ranks == late.ranks and same


def is_continued(of_training: Finding, of_run: Finding) -> bool:
    """Return whether the slowdown in one of several trainings is that of the whole run, not caused by another model."""
    if of_run.phase in (None, _COMM, *COMPUTE) or of_run.phase != of_training.phase:
        return False

    since, same = (each.evidence["since_step"] for each in (of_run, of_training))
    return of_run.evidence["shape"] == "growth" or bool(abs(since - same) <= SAME_CHANGE * max(since, same))


def is_of_the_host(slower: Finding, contention_share: float = 0.0) -> bool:
    """Return whether nothing but the cores changed when steps became slower, in all phases.

    Some ranks alone became slower because of the cores only if they waited for these. It is also so in forward and
    backward only, in no line, if waiting for cores costs much of it: torch's threads wait for each other there, so
    that one core less costs a step several times its length.
    """
    changed = slower.evidence.get("changed", ())
    alike = slower.phase is None or (
        _PASSES.issubset(slower.evidence.get("phases", ()))
        and "function" not in slower.evidence
        and contention_share >= _CORES_SHARE * slower.cost_share
    )
    waited = not slower.ranks or "cpu_wait_share" in changed
    return slower.kind is Kind.SLOWDOWN and alike and waited and _OF_CORES.issuperset(changed)


def _may_read_ahead(part: str | None, facts: JobFacts) -> bool:
    return part == "input_wait" and facts.loader is not None and not facts.loader_workers


def _for_growing_messages(facts: JobFacts) -> str:
    """Return the advice about communication that takes longer from step to step."""
    caller = outside_line(facts.lines, _COMM)
    is_known = caller is not None and calls_collectives(facts.lines, _COMM, caller)
    return (
        f"Look at how much {caller.place if caller and is_known else 'the script'} sends: an object that grows "
        "(all_gather_object of a list), or larger tensors. Otherwise at the links between the ranks, and at what "
        "else uses them."
    )


def _advice(change: LevelChange, where: _SlowParts, ranks: tuple[int, ...], facts: JobFacts) -> str:
    part = where.parts[0] if len(where.parts) == 1 else None
    known = _for_shape(change.shape, part, where, facts)
    if known is not None:
        return known

    meanwhile = " Loader workers (num_workers) can read ahead meanwhile." if _may_read_ahead(part, facts) else ""
    if where.line is not None:
        waits = part is not None and facts.waits_in(part, where.line)
        what = f"waits for then ({WAITED_FOR}): it does not compute" if waits else "does only then"
        return f"Look at what {where.line.place} {what}.{meanwhile}"

    return _for_part(part, where, f" of {ranks_text(ranks)}" if ranks else "", meanwhile)


def _for_shape(shape: str, part: str | None, where: _SlowParts, facts: JobFacts) -> str | None:
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
            f"run, and loader workers (num_workers) would fetch samples while the model computes. Otherwise look at "
            f"what "
            "it does only then."
        )

    if shape != "growth":
        return None

    if _PASSES.issubset(where.parts):
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

    return _for_growing_messages(facts) if _COMM in where.parts else None


def _for_part(part: str | None, where: _SlowParts, of_ranks: str, meanwhile: str) -> str:
    """Return the advice where no line is known.

    Args:
        of_ranks: ` of ranks 1 and 2`, if only some became slower.
        meanwhile: a sentence about reading ahead, or nothing.
    """
    of_host = f"other programs on the host{of_ranks}, clocks lowered by heat or power, and swapping at that time."
    if not where.parts and not where.mostly:  # also where cores were taken
        return (
            "All phases are slower, so no single piece of code is the cause. If steps have no more work then "
            f"(longer episodes or sequences), look for {of_host}"
        )

    if part == _COMM:
        return (
            "No rank's own work is longer: look at the links between the ranks at that time, at what else uses them, "
            "and at how much data is reduced."
        )

    if part == "input_wait":
        return (
            f"Look at the data{of_ranks} from that step on: larger files, another shard, a page cache that no longer "
            f"holds it.{meanwhile}"
        )

    phases = phases_text(where.parts or where.mostly, None)
    what = "batch size, sequence length, recompilation, a growing list"
    if where.parts:
        return f"Look at what changes in {phases}{of_ranks} then: {what}."

    return f"If {phases} have more work then ({what}), look at that. Otherwise for {of_host}"
