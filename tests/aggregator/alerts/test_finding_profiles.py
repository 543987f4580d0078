"""Profiles that an aggregator takes by itself, with a stand-in for `traceml profile`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from traceml.aggregator.alerts import finding_profiles
from traceml.aggregator.alerts.finding_profiles import FindingProfiles
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.fail_open import failures

VERDICT = Finding(kind=Kind.COMPUTE_BOUND, severity=Severity.INFO, ranks=(), summary="computes", next="")
PROFILE = {"ranks": [{"rank": 0}], "operators": []}


class _Run:
    """What is asked of a run, and what it is told."""

    id, ended = "run-1", False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[tuple[str, Any]] = []
        self.store = SimpleNamespace(event=lambda name, data: self.events.append((name, data)))


async def _checked(run: _Run, times: int) -> None:
    """Check a run whose verdict stands, each time when a profile is due again, and await what that starts."""
    now_s = 0.0
    profiles = FindingProfiles(5.0, now_s=lambda: now_s)
    for _ in range(1 + times):
        profiles.check(run, [VERDICT])  # type: ignore[arg-type]
        now_s += 6.0
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others)


def _stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(finding_profiles, "helper_program", lambda *_words: [sys.executable, "-c", code])


def test_a_run_is_profiled_later_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict persists since before the request, and a second request comes too late."""
    _stand_in(monkeypatch, f"print({json.dumps(PROFILE)!r})")
    run, now_s = _Run(tmp_path), 0.0

    async def ask() -> list[Path | None]:
        nonlocal now_s
        profiles = FindingProfiles(0.0, now_s=lambda: now_s)
        profiles.check(run, [VERDICT])  # type: ignore[arg-type]
        now_s = 6.0
        profiles.check(run, [VERDICT])  # type: ignore[arg-type]
        asked = [profiles.profile_later(run, 5.0)]  # type: ignore[arg-type]
        assert run.events == []
        profiles.check(run, [VERDICT])  # type: ignore[arg-type]
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
        return [*asked, profiles.profile_later(run, 5.0)]  # type: ignore[arg-type]

    assert asyncio.run(ask()) == [tmp_path / "profile.json.gz", None]
    assert [name for name, _ in run.events] == ["profile"]


@pytest.mark.process
def test_a_profile_that_is_refused_is_taken_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody profiles the rank just then: that is no failure, and one profile is taken in the end."""
    code = (
        "import os, sys\n"
        f"try: os.mkdir({str(tmp_path / 'asked')!r})\n"
        f"except FileExistsError: print({json.dumps(PROFILE)!r})\n"
        "else: sys.exit('it is being profiled already')"
    )
    _stand_in(monkeypatch, code)
    run, before = _Run(tmp_path), failures()

    asyncio.run(_checked(run, 4))

    assert [(name, data["ranks"]) for name, data in run.events] == [("profile", [0])]
    assert failures() == before


@pytest.mark.process
def test_a_profile_that_always_fails_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three tries, which count as one failure."""
    _stand_in(monkeypatch, f"import sys; open({str(tmp_path / 'tries')!r}, 'a').write('x'); sys.exit('no')")
    run, before = _Run(tmp_path), failures().get("aggregator", 0)

    asyncio.run(_checked(run, 5))

    assert run.events == []
    assert (tmp_path / "tries").read_text() == "xxx"
    assert failures()["aggregator"] == before + 1
