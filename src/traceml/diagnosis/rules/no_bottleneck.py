"""Verdicts without a bottleneck: HEALTHY, or COMPUTE_BOUND if the step is nearly all computation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.advice import WAITED_FOR, for_debugging, for_rollouts, for_straggler
from traceml.diagnosis.facts.blamed_lines import (
    AUTOGRAD,
    WITHOUT_MODELS,
    BlamedLine,
    blamed_line,
    called_share,
    calls_code,
    calls_model,
    calls_trainer,
    leading_lines,
    main_library,
    main_line_share,
    own_line,
)
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_shares import NAMED_SHARE, fusable_share
from traceml.diagnosis.findings import Explanation, Finding
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.rules.comm import min_wait_ns
from traceml.diagnosis.rules.outside_steps import uncovered_time_text
from traceml.diagnosis.rules.stragglers.late_ranks import slower_ranks
from traceml.diagnosis.stalls.single_pauses import single_pauses, usual_steps
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork
from traceml.formatting import (
    capitalized,
    duration_text,
    gain_text,
    largest_text,
    ns_text,
    percent_text,
    phase_words,
    ranks_text,
)

__all__ = ["for_compute", "nothing_found", "shares_text", "with_costlier_code", "with_optimizer", "with_own_code"]

COMPUTE_SHARE = 0.90
"""From this share of computation a run is COMPUTE_BOUND."""
LAUNCHING_SHARE = 0.75
"""From this one if the device waits for launches: what else takes less than a millisecond is not why."""

SHORT_STEP_NS = 2e6
"""In a shorter step, a part that costs the millisecond from which it is reported takes at least half."""
SHORT_LOOP_SHARE = 0.25
"""Such a step is too short to judge if this share of it is not computation."""

HEAVY_CODE_SHARE = 0.25
"""Code of the script in forward or backward is named if it takes this share of the step."""

_OPTIMIZER_SHARE = 0.4
"""From this share of the step an optimizer that may be fused is named beside another cause."""

_WAITING = "waiting for other ranks"
_MOSTLY_TABLES = 0.5
_MOSTLY_FORWARD = 0.5
_UNTRAINED_RATIO = 3.0
"""From this many times the time of backward on, much of forward may have no backward, which takes longer elsewhere."""

_UNEVEN_SHARE = 0.25
"""From this share of waiting for the rank that works longest, in each step another one, it is said."""
_FOR_UNEVEN_WORK = (
    "No rank is slower than the others, but they work unevenly from step to step, as with batches of different length "
    "or on hosts that others use, too: make batches alike on all ranks, or larger, and less of the step is waiting."
)

_FOR_ONE_RANK = (
    "Look at the batches of rank {0}, and at what else runs on its host: it works longer than the others in parts of "
    "the run, too short ones to tell it from chance."
)
_MOSTLY_ONE = 0.6
"""From this share of that waiting on it is mostly for one rank."""

BUSY_SHARE = 0.7
"""A device that computes for less of the time waits for launches."""
BUSY_POWER = 0.6
"""Unless it draws this share of its power limit: idle it draws a fifth."""


def nothing_found(window: AlignedSteps, work: OwnWork, facts: JobFacts) -> Finding:
    """Return COMPUTE_BOUND or HEALTHY, as no rule found a cost."""
    step, shares = _step_shares(work, usual_steps(work))
    pauses = single_pauses(window, work, facts)
    pause = Explanation() if pauses is None else pauses.explanation
    facts = facts if pauses is None else pauses.left_out_of_lines(facts)
    evidence = _evidence(work, facts, step, shares)
    compute = sum(shares.get(part, 0.0) for part in COMPUTE)
    launches = work.device and _waits_for_launches(facts)
    if compute >= (LAUNCHING_SHARE if launches else COMPUTE_SHARE) and work.backward_known:
        evidence |= {"device_busy_share": facts.use.utilization} if launches else {}
        return _compute_bound(work, facts, step, shares, evidence, pause)

    short = _too_short(work, facts, step, shares)
    if short is not None:
        evidence["too_short"] = True

    evidence |= pause.evidence
    heavy = None if short else _heavy_code(facts, shares, step)
    own = _own_code(facts, heavy, device=work.device)
    heavy = heavy or (None if short else _beside_the_model(facts, shares, step))
    where = "" if heavy is None else f" {capitalized(heavy.text)}."
    evidence |= _evidence_of_code(heavy, own)
    # No communication is waiting for a rank that is late in this step.
    exchange = max(min_wait_ns(work), float(window.times["comm"].min(axis=0).mean()))
    uneven = shares[_WAITING] - exchange / step if work.grouped and work.backward_known else 0.0
    usual = _when_healthy(shares, facts)
    if uneven >= max(_UNEVEN_SHARE, least_cost_ns(step) / step):
        whom, uneven_work = _mostly_awaited(work, facts)
        where += f" {percent_text(uneven)} of it is waiting for the rank that works longest, {whom}."
        usual = for_debugging(facts) or uneven_work

    untrained = "" if work.grouped else _untrained(facts, shares, step, heavy)
    is_named = heavy is not None and heavy.is_named
    usual = untrained if untrained and is_named else f"{usual} {untrained}".rstrip()
    cheaper = own.advice if own else usual
    summary, cheaper = short or (f"A step takes {ns_text(step)}: {_largest(shares)}.{where}", cheaper)
    return Finding.of(
        Kind.HEALTHY,
        summary=summary + pause.text + uncovered_time_text(facts),
        next=pause.action or cheaper,
        evidence=evidence,
        speedup_if_fixed=own.gain if own and not pause.action else 1.0,
    )


def _mostly_awaited(work: OwnWork, facts: JobFacts) -> tuple[str, str]:
    """Return the ranks that work longest for most of the time in which others wait for one, in words, and the advice.

    Cores of a healthy job may differ: single ranks that are slower in everything are told here, unless by much.
    """
    waits_ns = work.own.max(axis=0) - work.own.mean(axis=0)
    by_rank = np.bincount(work.own.argmax(axis=0), weights=waits_ns, minlength=len(work.ranks))
    least_ns = _MOSTLY_ONE * by_rank.sum()
    slower = slower_ranks(work)
    if len(slower) and by_rank[slower].sum() >= least_ns:
        ranks = work.named(np.isin(np.arange(len(work.ranks)), slower))
        return f"mostly {ranks_text(ranks)}", for_straggler(None, ranks, facts)

    if by_rank.max() >= least_ns:
        rank = int(work.ranks[int(by_rank.argmax())])
        return f"mostly rank {rank}", _FOR_ONE_RANK.format(rank)

    return "in each step another one", _FOR_UNEVEN_WORK


def shares_text(work: OwnWork, facts: JobFacts) -> str:
    """Return what the steps of a window took their time for, too few for a verdict: a sentence, with its line."""
    step, shares = _step_shares(work)
    heaviest = max(shares, key=lambda part: shares[part])
    line = None if heaviest == _WAITING else own_line(facts.lines, heaviest, shares[heaviest])
    where = f"; {line.share_text} of {phase_words(heaviest)} is in {line.place}" if line else ""
    return f" On average each of them took {ns_text(step)}: {_largest(shares)}{where}."


def _step_shares(work: OwnWork, columns: NDArray[np.intp] | slice = slice(None)) -> tuple[float, dict[str, float]]:
    """Return the mean of some steps, or of all, and the share of each part in it."""
    step = max(float(work.step[columns].mean()), 1.0)
    shares = {part: float(values[:, columns].mean()) / step for part, values in work.parts.items()}
    if work.grouped:
        shares[_WAITING] = max(0.0, 1.0 - sum(shares.values()))

    return step, shares


class _Code(NamedTuple):
    """Line of the script in forward or backward."""

    part: str
    line: BlamedLine
    phase_share: float  # of the step, as samples have it

    @property
    def share(self) -> float:
        return self.line.share * self.phase_share

    @property
    def text(self) -> str:
        return f"{self.line.share_text} of {self.part} is in {self.line.place}"

    @property
    def is_named(self) -> bool:
        """Whether it is a function of its own in forward, and not a whole module."""
        return self.part == "forward" and not self.line.is_module


class _OwnCode(NamedTuple):
    """Code of the script in forward or backward, that takes much of the step and is no computation of torch."""

    line: BlamedLine
    what: str  # what it is
    waits: bool
    gain: float  # old / new step time without it; 1 where that is not known

    @property
    def advice(self) -> str:
        return f"Make {self.line.place} cheaper, {self.what}{self.without}. {_FOR_OWN_CODE}"

    @property
    def without(self) -> str:
        return f"; without it steps would be {gain_text(self.gain)}" if self.gain > 1.0 else ""


_FOR_OWN_CODE = "If it loops in Python, use operations on whole tensors; if it only watches, run it every n-th step."


def _own_code(facts: JobFacts, heavy: _Code | None, *, device: bool) -> _OwnCode | None:
    """Return the script's own code that takes much of the step; None if it may be operations of torch.

    These have no frames of their own. So code in forward counts if it waits or calls libraries without layers (NumPy),
    and code in backward unless forward runs it too, as where activations are computed again (checkpointing).
    """
    if heavy is None or device or facts.detects_anomalies:  # of a device's time, samples of the CPU say nothing
        return None

    part, line, phase_share = heavy
    places = {(each.file, each.function) for each in facts.lines if each.part == "forward"}
    waits = facts.waits_in(part, line)
    is_apart = part == "forward" and calls_code(facts.lines, part, line, WITHOUT_MODELS)
    if not (waits or is_apart) and (part == "forward" or (line.file, line.function) in places):
        return None

    # What else the function does in forward may be the model's operations.
    what, share = "which backward calls (a hook, or the backward of a Function)", line.share
    if waits:
        what = f"which waits inside {part} ({WAITED_FOR})"
        share *= main_line_share(facts.lines, part, line)
    elif is_apart:
        what = "which calls other libraries than torch (NumPy, PIL) inside forward"
        share *= called_share(facts.lines, part, line, WITHOUT_MODELS)

    return _OwnCode(line, what, waits, 1.0 if line.is_rough else 1 / max(1.0 - share * phase_share, 0.01))


def _evidence_of_code(code: _Code | None, own: _OwnCode | None) -> dict[str, object]:
    """Return the line in which the script's own code takes much of the step, and whether to make it cheaper."""
    return {} if code is None else code.line.evidence(code.phase_share) | ({} if own is None else {"own_code": True})


