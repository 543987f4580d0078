"""Client of the ranks' command `profile`: opens a window on each, waits for it, and fetches the traces."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from traceml.database.profile_states import ProfileState
from traceml.errors import TraceMLError
from traceml.formatting import ranks_text
from traceml.runs.export.operator_trace import ProfiledRank
from traceml.runs.export.top_operators import CallSamples
from traceml.transport.client import Connection

__all__ = ["ProfileClient", "ProfileRequest", "RankWindow"]

_ANSWER_S = 15.0
_POLL_S = 0.2
_LEAD_S = 2.0  # a rank's recorder reads commands twice a second
_SAVING_S = 120.0  # a trace of gigabytes is written and compressed
_LOST_S, _SILENT_S = 3.0, 60.0
_MAX_RANKS = 8


@dataclass(frozen=True, slots=True)
class ProfileRequest:
    """Properties of a profile."""

    ranks: tuple[int, ...] | None  # the ranks; None for all
    steps: int
    limit_s: float  # time in which the steps have to end
    limit_bytes: int  # largest trace of a rank before compression
    stacks: bool = False  # whether Python functions are recorded too


@dataclass(slots=True)
class RankWindow:
    """The window of one rank, as its answers show."""

    rank: int
    state: str = ProfileState.WAITING  # waiting, open, saving, recorded, failed or lost
    step: int = -1
    step_ns: int = 0  # mean duration of its last steps
    why: str = ""
    first_step: int = 0
    steps: int = 0
    pid: int = 0
    size: int = 0
    heard_s: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be waited for."""
        return self.state in (ProfileState.RECORDED, ProfileState.FAILED, ProfileState.LOST)

    def fail(self, state: str, why: str) -> None:
        """Record that there will be no trace."""
        self.state, self.why = state, why


