"""Advice for a run that computes nearly all the time: what it does not do yet."""

from __future__ import annotations

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.trainings.training_objects import ModelFacts
from traceml.formatting import duration_text, percent_text

__all__ = ["WITHOUT_ANOMALIES", "for_compute"]

WITHOUT_ANOMALIES = (
    "Turn off autograd's anomaly detection (set_detect_anomaly, detect_anomaly): it records the stack of each "
    "operation and checks each gradient, which only the search for a NaN needs."
)

BUSY_SHARE = 0.7
"""A device that computes for less of the time waits for launches."""


def for_compute(phase: str, facts: JobFacts, *, device: bool) -> str:
    """Return the advice.

    Args:
        phase: the heaviest computing part of the step.
        facts: about the job.
        device: whether the computation is on a device.
    """
    if facts.detects_anomalies:
        return WITHOUT_ANOMALIES

    if phase == "optimizer":
        return _optimizer(facts)

    steps = _on_device(facts) if device else _on_cpu(facts)
    model = facts.model or ModelFacts()
    took = f", which took {duration_text(facts.compile_s)}" if facts.compile_s else ""
    done = f" It is compiled already{took}." if model.compiled else ""
    return f"To go faster: {', or '.join(steps)}.{done}"


def _optimizer(facts: JobFacts) -> str:
    if facts.fused:
        return "The optimizer dominates, and is fused already: step less often, on larger batches."

    if facts.fused is None:
        return "The optimizer dominates: step less often, on larger batches, or use one that computes less."

    return "The optimizer dominates: use its fused form (fused=True), or step less often on larger batches."


def _on_device(facts: JobFacts) -> list[str]:
    model, use = facts.model or ModelFacts(), facts.use
    batch = facts.loader.batch_size if facts.loader else None
    larger = "larger batches" + (f" (batch_size is {batch})" if batch else "")
    found = []
    if use.utilization is not None and use.utilization < BUSY_SHARE:
        found.append(f"the device computes only {percent_text(use.utilization)} of the time, so give it {larger}")
    elif use.throttled:
        found.append("the clocks of the device are lowered by heat or power, so look at its cooling and power limit")

    if not model.compiled:
        found.append("torch.compile")

    if model.dtype in (None, "torch.float32"):
        found.append("bf16 autocast, where the weights are in 32 bits")

    return [*found, *([] if found else [larger, "a smaller model"])]


def _on_cpu(facts: JobFacts) -> list[str]:
    model, cores, threads = facts.model or ModelFacts(), facts.cores_per_rank, facts.threads
    found = []
    if threads and cores and threads < cores and not facts.oversubscribed:
        found.append(f"torch uses {threads} of {cores} cores, so set OMP_NUM_THREADS={cores}")

    if not model.compiled:
        found.append("torch.compile")

    return [*found, "a smaller model or an accelerator"]