def _evidence(work: OwnWork, facts: JobFacts, step: float, shares: dict[str, float]) -> dict[str, object]:
    evidence: dict[str, object] = {"step_ms": step / 1e6, "share_by_phase": shares, "steps": len(work.step)}
    if work.grouped and work.backward_known:
        evidence["exposed_comm_ms"] = min_wait_ns(work) / 1e6

    if facts.time is not None and not facts.time.is_steps:
        evidence["steps_share"] = facts.time.in_steps

    if facts.wait_of_ready_time:
        evidence["cpu_wait_share"] = facts.wait_share

    return evidence


def _compute_bound(
    work: OwnWork,
    facts: JobFacts,
    step: float,
    shares: dict[str, float],
    evidence: dict[str, object],
    pause: Explanation,
) -> Finding:
    heaviest = max((part for part in COMPUTE if part in shares), key=lambda part: shares[part])
    compute = sum(shares.get(part, 0.0) for part in COMPUTE)
    busy = f"The device computes only {percent_text(facts.use.utilization or 0.0)} of the time"
    launches = f"{busy} and waits for the host to launch its work: "
    launching = launches if "device_busy_share" in evidence else ""
    heavy = _heavy_code(facts, shares, step)
    own = _own_code(facts, heavy, device=work.device)
    what = "forward, backward and optimizer" if own is not None and own.waits else "computation"
    is_named = own is not None or (heavy is not None and heavy.part == heaviest)
    beside = _beside_the_model(facts, shares, step)
    line = _evidence_of_code(heavy if is_named else beside, own)
    if heaviest == "optimizer" and own is None and (update := _line_of_script(facts, heaviest, shares[heaviest])):
        line = update.evidence(shares[heaviest])

    untrained = _untrained(facts, shares, step, heavy)
    faster = own.advice if own else f"{for_compute(heaviest, facts, device=work.device)} {untrained}".rstrip()
    if heavy and own is None and heavy.part == heaviest == "forward" and not work.device and not for_debugging(facts):
        watches = "" if heavy.line.is_module or untrained else "; if it only watches (a hook), run it every n-th step"
        faster = f"If {heavy.line.place} loops in Python, use operations on whole tensors{watches}. {faster}"
    return Finding.of(
        Kind.COMPUTE_BOUND,
        phase=heaviest,
        summary=(
            f"{launching}{percent_text(compute)} of each {ns_text(step)} step is {what}, "
            f"{largest_text(shares[heaviest], compute)} {phase_words(heaviest)} "
            f"({ns_text(shares[heaviest] * step)}, {percent_text(shares[heaviest])})"
            f"{_heaviest_code(facts, shares.get('forward', 0.0), beside)}"
            f"{_code_in(facts, 'backward', _sampled(shares)['backward'])}"
            f"{_code_in(facts, 'optimizer', shares.get('optimizer', 0.0))}."
            f"{pause.text}{uncovered_time_text(facts)}"
        ),
        next=" ".join(filter(None, (pause.action, faster))),
        evidence={**evidence, "compute_share": compute, **line, **pause.evidence},
        speedup_if_fixed=own.gain if own and not pause.action else 1.0,
    )


