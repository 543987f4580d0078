"""The client of the command `profile`, with ranks that answer from memory."""

from __future__ import annotations

from typing import Any

import pytest

from traceml.cli.jobs.profile_client import ProfileClient, ProfileRequest
from traceml.errors import TraceMLError


class _Ranks:
    """Ranks that fail while they are profiled; rank 1 is being profiled by another client."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int] | None]] = []

    def request(self, _command: str, args: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert timeout_s > 0
        ranks = args["ranks"]
        self.asked.append((args["do"], ranks))
        replies = [{"rank": rank, "result": {"step": 5, "state": "failed"}} for rank in (0, 1)]
        if args["do"] == "open":
            replies[1] = {"rank": 1, "error": "TraceMLError: it is being profiled already"}

        return {"replies": [each for each in replies if ranks is None or each["rank"] in ranks], "missing": []}


@pytest.mark.parametrize(("ranks", "closed"), [(None, [("close", [0])]), ((1,), []), ((7,), [])])
def test_a_window_of_another_client_is_left_open(ranks: tuple[int, ...] | None, closed: list[Any]) -> None:
    """Only what this one has opened is closed, also where the ranks that it wants do not exist."""
    job = _Ranks()
    client = ProfileClient(job, {})  # type: ignore[arg-type]
    request = ProfileRequest(ranks=ranks, steps=5, limit_s=1.0, limit_bytes=1000)

    if ranks == (7,):
        with pytest.raises(TraceMLError, match="no rank 7 is connected"):
            client.profile(request)
    else:
        assert client.profile(request) == []

    assert [each for each in job.asked if each[0] == "close"] == closed


def test_ranks_that_begin_together_are_asked_at_once() -> None:
    """Asked one after the other, the last of eight would hear of the first step when it had passed."""
    job = _Ranks()
    client = ProfileClient(job, {})  # type: ignore[arg-type]

    client.profile(ProfileRequest(ranks=(0, 1), steps=5, limit_s=1.0, limit_bytes=1000))

    assert [ranks for do, ranks in job.asked if do == "open"] == [[0, 1]]
