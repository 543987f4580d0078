"""Automatic profiles: an aggregator takes one of a run whose verdict is computation, once."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.child_programs import kill_group
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.errors import TraceMLError
from traceml.fail_open import fail_open
from traceml.helper_programs import helper_program
from traceml.run_folder import PROFILE_NAME

__all__ = ["PROFILED_KINDS", "FindingProfiles"]

PROFILED_KINDS = (Kind.COMPUTE_BOUND, Kind.COMPUTE_STRAGGLER)
"""Verdicts that operators explain."""
_STEPS, _SHOWN = 5, 5
_MAX_TRIES = 3  # someone may be profiling the same ranks
_MAX_RANKS = 4  # of those that are late: what the others do is mostly waiting
_STEPS_S, _LIMIT_S = 120, 300

_log = logging.getLogger("traceml")


class _PersistingVerdict(msgspec.Struct):
    """A verdict about computation: its kind, since when it persists or was tried last, and the tries."""

    after_s: float
    kind: Kind | None = None
    since_s: float = 0.0
    tries: int = 0
    is_done: bool = False


class FindingProfiles:
    """Profiles a run when computation has been its verdict for some time, by a process of `traceml profile`.

    Args:
        after_s: time that the verdict persists before; 0: never.
    """

    def __init__(self, after_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._after_s, self._now_s = after_s, now_s
        self._runs: dict[ActiveRun, _PersistingVerdict] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def check(self, run: ActiveRun, findings: Sequence[Finding]) -> None:
        """Take the findings of a running run, the verdict first, and start its profile when it is due."""
        known = self._known(run)
        if known.is_done or not findings:
            return

        verdict, now_s = findings[0], self._now_s()
        if verdict.kind is not known.kind:
            known.kind, known.since_s = verdict.kind, now_s

        if known.after_s and verdict.kind in PROFILED_KINDS and now_s - known.since_s >= known.after_s:
            known.is_done = True
            known.tries += 1
            task = asyncio.create_task(self._profile(run, verdict, known))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def profile_later(self, run: ActiveRun, after_s: float) -> Path | None:
        """Profile a running run once computation has been its verdict for some time.

        Returns:
            The path that the profile will have; None if one was taken already.
        """
        known = self._known(run)
        if known.is_done:
            return None

        known.after_s = after_s
        return run.path / PROFILE_NAME

    def forget(self, run: ActiveRun) -> None:
        """Forget a run that is over."""
        self._runs.pop(run, None)

    def _known(self, run: ActiveRun) -> _PersistingVerdict:
        return self._runs.setdefault(run, _PersistingVerdict(self._after_s))

    async def close(self) -> None:
        """Give up profiles that are being taken."""
        for task in self._tasks:
            task.cancel()

        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _profile(self, run: ActiveRun, verdict: Finding, known: _PersistingVerdict) -> None:
        with fail_open(_log, "aggregator", f"run {run.id} could not be profiled"):
            try:
                profile = await _run_profile(run, verdict.ranks[:_MAX_RANKS])
            except TraceMLError as error:
                if known.tries >= _MAX_TRIES:
                    raise

                _log.info("run %s could not be profiled yet: %s", run.id, error)
                known.since_s, known.is_done = self._now_s(), False
                return

            if not run.ended:
                run.store.event("profile", _event(verdict, profile))


async def _run_profile(run: ActiveRun, ranks: Sequence[int]) -> dict[str, Any]:
    """Return what `traceml profile --json` prints.

    Raises:
        TraceMLError: it failed, or was killed after its time.
    """
    words = ["profile", str(run.path), "--json", "-o", str(run.path / PROFILE_NAME)]
    words += ["--steps", str(_STEPS), "--timeout", str(_STEPS_S)]
    words += ["--ranks", ",".join(map(str, ranks))] if ranks else []
    process = await asyncio.create_subprocess_exec(
        *helper_program("traceml", *words),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(_LIMIT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        raise TraceMLError(f"`traceml profile` did not end within {_LIMIT_S} s") from None
    finally:
        if process.returncode is None:
            await kill_group(process)

    if process.returncode:
        raise TraceMLError(errors.decode(errors="replace").strip()[-500:])

    profile: dict[str, Any] = json.loads(output)
    return profile


def _event(verdict: Finding, profile: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": str(verdict.kind),
        "file": PROFILE_NAME,
        "ranks": [each["rank"] for each in profile["ranks"]],
        "operators": profile["operators"][:_SHOWN],
    }