def _beside_the_model(facts: JobFacts, shares: dict[str, float], step: float) -> _Code | None:
    """Return code in forward, as a hook, that takes less of it than the line that calls the model."""
    share = shares.get("forward", 0.0)
    two = leading_lines(facts.lines, "forward", share)
    own = [line for line in two if not calls_model(facts.lines, "forward", line)]
    is_beside = len(own) == 1 and own[0] is not two[0] and own[0].share * share >= least_cost_ns(step) / step
    return _Code("forward", own[0], share) if is_beside else None


def _heaviest_code(facts: JobFacts, forward_share: float, beside: _Code | None) -> str:
    """Return the code that takes most of forward, as the end of a sentence; backward follows the same modules."""
    line = blamed_line(facts.lines, "forward", forward_share)
    if line is None:
        return f"; {beside.text}" if beside else ""

    called = main_library(facts.lines, "forward", line)
    if calls_trainer(facts.lines, line):
        return f"; most of forward is in {called}" if called else ""

    also = f", and {beside.line.share_text} of it in {beside.line.place}" if beside else ""
    return f"; {line.share_text} of forward is in {line.place}" + (f", which calls {called}" if called else "") + also


def _code_in(facts: JobFacts, part: str, share: float) -> str:
    """Return the script's own code that most of a part is in, as a hook or an optimizer: the end of a sentence."""
    line = _line_of_script(facts, part, share)
    return f"; {line.share_text} of {phase_words(part)} is in {line.place}" if line else ""