class ProfileClient:
    """Profiles ranks of a job through its aggregator.

    Args:
        on_progress: called with the windows while they are waited for.
    """

    def __init__(
        self,
        connection: Connection,
        hosts: dict[int, str],
        on_progress: Callable[[Iterable[RankWindow]], None] = lambda _windows: None,
    ) -> None:
        self._connection, self._hosts, self._on_progress = connection, hosts, on_progress
        self.windows: dict[int, RankWindow] = {}
        self._opened: list[int] = []
        self.left_out = 0
        """Ranks that are not profiled because no ranks were chosen and there are many."""

    @property
    def spread(self) -> int:
        """Largest difference between the first profiled steps of ranks."""
        firsts = [each.first_step for each in self.windows.values() if each.state == ProfileState.RECORDED]
        return max(firsts) - min(firsts) if firsts else 0

    def profile(self, request: ProfileRequest) -> list[ProfiledRank]:
        """Open the windows, wait until they have ended, and return the traces that there are.

        Raises:
            TraceMLError: a rank does not exist, or none could be profiled.
        """
        try:
            self._find(request)
            self._open(request)
            self._await(request)
            return [self._fetch(each) for each in self.windows.values() if each.state == ProfileState.RECORDED]
        except OSError as error:
            raise TraceMLError(f"the job ended before its traces were fetched: {error}") from error
        finally:
            self._close()

    def _find(self, request: ProfileRequest) -> None:
        for answer in self._ask({"do": "state"}, None)[0]:
            window = self.windows.setdefault(answer["rank"], RankWindow(answer["rank"]))
            if "error" in answer:
                window.fail(ProfileState.FAILED, str(answer["error"]))
            else:
                self._take(window, answer["result"], state=False)

        if request.ranks is None:
            self.left_out = max(len(self.windows) - _MAX_RANKS, 0)
            self.windows = {rank: self.windows[rank] for rank in sorted(self.windows)[:_MAX_RANKS]}
            return

        if unknown := sorted(set(request.ranks) - set(self.windows)):
            raise TraceMLError(
                f"no {ranks_text(unknown)} is connected; there {'is' if len(self.windows) == 1 else 'are'} "
                f"{ranks_text(sorted(self.windows))}"
            )

        self.windows = {rank: self.windows[rank] for rank in sorted(set(request.ranks))}

    def _open(self, request: ProfileRequest) -> None:
        """Ask for windows that begin with the same step; where ranks are far apart, each begins with its own."""
        asked = [each for each in self.windows.values() if not each.is_over]
        lead = {each.rank: _lead(each) for each in asked}
        last = max((each.step + lead[each.rank] for each in asked), default=0)
        together: dict[int, list[int]] = {}  # ranks by first step: one question for all, as each may take half a second
        for each in asked:
            first = last if last - each.step <= 2 * lead[each.rank] else each.step + lead[each.rank]
            together.setdefault(first, []).append(each.rank)

        for first, ranks in together.items():
            args = {
                "do": "open", "first": first, "steps": request.steps, "limit_s": request.limit_s,
                "limit_bytes": request.limit_bytes, "stacks": request.stacks,
            }  # fmt: skip
            self._opened += ranks
            for answer in self._ask(args, ranks)[0]:
                if "error" in answer:  # it may have a window of another client, which stays open
                    self._opened.remove(answer["rank"])
                    why = str(answer["error"]).removeprefix("TraceMLError: ")
                    self.windows[answer["rank"]].fail(ProfileState.FAILED, why)

    def _await(self, request: ProfileRequest) -> None:
        deadline_s = time.monotonic() + request.limit_s + _SAVING_S
        while waiting := [each for each in self.windows.values() if not each.is_over]:
            self._on_progress(self.windows.values())
            self._update({each.rank: each for each in waiting})
            for each in waiting:
                if time.monotonic() > deadline_s:
                    each.fail(ProfileState.FAILED, "its trace was not ready in time")

            time.sleep(_POLL_S)

    def _update(self, waiting: dict[int, RankWindow]) -> None:
        try:
            answers, silent = self._ask({"do": "state"}, list(waiting))
        except (TraceMLError, OSError) as error:  # no rank is left, the run is over, or its aggregator has ended
            for each in waiting.values():
                each.fail(ProfileState.LOST, f"it ended while it was profiled ({error})")

            return

        for answer in answers:
            window = waiting[answer["rank"]]
            window.heard_s = time.monotonic()
            self._take(window, answer.get("result") or {}, state=True)

        for each in waiting.values():
            if time.monotonic() - each.heard_s > (_SILENT_S if each.rank in silent else _LOST_S):
                why = "it does not answer" if each.rank in silent else "it ended while it was profiled"
                each.fail(ProfileState.LOST, why)

    def _take(self, window: RankWindow, result: dict[str, Any], *, state: bool) -> None:
        window.step = int(result.get("step", window.step))
        window.step_ns = int(result.get("step_ns") or window.step_ns)
        if state and result:
            window.why = str(result.get("why") or "")
            window.state = ProfileState.FAILED if result["state"] == ProfileState.NONE else str(result["state"])
            window.first_step, window.steps = int(result.get("first", 0)), int(result.get("steps", 0))
            window.pid, window.size = int(result.get("pid", 0)), int(result.get("size", 0))

    def _fetch(self, window: RankWindow) -> ProfiledRank:
        """Return the trace of a rank, which is read in pieces."""
        data = bytearray()
        while len(data) < window.size:
            piece = self._result({"do": "read", "offset": len(data)}, window.rank)["data"]
            if not piece:
                raise TraceMLError(f"the trace of rank {window.rank} ends early. Profile again")

            data += piece

        calls = CallSamples.from_row(self._result({"do": "calls"}, window.rank))
        host = self._hosts.get(window.rank, "")
        return ProfiledRank(window.rank, host, window.pid, window.first_step, window.steps, bytes(data), calls)

    def _result(self, args: dict[str, Any], rank: int) -> dict[str, Any]:
        for answer in self._ask(args, [rank])[0]:
            if "result" in answer:
                result: dict[str, Any] = answer["result"]
                return result

            raise TraceMLError(f"the trace of rank {rank} cannot be read: {answer.get('error')}")

        raise TraceMLError(f"rank {rank} does not answer: its trace is lost")

    def _close(self) -> None:
        """Tell the ranks that were opened that nothing more is wanted of them."""
        try:
            if self._opened:
                self._ask({"do": "close"}, self._opened)
        except (TraceMLError, OSError):
            pass  # those that are left remove their traces by themselves

    def _ask(self, args: dict[str, Any], ranks: list[int] | None) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the answers of ranks (None: of all), and the connected ranks that did not answer in time."""
        reply = self._connection.request("profile", {**args, "ranks": ranks}, timeout_s=_ANSWER_S)
        return reply["replies"], reply["missing"]


def _lead(window: RankWindow) -> int:
    """Return the number of steps until all ranks have surely read the command; the profiler is set up in the last."""
    return 2 + (math.ceil(_LEAD_S * 1e9 / window.step_ns) if window.step_ns else 0)
