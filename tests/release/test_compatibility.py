"""The table of docs/compatibility.md: its rows, its notes, and which packages are the oldest."""

from __future__ import annotations

from pathlib import Path

import pytest
from release.compatibility import Column, check, direct_requirements, page
from release.compatibility_checks import BEFORE_TORCH, CHECKS, Bench, FailedCheckError, _cause, _check_report
from release.environments import Environment

from tests.release.test_registry import METADATA, PURE, wheel

ROOT = Path(__file__).parents[2]
GOOD = {
    "run": {"state": "finished"},
    "ranks": [{"steps": 60}, {"steps": 60}],
    "phases": [{"phase": name, "mean_ms": 0.1} for name in ("input_wait", "forward", "backward", "optimizer", "other")],
    "telemetry": {"rows_lost": 0, "failures": {}},
}


def columns() -> list[Column]:
    """Return two columns: everything is well, and one check failed and one was not possible."""
    names = [BEFORE_TORCH.name, *(each.name for each in CHECKS)]
    good = Column("3.11", "newest", {"python": "3.11.7", "torch": "2.15.0"}, dict.fromkeys(names, "ok"))
    bad = Column("3.13", "oldest", {"python": "3.13.0", "torch": "2.5.0"}, dict.fromkeys(names, "ok"))
    bad.results |= {names[1]: "failed: it said: <no>", names[2]: "not possible: RuntimeError: too | new"}
    return [good, bad]


def test_the_page_has_every_check() -> None:
    """One row per check, in the written page too; versions in columns; what is not "ok" has a note."""
    lines = page(columns()).splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}

    assert "| torch | 2.15.0 | 2.5.0 |" in lines
    assert "| numpy | - | - |" in lines
    assert rows[CHECKS[0].name] == f"| {CHECKS[0].name} | ok | **failed** (1) |"
    assert rows[CHECKS[1].name] == f"| {CHECKS[1].name} | ok | not possible (2) |"
    assert "1. it said: &lt;no>" in lines
    assert "2. RuntimeError: too / new" in lines
    assert "**29 of 30 as they should be.**" in lines
    assert "Not measured to the end in this pass: 3.11 oldest, 3.12 oldest, 3.12 newest, 3.13 newest." in lines
    written = (ROOT / "docs" / "compatibility.md").read_text()
    assert [
        name for name in (BEFORE_TORCH.name, *(each.name for each in CHECKS)) if f"\n| {name} |" not in written
    ] == []


def test_direct_requirements_are_those_of_the_python(tmp_path: Path) -> None:
    """With the extras that are wanted, and markers as that Python reads them."""
    needs = ["torch>=2.4; extra == 'torch'", "aim>=3; python_version < '3.13' and extra == 'aim'", "rich>=13.7"]
    text = METADATA.replace("Requires-Dist: numpy>=1.26", "\n".join(f"Requires-Dist: {need}" for need in needs))
    path = wheel(tmp_path, PURE, metadata=text)

    assert direct_requirements(path, set(), "3.12") == ["rich>=13.7"]
    assert direct_requirements(path, {"torch", "aim"}, "3.12") == ["torch>=2.4", "aim>=3", "rich>=13.7"]
    assert direct_requirements(path, {"torch", "aim"}, "3.13") == ["torch>=2.4", "rich>=13.7"]


def test_a_good_report_passes() -> None:
    """Two ranks with all steps."""
    _check_report(GOOD, ranks=2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ranks": [{"steps": 60}, {"steps": 59}]}, r"steps by rank: \[60, 59\], not \[60, 60\]"),
        ({"ranks": GOOD["ranks"][:1]}, "steps by rank"),
        ({"phases": GOOD["phases"][1:]}, "phases without time: {'input_wait'}"),
        ({"telemetry": {"rows_lost": 3, "failures": {}}}, "rows lost: 3, not 0"),
        ({"telemetry": {"rows_lost": 0, "failures": {"traceml.instrument": 1}}}, "failures: {'traceml.instrument': 1}"),
        ({"run": {"state": "hung"}}, "state: hung"),
    ],
)
def test_a_report_that_is_wrong(change: dict[str, object], reason: str) -> None:
    """Each part of it is looked at."""
    with pytest.raises(FailedCheckError, match=reason):
        _check_report(GOOD | change, ranks=2)


def test_the_cause_of_a_training_that_cannot_be() -> None:
    """The exception of a rank, not that of its launcher."""
    text = "[rank1]: RuntimeError: Dynamo is not supported on Python 3.13+\ntorch.ChildFailedError: x\n"

    assert _cause(text) == "RuntimeError: Dynamo is not supported on Python 3.13+"
    with pytest.raises(FailedCheckError, match="can't open file"):
        _cause("python: can't open file 'training.py': [Errno 2] No such file or directory")


@pytest.mark.process
def test_a_check_that_fails_is_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An environment without traceml fails the first check, with what the command said."""
    column = Column("3.11", "newest")
    (tmp_path / "environment" / "bin").mkdir(parents=True)
    (tmp_path / "environment" / "bin" / "python").write_text("#!/bin/sh\necho 'no module traceml' >&2\nexit 1\n")
    (tmp_path / "environment" / "bin" / "python").chmod(0o755)
    check(column, Bench(Environment(tmp_path / "environment"), tmp_path / "work"), BEFORE_TORCH.name)

    assert column.results[BEFORE_TORCH.name].startswith("failed: `python -W error")
    assert "ended with status 1: no module traceml" in capsys.readouterr().out