def _line_of_script(facts: JobFacts, part: str, share: float) -> BlamedLine | None:
    """Return the line that most of a part is in, where that is code of the script and no call of torch."""
    line = own_line(facts.lines, part, share)
    # Checkpointed modules of torch may run again in backward().
    is_torch = line is None or calls_model(facts.lines, part, line) or calls_code(facts.lines, part, line, AUTOGRAD)
    return None if is_torch else line


def _heavy_code(facts: JobFacts, shares: dict[str, float], step: float) -> _Code | None:
    """Return the script's own code in forward or backward that takes much of the step."""
    lines = ((part, _line_of_script(facts, part, share), share) for part, share in _sampled(shares).items())
    found = [_Code(part, line, share) for part, line, share in lines if line is not None]
    heaviest = max(found, key=lambda each: each.share, default=None)
    least = least_cost_ns(step, HEAVY_CODE_SHARE) / step
    return heaviest if heaviest is not None and heaviest.share >= least else None


def _sampled(shares: dict[str, float]) -> dict[str, float]:
    """Return the shares of the step that samples of forward and backward have: ranks wait for others in backward."""
    backward = shares.get("backward", 0.0) + shares.get(_WAITING, 0.0)
    return {"forward": shares.get("forward", 0.0), "backward": backward}


def _too_short(work: OwnWork, facts: JobFacts, step: float, shares: dict[str, float]) -> tuple[str, str] | None:
    """Return (summary, advice) for steps in which no cost reaches the floor; None for longer ones."""
    loop = 1.0 - sum(shares.get(part, 0.0) for part in (*COMPUTE, _WAITING))
    if work.device or step >= SHORT_STEP_NS or loop < SHORT_LOOP_SHARE:
        return None

    others = {part: share for part, share in shares.items() if part not in COMPUTE}
    summary = (
        f"{percent_text(loop)} of each {ns_text(step)} step is the loop's own overhead ({_largest(others)}); no part "
        f"of it reaches 1 ms, the smallest cost that is judged."
    )
    return summary, (
        f"Use larger batches{_batch_now(facts)}: then the part of the {ns_text(loop * step)} that does not grow with "
        "the batch is spread over more samples."
    )


def _batch_now(facts: JobFacts) -> str:
    batch = facts.loader.batch_size if facts.loader else None
    return f" (batch_size is {batch})" if batch else ""


