"""Differences of two runs in code, packages and variables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from traceml.formatting import name_order, plural
from traceml.runs.comparison.comparison_types import TextChange
from traceml.runs.report.report_types import Report

__all__ = ["package_changes", "source_remarks", "variable_changes"]

_SHOWN = 4
_COMMIT = 10  # digits that tell commits of a repository apart
# These change how a step is computed; others of the recorded ones name a job, a rank or a place.
_TUNING = re.compile(
    r"(?:CUDA|NCCL|GLOO|UCX|TORCH|PYTORCH|TORCHINDUCTOR|OMP|MKL|OPENBLAS|NUMEXPR|TOKENIZERS|XLA|ROCM|HIP|HSA)_.*"
    r"|LD_PRELOAD"
)
_COMPUTES = re.compile(r"(?:torch|triton|nvidia|numpy)\b.*")


def package_changes(a: Report, b: Report) -> list[TextChange]:
    """Return the packages whose versions differ, those that compute first; none where a run's are not known."""
    changed = _changes(a.source.packages, b.source.packages)
    return sorted(changed, key=lambda change: (change.name != "torch", _COMPUTES.fullmatch(change.name) is None))


def variable_changes(a: Report, b: Report) -> list[TextChange]:
    """Return the variables that tune libraries and differ; none where a run's are not known."""
    return [each for each in _changes(a.source.variables, b.source.variables) if _TUNING.fullmatch(each.name)]


def source_remarks(a: Report, b: Report, letter: str) -> Iterator[str]:
    """Yield a sentence each on commits, uncommitted changes, packages and variables that differ from run A."""
    commits = [side.run.commit for side in (a, b)]
    if None not in commits and commits[0] != commits[1]:
        yield _sentence("commit", [TextChange(name="", a=commits[0], b=commits[1])], letter, _COMMIT)

    if _has_other_diff(a, b):
        yield f"uncommitted changes: those of A are not those of {letter}"

    for what, changed in (("packages", package_changes(a, b)), ("variables", variable_changes(a, b))):
        if changed:
            yield _sentence(what, changed, letter)


def _changes(a: Mapping[str, str], b: Mapping[str, str]) -> list[TextChange]:
    if not a or not b:
        return []

    names = sorted({*a, *b}, key=name_order)
    return [TextChange(name=name, a=a.get(name), b=b.get(name)) for name in names if a.get(name) != b.get(name)]


def _has_other_diff(a: Report, b: Report) -> bool:
    is_known = all(side.run.dirty is False or side.source.diff for side in (a, b))
    return is_known and a.source.diff != b.source.diff


def _sentence(what: str, changed: list[TextChange], letter: str, longest: int = 40) -> str:
    parts = [
        f"{each.name} {_cut(each.a, longest)} in A, {_cut(each.b, longest)} in {letter}".strip()
        for each in changed[:_SHOWN]
    ]
    if len(changed) > _SHOWN:
        parts.append(f"{plural(len(changed) - _SHOWN, 'other')} in --json")

    return f"{what}: {'; '.join(parts)}"


def _cut(text: str | None, longest: int) -> str:
    return "none" if text is None else text[:longest]
