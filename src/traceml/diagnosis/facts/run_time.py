"""The run's wall time, split without remainder, and the findings about its parts outside the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from traceml.diagnosis.facts.sampled_lines import BlamedLine, SampledLine, outside_line
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.formatting import count_text, duration_text, part_words, percent_text

__all__ = ["PARTS", "RunTime", "covered", "outside_steps"]

PARTS = (
    "startup", "steps", "evaluation", "checkpoint", "between_epochs", "idle", "stopped", "restart", "unexplained",
)  # fmt: skip
"""The parts of a run's wall time:

- `startup`: from the run's start to the first batch
- `steps`: training steps, without saving and without the start of epochs
- `evaluation`: evaluation batches, with the time until the next training batch
- `checkpoint`: saving inside steps
- `between_epochs`: ending and starting the data loader's iterator and its workers, and time between steps that is no
  evaluation
- `idle`: after the last step or evaluation
- `stopped`: the process did not run
- `restart`: from the last step of an attempt to the first batch of the next one
- `unexplained`: the rest
"""

HEAVY_SHARE = 0.25
"""Start-up or evaluation is reported from this share of the wall time."""
STARTUP_S = 5.0
"""A shorter start-up is not reported."""
LONG_STARTUP_S = 60.0
"""From here on a long start-up is a warning."""


@dataclass(frozen=True)
class RunTime:
    """Wall time of a run.

    Attributes:
        wall_s: from its start to its end, or until now.
        seconds: by part (`PARTS`), the mean over ranks; the parts add up to `wall_s`.
        evaluations: times that evaluation interrupted the training, on one rank.
        goodput: share in steps, without waiting for data, saving, and steps that an attempt repeats.
    """

    wall_s: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 0
    goodput: float = 0.0

    @classmethod
    def of(cls, wall_s: float, known: Mapping[str, float], evaluations: int = 0) -> RunTime:
        """Return a wall time with its known parts; the rest is unexplained.

        Parts that exceed the wall time, as clocks of several hosts differ, are cut to it in proportion.
        """
        parts = {part: max(known.get(part, 0.0), 0.0) for part in PARTS}
        whole = sum(parts.values())
        if whole > wall_s > 0:
            parts = {part: seconds * wall_s / whole for part, seconds in parts.items()}
            whole = wall_s

        parts["unexplained"] += max(wall_s - whole, 0.0)
        return cls(wall_s, parts, evaluations)

    def share(self, *parts: str) -> float:
        """Return the share of the wall time that some parts have, 0..1."""
        return sum(self.seconds.get(part, 0.0) for part in parts) / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def in_steps(self) -> float:
        """Share of the wall time in training steps, with saving and the start of epochs."""
        return self.share("steps", "checkpoint", "between_epochs")

    @property
    def is_steps(self) -> bool:
        """Whether nearly all of the wall time is steps."""
        return self.wall_s <= 0 or self.in_steps >= 1 - HEAVY_SHARE


def outside_steps(time: RunTime | None, lines: Sequence[SampledLine]) -> list[Finding]:
    """Return the findings about a long start-up and much evaluation.

    Args:
        time: wall time of the run; None where it is not known.
        lines: lines in which the training threads were seen.
    """
    if time is None:
        return []

    found = []
    startup_s = time.seconds.get("startup", 0.0)
    if time.share("startup") >= HEAVY_SHARE and startup_s >= STARTUP_S:
        found.append(_startup(time, startup_s, outside_line(lines, "startup")))

    if time.share("evaluation") >= HEAVY_SHARE:
        found.append(_evaluation(time, outside_line(lines, "outside")))

    return found


def _startup(time: RunTime, startup_s: float, line: BlamedLine | None) -> Finding:
    where = line.of_it if line else ""
    return Finding(
        kind=Kind.STARTUP,
        severity=Severity.WARNING if startup_s >= LONG_STARTUP_S else Severity.INFO,
        summary=(
            f"Training began {duration_text(startup_s)} after the start: {percent_text(time.share('startup'))} "
            f"of the run's {duration_text(time.wall_s)}{where}."
        ),
        next=(
            "A longer run has a smaller share of it. Cache what is computed at each start (tokenized data, indexes, "
            "compiled code), and import what only some runs need where it is used."
            if line is None
            else f"Look at {line.place}: cache its result, or do it beside the training; a longer run has a smaller "
            "share of it."
        ),
        evidence={
            "startup_s": startup_s,
            "wall_s": time.wall_s,
            "share": time.share("startup"),
            **({} if line is None else line.evidence(1.0)),
        },
        cost_share=time.share("startup"),
    )


def _evaluation(time: RunTime, line: BlamedLine | None) -> Finding:
    share, seconds = time.share("evaluation"), time.seconds["evaluation"]
    times = max(time.evaluations, 1)
    each = seconds / times
    often = "once" if times == 1 else f"{count_text(times)} times"
    saved = share / 2
    return Finding(
        kind=Kind.EVAL_HEAVY,
        severity=Kind.EVAL_HEAVY.severity_for(share),
        summary=(
            f"{percent_text(share)} of the run's {duration_text(time.wall_s)} is evaluation: "
            f"{often} {duration_text(each)}" + (f", mostly at {line.place}" if line else "") + "."
        ),
        next=(
            f"Evaluate half as often: that saves {percent_text(saved)} of the run. Or evaluate on fewer batches, with "
            "larger ones under torch.inference_mode(), or in another process."
        ),
        evidence={
            "evaluation_s": seconds,
            "evaluations": times,
            "wall_s": time.wall_s,
            "share": share,
            **({} if line is None else line.evidence(share)),
        },
        cost_share=share,
        speedup_if_fixed=1 / (1 - saved),
    )


def covered(time: RunTime | None) -> str:
    """Return the sentence on what a verdict about steps does not cover; empty where steps are nearly all of the run."""
    if time is None or time.is_steps:
        return ""

    return f" The rest of the run's {duration_text(time.wall_s)}: {_largest(time)}."


def _largest(time: RunTime) -> str:
    others: Sequence[str] = sorted(
        (part for part in time.seconds if part not in ("steps", "checkpoint", "between_epochs")),
        key=lambda part: -time.seconds[part],
    )
    shown = [part for part in others[:2] if time.share(part) >= 0.05]
    return ", ".join(f"{part_words(part)} {percent_text(time.share(part))}" for part in shown)