def _largest(shares: dict[str, float]) -> str:
    largest = [(part, share) for part, share in sorted(shares.items(), key=lambda item: -item[1])[:3] if share >= 0.005]
    return ", ".join(
        f"{percent_text(share)} {part if part == _WAITING else phase_words(part)}" for part, share in largest
    )


def _when_healthy(shares: dict[str, float], facts: JobFacts) -> str:
    if on := for_debugging(facts):
        return on

    if shares.get(_WAITING, 0.0) >= 0.2:
        return "Nothing needs fixing; larger batches would leave less of the step to waiting for other ranks."

    takes_most = max(shares, key=lambda part: shares[part], default="") == "optimizer"
    if takes_most and _is_fused(facts) is False and _tables_share(facts) is None:
        return "Nothing needs fixing; the next gain is the optimizer's fused form (fused=True), as it takes the most."

    if facts.single_calls and not takes_most:
        return _for_single_calls(facts.single_calls)

    if facts.compiles:
        return "Nothing needs fixing; larger batches are the usual next gain."

    return "Nothing needs fixing; larger batches or torch.compile are the usual next gains."


def for_compute(phase: str, facts: JobFacts, *, device: bool) -> str:
    """Return the advice."""
    if on := for_debugging(facts):
        return on

    narrower = _with_32_bits(facts)
    if phase == "optimizer":
        return " ".join([_optimizer(facts), *(f"Or use {each}." for each in narrower)])

    if facts.single_calls:
        return _for_single_calls(facts.single_calls)

    steps = [*narrower, *(_on_device(facts) if device else _on_cpu(facts))]
    took = f", which took {duration_text(facts.compile_s)}" if facts.compile_s else ""
    done = f" It is compiled already{took}." if facts.model.compiled else ""
    return f"To go faster: {', or '.join(steps)}.{done}"


def _for_single_calls(calls: int) -> str:
    return (
        f"The model is called with one sample at a time, {calls} times for each batch: call it once with the whole "
        "batch, unless the samples depend on each other."
    )


def _untrained(facts: JobFacts, shares: Mapping[str, float], step: float, heavy: _Code | None) -> str:
    """Return the advice where forward takes far longer than backward, as if much of it were not trained; else ""."""
    forward, backward = shares.get("forward", 0.0), shares.get("backward", 0.0)
    if facts.collects and forward > max(backward, _MOSTLY_FORWARD):
        return f"Forward is longer than backward: much of it may be rollouts. {for_rollouts('forward', None, facts)}"

    if forward < _MOSTLY_FORWARD or not 0 < _UNTRAINED_RATIO * backward <= forward:
        return ""

    only = f"Backward takes only {ns_text(backward * step)}"
    repeated = (
        "cache its outputs for inputs that are repeated, or call it with more inputs at once, without gradients "
        "(torch.no_grad())."
    )
    if heavy is None or not heavy.is_named:
        return (
            f"{only}: where forward is not trained (a frozen part, a teacher, sampling), {repeated} What only measures "
            "the model (on other samples) can run every n-th step."
        )

    return (
        f"{only}, so {heavy.line.place} seems not to be trained: if it makes the same in each step (a mask, "
        f"positions), make it once (register_buffer). If it only watches (a hook), run it every n-th step. If it is a "
        f"frozen part, a teacher or sampling, {repeated}"
    )


def _is_fused(facts: JobFacts) -> bool | None:
    """Return whether the optimizer is fused; None if it has no fused form, as the one of several that takes most."""
    share = fusable_share(facts.lines)
    return facts.fused if share is None or share >= NAMED_SHARE else None


def _tables_share(facts: JobFacts) -> float | None:
    """Return the share of parameters in tables of embeddings, whose gradients may be sparse; None if it is no most."""
    share = (facts.model.dense_embeddings or 0) / max(facts.model.trainable or 0, 1)
    is_alone = facts.world_size == 1 and not facts.model.parallel
    return share if is_alone and share >= _MOSTLY_TABLES else None


def with_optimizer(finding: Finding, work: OwnWork, facts: JobFacts) -> Finding:
    """Return a finding with the advice on an optimizer that is not fused, if that takes more of the step."""
    if _is_fused(facts) is not False or finding.phase == "optimizer" or _tables_share(facts) is not None:
        return finding

    step, shares = _step_shares(work)
    share = shares.get("optimizer", 0.0)
    if share < max(_OPTIMIZER_SHARE, finding.cost_share) or share < max(shares.values()):
        return finding

    taken = f"{ns_text(share * step)} of each {ns_text(step)} step ({percent_text(share)})"
    return finding.with_part(Explanation(action=f"The optimizer takes {taken}: use its fused form (fused=True)."))


