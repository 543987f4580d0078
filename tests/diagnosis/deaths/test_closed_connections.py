"""Ranks that failed because another one was gone, whose own end was no failure."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from traceml.diagnosis.deaths.lost_ranks import rank_lost
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.progress.rank_progress import JobProgress
from traceml.diagnosis.facts.progress.step_sequences import DivergedRanks
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts

CUT = RankExit(
    rank=0, state="failed", code=1, exception="RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:4711",
    file="train.py", line=28, last_step=40, open_step=41, open_phase="backward",
)  # fmt: skip
LEFT = RankExit(rank=1, state="finished", code=0, last_step=40)


def test_a_rank_whose_script_ended_first_is_the_cause() -> None:
    """It did not fail; the others could not go on without it."""
    finding = rank_lost(JobFacts(exits=(CUT, LEFT), world_size=2))

    assert finding.summary == (
        "Rank 1's script ended after 41 steps while rank 0 still trained, which failed at train.py:28, in step 41, in "
        "backward."
    )
    assert finding.headline == "Rank 1 ended before the others"
    assert (finding.ranks, finding.evidence["cause"], finding.evidence["followed"]) == ((1,), "left_early", [0])
    assert "drop_last" in finding.next
    assert "Otherwise let all ranks decide alike whether to leave the loop (early stopping" in finding.next


@pytest.mark.parametrize(
    ("left", "cut", "is_told"),
    [
        ({"data_ended": True}, {}, True),
        ({"data_ended": False}, {}, False),  # it left its loop
        ({"data_ended": True}, {"epoch": 2}, False),  # the other one is past its own data of that epoch
        ({"data_ended": True}, {"data_ended": True}, False),  # both have left their loops
        ({"data_ended": True}, {"epoch": None}, False),  # the other one has no loader
    ],
)
def test_data_that_ended_first_is_told(left: dict[str, bool], cut: dict[str, Any], is_told: bool) -> None:
    """The rank reports at its end how far it has read; the loop of the other one is gone with its exception."""
    before = replace(LEFT, **{"batches": 41, "epoch": 1, **left})
    after = replace(CUT, **{"batches": -1, "epoch": 1, "data_ended": False, **cut})
    finding = rank_lost(JobFacts(exits=(after, before), world_size=2))

    assert ("The data of rank 1 had ended (41 batches)." in finding.summary) is is_told
    has_left = not left["data_ended"]
    or_else = "Let all ranks decide alike whether to leave" if has_left else "If the data ended there, give each rank"
    assert finding.next.startswith("Give each rank the same number" if is_told else or_else)


def test_the_line_that_ended_the_script_is_told() -> None:
    """`sys.exit(0)` on one rank alone: its data may have ended there, or not."""
    left = replace(LEFT, file="train.py", line=10, function="check")
    finding = rank_lost(JobFacts(exits=(CUT, left), world_size=2))

    assert finding.summary.startswith("Rank 1's script ended at train.py:10 check after 41 steps while rank 0 still")
    assert finding.evidence["line"] == 10
    assert "why rank 1 reaches train.py:10 check" in finding.next


def test_what_one_of_several_ranks_has_is_not_said_of_all() -> None:
    """The line that ended its script, that it ended by os._exit(0), and where it failed."""
    left = (replace(LEFT, file="a.py", line=1), replace(LEFT, rank=2, file="a.py", line=7, skipped_exit=True))
    cut = (CUT, replace(CUT, rank=3, line=30))
    finding = rank_lost(JobFacts(exits=(*cut, *left), world_size=4))

    assert finding.summary == (
        "The scripts of ranks 1, 2 ended after 41 steps while ranks 0, 3 still trained, which failed, rank 0 at "
        "train.py:28, in step 41, in backward."
    )


def test_a_process_that_left_by_os_exit_is_no_script_that_ended() -> None:
    """More batches do not help: it skipped the rest of its script."""
    finding = rank_lost(JobFacts(exits=(CUT, replace(LEFT, skipped_exit=True)), world_size=2))

    assert finding.summary.startswith(
        "Rank 1's process ended with exit code 0 after 41 steps while rank 0 still trained"
    )
    assert "os._exit(0)" in finding.next


def test_a_rank_that_waits_after_its_training_does_not_train() -> None:
    """It had as many steps as the others: they did not call the barrier that it called at the end."""
    waits = RankExit(
        rank=0, state="failed", code=1, exception="RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:4711",
        file="train.py", line=40, last_step=40,
    )  # fmt: skip
    finding = rank_lost(JobFacts(exits=(waits, LEFT), world_size=2))

    assert finding.summary == (
        "Rank 1's script ended after 41 steps while rank 0 still needed it, which failed at train.py:40, after step 40."
    )
    assert "the same collectives" in finding.next


def test_a_script_that_has_called_fewer_collectives_ends_first() -> None:
    """Not its data ended: the ranks were out of step before, as with no_sync() on one of them."""
    apart = DivergedRanks(agreed=29, since=30, collectives={0: 38, 1: 37}, backwards={0: 1, 1: 1})
    finding = rank_lost(JobFacts(exits=(CUT, LEFT), world_size=2, progress=JobProgress(diverged=apart)))

    assert finding.summary.endswith(
        " The ranks have been out of step since step 30: at its end rank 1 had called 37 collectives, rank 0 38."
    )
    assert finding.evidence["apart_since_step"] == 30
    assert "the same collectives" in finding.next


def test_a_rank_that_had_come_further_did_not_leave() -> None:
    """It needed the others no more."""
    further = RankExit(rank=1, state="finished", code=0, last_step=60)

    assert rank_lost(JobFacts(exits=(CUT, further), world_size=2)).ranks == (0,)


def test_a_failure_of_its_own_blames_nobody_else() -> None:
    """An error of the script, or of a connection to something else than a rank."""
    for exception in ("ValueError: bad label", "ConnectionResetError: [Errno 104] Connection reset by peer"):
        own = RankExit(rank=0, state="failed", code=1, exception=exception, last_step=40)

        assert rank_lost(JobFacts(exits=(own, LEFT), world_size=2)).ranks == (0,)


def test_a_rank_that_left_the_group_and_runs_is_looked_for() -> None:
    """Its connection is closed, and nothing tells which of the others it was."""
    swept = RankExit(rank=1, state="killed", signal=15, stopped=True, last_step=40)
    finding = rank_lost(JobFacts(exits=(CUT, swept), world_size=2))

    assert finding.ranks == (0,)
    assert "destroy_process_group" in finding.next


@pytest.mark.parametrize(
    ("world_size", "advice"),
    [
        (4, "The end of ranks 2, 3 is not known: look whether they run, and"),
        (3, "The end of rank 2 is not known: look whether it runs, and"),
        (2, "while it still ran: look for destroy_process_group"),
    ],
)
def test_ranks_that_missed_another_one_blame_no_rank_that_is_seen(world_size: int, advice: str) -> None:
    """A host that fell silent is given up half a minute later; until then nothing of its end is known."""
    exits = (CUT, replace(CUT, rank=1, line=30))
    finding = rank_lost(JobFacts(exits=exits, world_size=world_size))

    assert "because of that" not in finding.summary
    assert finding.evidence["failed_too"] == [1]
    assert advice in finding.next


@pytest.mark.parametrize(
    ("exception", "advice"),
    [
        ("RuntimeError: ProcessGroupGloo::allgather: invalid tensor size at index 0", "Read a.py:3"),
        ("RuntimeError: Distributed package doesn't have NCCL built in", "Read a.py:3"),
        ("RuntimeError: Cannot use ReduceOp.PREMUL_SUM with Gloo", "Read a.py:3"),
        ("ValueError: Invalid process group specified", "Read a.py:3"),
        ("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, invalid usage", "Read a.py:3"),
        (
            "torch.distributed.DistNetworkError: The server socket has failed to listen. port: 29500, name: EADDRINUSE",
            "Port 29500 is taken: by an earlier job",
        ),
        ("OSError: [Errno 98] Address already in use", "The port is taken: by an earlier job"),
        (
            "BrokenPipeError: [Errno 32] Broken pipe",
            "a.py:3 wrote to a pipe or a connection that its reader had closed",
        ),
        (
            "RuntimeError: [gloo/transport/tcp/pair.cc:456] Is there a distributed collective mismatch in your code?",
            "equal sizes and types",
        ),
    ],
)
def test_a_call_that_is_wrong_by_itself_is_the_cause(exception: str, advice: str) -> None:
    """A message that only names a backend or a group tells of no rank that left; what the others meet is its end."""
    wrong = RankExit(rank=1, state="failed", code=1, exception=exception, file="a.py", line=3, at_s=2.0, last_step=40)
    finding = rank_lost(JobFacts(exits=(replace(CUT, at_s=1.0), wrong), world_size=2))

    assert (finding.ranks, finding.evidence["followed"]) == ((1,), [0])
    assert advice in finding.next


@pytest.mark.parametrize(
    ("exception", "call"),
    [
        ("RuntimeError: [Rank 0]: Rank 1 failed to pass monitoredBarrier in 8000 ms", "monitored_barrier"),
        (
            "RuntimeError: [gloo/unbound_buffer.cc:78] Timed out waiting 5000ms for recv",
            "init_process_group",
        ),
    ],
)
def test_a_rank_that_waited_in_vain_is_told_where_the_others_were(exception: str, call: str) -> None:
    """Nobody closed a connection: one rank evaluates for longer than a collective may take."""
    waited = replace(CUT, exception=exception)
    swept = RankExit(rank=1, state="killed", signal=15, stopped=True, last_step=40, open_phase="evaluation")
    finding = rank_lost(JobFacts(exits=(waited, swept), world_size=2))

    assert finding.next.startswith(
        "Rank 0 waited for other ranks until the time limit of its collective: rank 1 was in evaluation."
    )
    assert finding.next.endswith(f"more time: {call}(timeout=...).")


def test_one_process_has_no_other_rank() -> None:
    """A closed connection is to a server."""
    alone = RankExit(rank=0, state="failed", code=1, exception="BrokenPipeError: [Errno 32] Broken pipe", file="a.py",
                     line=3)  # fmt: skip

    assert "Another rank" not in rank_lost(JobFacts(exits=(alone,), world_size=1)).next


@pytest.mark.parametrize(
    ("phases", "says", "never"),
    [
        (("comm", "comm"), "Compare the sizes", "on none"),
        (("backward", "comm"), "or on none: rank 2 was in backward.", "rank 3"),
        (("backward", "backward"), "or on none: ranks 2, 3 were in backward.", "Compare"),
        (("backward", "other"), "or on none: rank 2 was in backward.", "rank 3"),
        ((None, "other"), "Compare the sizes", "on none"),
    ],
)
def test_an_abort_in_a_collective_names_the_ranks_elsewhere(phases: tuple, says: str, never: str) -> None:
    """A rank that left the collective out met it with another one, of another size."""
    aborted = RankExit(
        rank=1, state="killed", signal=6, file="train.py", line=9, stack="...", open_phase="comm", at_s=1
    )
    others = [
        RankExit(rank=rank, state="killed", signal=15, stopped=True, open_phase=phase, at_s=2)
        for rank, phase in zip((2, 3), phases, strict=True)
    ]
    finding = rank_lost(JobFacts(exits=(aborted, *others), world_size=4))

    assert says in finding.next
    assert never not in finding.next


def test_an_abort_after_the_loop_over_the_data_is_one_of_uneven_batches() -> None:
    """A rank with fewer batches comes to the next collective of the script; the others are in backward."""
    aborted = RankExit(
        rank=2, state="killed", signal=6, file="train.py", line=9, stack="...", open_phase="comm", in_loop=False, at_s=1
    )
    others = [RankExit(rank=rank, state="killed", signal=15, stopped=True, open_phase="backward") for rank in (0, 1)]

    uneven = (
        "Rank 2 had left its loop over the data, and ranks 0, 1 were in backward. If the data ended there, give each"
    )
    loader, on_none = LoaderFacts(num_workers=0), "Call that collective on every rank, or on none"
    for in_loop, used, says in ((False, loader, uneven), (True, loader, on_none), (False, None, on_none)):
        ended = replace(aborted, in_loop=in_loop)
        finding = rank_lost(JobFacts(exits=(*others, ended), world_size=3, loader=used))
        assert finding.next.startswith(says), finding.next


def test_an_abort_in_a_collective_asks_for_its_sizes() -> None:
    """Gloo ends a process that gets more or less than it expects; without others an abort is an extension's crash.

    A thread of the process may be in the collective, whatever the training does.
    """
    for phase, world_size, words in (
        ("comm", 2, "sizes and types"),
        ("comm", 2, "of that collective on all ranks, and whether all ranks call it: where these differ,"),
        ("comm", 2, "a thread uses the training's process group, as that of async_save"),
        ("other", 2, "an extension"),
        ("comm", 1, "an ext"),
        ("backward", 2, "If it names gloo, the ranks gave one collective different sizes"),
        ("backward", 2, "as those of async_save, which need a process group of their own"),
        ("backward", 1, "an ext"),
        ("optimizer", 2, "as those of async_save, which need a process group of their own"),
        ("optimizer", 1, "Look at the call at train.py:9: an ext"),
    ):
        ended = RankExit(rank=1, state="killed", signal=6, file="train.py", line=9, stack="...", open_phase=phase)
        finding = rank_lost(JobFacts(exits=(ended,), world_size=world_size))

        assert words in finding.next


@pytest.mark.parametrize(
    ("backend", "phase", "open_s", "is_limit"),
    [
        ("nccl", "comm", 600.0, True),
        ("nccl", "other", None, True),
        ("nccl", "comm", 2.0, False),  # an error of the device, or a crash of an extension
        ("gloo", "comm", None, False),
        ("nccl", "exit", None, False),
    ],
)
def test_an_abort_by_the_watchdog_of_nccl_tells_who_was_elsewhere(
    backend: str, phase: str, open_s: float | None, is_limit: bool
) -> None:
    """It ends the process without an exception, when a rank has not come to the collective until its time limit."""
    exits = [RankExit(rank=rank, state="killed", signal=6, open_phase=phase, open_s=open_s, at_s=1) for rank in (0, 1)]
    late = RankExit(
        rank=2, state="killed", signal=15, stopped=True, open_phase="forward", seen="/home/me/train.py:23 test", at_s=2
    )
    finding = rank_lost(JobFacts(exits=(*exits, late), world_size=3, accelerator="cuda", backend=backend))

    where = (
        "until the time limit of its collective: rank 2 was in forward, last seen at train.py:23 test. Let all ranks"
    )
    assert (where in finding.next) == is_limit, finding.next
    assert ("sizes" in finding.next) == (backend == "gloo")
    assert ("faulthandler" in finding.next) == (open_s == 2.0)


@pytest.mark.parametrize(
    "exception",
    [
        "Timed out after 601 seconds waiting for clients. 2/3 clients joined.",
        "wait timeout after 300000ms, keys: /default_pg/0//cpu//0/2",
    ],
)
def test_a_rank_that_waited_in_the_store_is_no_cause(exception: str) -> None:
    """The rank that ended before it could join is; where nothing of it is known, those that waited did so alike."""
    waited = [
        RankExit(rank=rank, state="failed", code=1, exception=f"torch.distributed.DistStoreError: {exception}",
                 file="train.py", line=3 + rank, at_s=600.0 + 9 * rank)
        for rank in (0, 1)
    ]  # fmt: skip
    died = RankExit(rank=2, state="lost", process_gone=True, at_s=1.0)
    finding = rank_lost(JobFacts(exits=(*waited, died), world_size=3))
    assert (finding.ranks, finding.evidence["followed"]) == ((2,), [0, 1])

    finding = rank_lost(JobFacts(exits=tuple(waited), world_size=3, hosts={0: "a", 1: "a"}, latest=(-1, -1, -1)))
    assert finding.ranks == (0,)
    assert "because of that" not in finding.summary
    assert "until the time limit of its process group: nothing was seen of rank 2. Let all" in finding.next
