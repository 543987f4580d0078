"""The text of `traceml stacks`."""

from __future__ import annotations

from traceml.database.snapshots.rank_snapshot import (
    FrameSnapshot,
    GroupSnapshot,
    ProcessSnapshot,
    ThreadSnapshot,
    WorkerSnapshot,
)
from traceml.renderers.text.rank_stacks_text import MissingRank, StacksRank, stacks_text

_LIBRARY = FrameSnapshot(file="/site-packages/torch/distributed.py", line=2372, function="all_reduce")
_TRAIN = FrameSnapshot(file="/home/me/train.py", line=40, function="train", is_user=True)
_STUCK = FrameSnapshot(file="/home/me/train.py", line=6, function="stuck", is_user=True)
TRANSFERS = (("send", 2), ("recv", 0), ("recv", None))
_GROUP = GroupSnapshot(members=(0, 1), number=61, operation="all_reduce", sizes=(4,), in_flight=True)


def _stack(rank: int, **facts: object) -> StacksRank:
    usual = {"step": 120, "in_step": True, "phase": "backward", "answered": "recorder", "process_state": "S"}
    return StacksRank(host="gpu1", rank=rank, pid=1000 + rank, **usual | facts)  # type: ignore[arg-type]


def test_equal_stacks_are_shown_once() -> None:
    """The largest group first, the odd rank with its host and process."""
    waiting = [_stack(rank, frames=(_LIBRARY, _TRAIN), groups=(_GROUP,), quiet_s=13.0) for rank in range(7)]
    stuck = _stack(7, frames=(_STUCK,), step=119, phase="other", quiet_s=13.2)

    assert stacks_text([stuck, *waiting]) == (
        "ranks 0-6: step 120, backward, no progress for 13 s\n"
        "  all_reduce 61 of the default group is not done\n"
        "    distributed.py:2372 all_reduce\n"
        "  > train.py:40 train\n"
        "\n"
        "rank 7 (gpu1, pid 1007): step 119, other, no progress for 13 s\n"
        "  > train.py:6 stuck"
    )


def test_ranks_in_different_collectives_are_shown_apart() -> None:
    """What is said of a group is true of each rank in it."""
    later = GroupSnapshot(members=(0, 1), number=62, operation="barrier", in_flight=True)
    text = stacks_text([_stack(0, frames=(_TRAIN,), groups=(_GROUP,)), _stack(1, frames=(_TRAIN,), groups=(later,))])

    assert text.count("train.py:40 train") == 2
    assert "all_reduce 61" in text
    assert "barrier 62" in text


def test_a_send_or_receive_is_shown_with_the_other_rank() -> None:
    """If it is known."""
    snapshots = [GroupSnapshot(operation=name, in_flight=True, is_p2p=True, peer=peer) for name, peer in TRANSFERS]
    texts = [stacks_text([_stack(0, frames=(_TRAIN,), groups=(snapshot,))]) for snapshot in snapshots]

    assert [text.splitlines()[1].strip() for text in texts] == [
        "send to rank 2 is not done",
        "recv from rank 0 is not done",
        "recv is not done",
    ]


def test_a_healthy_rank_is_not_said_to_stand() -> None:
    """Between two steps there is always a moment without progress."""
    text = stacks_text([_stack(0, frames=(_TRAIN,), quiet_s=0.3)])

    assert "progress" not in text
    assert "is not done" not in text


def test_a_rank_that_could_not_answer_says_why() -> None:
    """By the signal it holds the GIL; stopped or stuck in the kernel it has no stack."""
    holds = _stack(0, answered="signal", frames=(_STUCK,), process_state="R")
    waits = _stack(1, answered="signal", frames=(_STUCK,), waits_on="stderr")
    stopped = _stack(2, answered="kernel", process_state="T")
    asks = _stack(3, answered="signal", is_waiting_for_gil=True, threads=(ThreadSnapshot(line=_STUCK),))
    kernel = _stack(4, answered="kernel", process_state="D", wchan="d_alloc_parallel")
    text = stacks_text([holds, waits, stopped, asks, kernel])

    assert "holds the GIL in C code, computing\n" in text
    assert "holds the GIL in C code, waiting\n  blocked on stderr\n" in text
    assert "stopped by a signal\n  no Python stack" in text
    assert "waits for the GIL, which another thread holds in C code\n" in text
    assert "\n  thread: train.py:" in text
    assert "frozen by its cgroup (in d_alloc_parallel)\n" in text


def test_other_threads_and_the_awaited_process_are_shown() -> None:
    """Ranks that differ in them are shown apart."""
    thread = ThreadSnapshot(name="upload", line=_STUCK)
    blocker = ProcessSnapshot(pid=77, name="ffmpeg")
    text = stacks_text([_stack(0, frames=(_TRAIN,), threads=(thread,), blocker=blocker), _stack(1, frames=(_TRAIN,))])

    assert "  waits for process 77 (ffmpeg)\n" in text
    assert "  thread 'upload': train.py:6 stuck\n\nrank 1" in text
    assert text.count("upload") == 1


def test_threads_in_a_collective_are_shown_with_it() -> None:
    """Also those of a library, which have no line of the script."""
    threads = (
        ThreadSnapshot(name="metrics", line=_STUCK, collective="all_reduce"),
        ThreadSnapshot(name="checkpoint", collective="gather_object"),
        ThreadSnapshot(name="idle"),
    )

    assert stacks_text([_stack(0, threads=threads)]).splitlines()[-2:] == [
        "  thread 'metrics': train.py:6 stuck, in all_reduce",
        "  thread 'checkpoint': in gather_object",
    ]


def test_the_awaited_worker_is_shown() -> None:
    """With its stack; the others are not."""
    idle = WorkerSnapshot(index=0, pid=10, state="S", wchan="pipe_read")
    awaited = WorkerSnapshot(index=1, pid=11, state="S", wchan="futex_do_wait", frames=(_STUCK,), waits_for_batch=5)
    text = stacks_text([_stack(0, frames=(_TRAIN,), workers=(idle, awaited), phase="input_wait")])

    assert (
        "waits for batch 5 of loader worker 1 (pid 11), which sleeps in futex_do_wait\n    > train.py:6 stuck" in text
    )
    assert "pipe_read" not in text


def test_ranks_that_did_not_answer_are_named() -> None:
    """One with its reason, many with their hosts."""
    one = stacks_text([_stack(0)], [MissingRank(3, "gpu2", "it did not answer")])
    many = stacks_text([_stack(0)], [MissingRank(rank, "gpu2", "it did not answer") for rank in (3, 4, 5)])

    assert one.endswith("rank 3 on gpu2: it did not answer")
    assert many.endswith("ranks 3-5 did not answer, on 1 host: gpu2")


def test_ranks_that_never_connected_have_no_host() -> None:
    """They are told apart from those that do not answer."""
    both = stacks_text([_stack(0)], [MissingRank(2, "", "it has not connected"), MissingRank(3, "gpu2", "no")])
    none = stacks_text([_stack(0)], [MissingRank(3, "gpu2", "it did not answer")])

    assert both.endswith(
        "rank 2 has not connected: still starting, or stuck before tracing began\n\nrank 3 on gpu2: no"
    )
    assert "connected" not in none


def test_what_a_terminal_would_obey_is_escaped() -> None:
    """A function's name comes from the user's code."""
    evil = FrameSnapshot(file="a.py", line=1, function="f\x1b[2J", is_user=True)

    assert "\x1b" not in stacks_text([_stack(0, frames=(evil,))])