def with_costlier_code(finding: Finding, work: OwnWork, facts: JobFacts) -> Finding:
    """Return a finding about the time of all steps with the script's own code in forward or backward, if it costs more.

    Not one about ranks or computation: these may be about the same time, as is waiting for the interpreter's lock.
    """
    if finding.blames_ranks or finding.kind is Kind.GIL_CONTENTION or finding.phase in COMPUTE:
        return finding

    heavy = _heavy_code(facts, _step_shares(work)[1], work.step_ns)
    return finding if heavy is None or heavy.share <= finding.cost_share else with_own_code(finding, work, facts)


def with_own_code(finding: Finding, work: OwnWork, facts: JobFacts) -> Finding:
    """Return a finding with the script's own code in forward or backward that takes much of the step beside that."""
    step, shares = _step_shares(work)
    heavy = _heavy_code(facts, shares, step)
    own = _own_code(facts, heavy, device=work.device)
    if heavy is None or own is None:
        return finding

    taken = f"{percent_text(heavy.share)} of step time is spent in {own.line.place}"
    also = f"Beside that, {taken}, {own.what}{own.without}. {_FOR_OWN_CODE}"
    return finding.with_part(Explanation(action=also))


def _optimizer(facts: JobFacts) -> str:
    if (tables := _tables_share(facts)) is not None:
        return (
            f"The optimizer takes the most, and {percent_text(tables)} of the parameters are tables of "
            "embeddings: with sparse=True there, if nothing else uses their weights, and plain SGD or "
            "torch.optim.SparseAdam for them, a step updates only the rows of its batch."
        )

    return {
        True: "The optimizer takes the most, and is fused already: step less often, on larger batches.",
        None: "The optimizer takes the most: step less often, on larger batches, or use one that computes less.",
        False: "The optimizer takes the most: use its fused form (fused=True), or step less often on larger batches.",
    }[_is_fused(facts)]


def _with_32_bits(facts: JobFacts) -> list[str]:
    if facts.model.dtype != "torch.float64":
        return []

    return ["32-bit floats in place of 64-bit ones (double(), or arrays of NumPy), unless it needs their precision"]


def _on_device(facts: JobFacts) -> list[str]:
    larger = f"larger batches{_batch_now(facts)}"
    if _waits_for_launches(facts):
        # What it launches is few small kernels: larger ones cost the host as much, a captured graph of them one launch.
        other = ", if it has another one" * facts.compiles
        how = f"mode='reduce-overhead'{other}, which launches a CUDA graph instead of each kernel"
        return [larger, f"torch.compile with {how}"]

    found = []
    if facts.use.throttled:
        found.append("the clocks of the device are lowered by heat or a fault, so look at its cooling and power")

    if not facts.compiles:
        found.append("torch.compile")

    if facts.model.dtype in (None, "torch.float32") and not facts.autocast:
        tf32 = "" if facts.tf32 else ", or TF32 (torch.set_float32_matmul_precision('high'))"
        found.append(f"bf16 autocast{tf32}, where the weights are in 32 bits")

    return [*found, *([] if found else [larger, "a smaller model"])]


def _waits_for_launches(facts: JobFacts) -> bool:
    """Whether the device is idle for much of the time, as the host cannot launch its work faster."""
    busy = facts.use.utilization
    limits = [each.power_limit_w for each in facts.health.devices.values() if each.power_limit_w > 0]
    if busy is None or not limits:
        return False

    return busy < BUSY_SHARE and (facts.use.power_w or 0.0) < BUSY_POWER * min(limits)


def _on_cpu(facts: JobFacts) -> list[str]:
    model, cores, threads = facts.model, facts.cores_per_rank, facts.threads
    found = []
    if threads and cores and threads < cores and not facts.oversubscribed:
        found.append(
            f"torch uses {threads} of {cores} cores, so let it use {cores} (OMP_NUM_THREADS, "
            "or torch.set_num_threads where the script calls that)"
        )

    if model.device in (None, "cpu") and facts.has_16_bits:
        found.append(
            "32-bit floats in place of 16-bit ones (autocast, or the weights), which are far slower unless the CPU "
            "computes with them (lscpu shows amx_bf16, avx512_bf16 or bf16)"
        )

    if not facts.compiles:
        found.append("torch.compile")

    return [*found, "a smaller model or an accelerator"]
