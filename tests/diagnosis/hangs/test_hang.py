"""Sentences about hangs, by what was seen of the ranks; and what is no hang."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from tests.diagnosis.fabricated import Job, window_of
from tests.diagnosis.hangs.standing import (
    ENGINE,
    NOW_NS,
    TORCH,
    S,
    call,
    facts,
    found,
    group,
    in_backward,
    judged,
    line,
    snapshot,
)
from traceml.database.schema import STEPS, pack_bits
from traceml.database.snapshots.rank_snapshot import (
    FrameSnapshot,
    GroupSnapshot,
    ProcessSnapshot,
    RankSnapshot,
    ThreadSnapshot,
    WorkerSnapshot,
)
from traceml.diagnosis.facts.ends import EndingSignal, RankExit
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.hangs import blame
from traceml.diagnosis.hangs.hang import hang
from traceml.diagnosis.kinds import Kind

BEHIND = (group(14, "all_reduce", flying=False),)
STUCK = snapshot(1, line(6, "stuck"), groups=BEHIND, wchan="hrtimer_nanosleep")


def summary(finding: Finding | None) -> str:
    assert finding is not None
    assert finding.kind is Kind.HANG
    return finding.summary


@pytest.mark.parametrize("operation", ["new_group", "monitored_barrier"])
def test_a_rank_in_a_call_without_a_number_is_told_to_meet_the_others(operation: str) -> None:
    """It asks torch's store, which is no server of the script's."""
    calls = snapshot(1, call(operation), line(12, "hook"), wchan="inet_wait", waits_on="tcp [::ffff:127.0.0.1]:35429",
                     groups=(group(14, "all_reduce", flying=False),))  # fmt: skip
    finding = found(in_backward(0), calls)

    assert summary(finding).startswith(
        f"Rank 1 never reached all_reduce #15: it has been in {operation} (train.py:12 hook)"
    )
    assert finding.next.startswith("Call the same collectives in the same order on every rank")


def test_a_rank_in_its_own_code_never_came_to_the_collective():
    """It is named, with its line and state; the others' collective and line are evidence."""
    finding = found(in_backward(0), STUCK)

    assert summary(finding) == (
        "Rank 1 never reached all_reduce #15: it has been in train.py:6 stuck, sleeping for 75 s; "
        "rank 0 waits for it in all_reduce #15 in backward (train.py:28 main)."
    )
    assert finding.headline == "Rank 1 blocks the others, in train.py:6 stuck"
    assert (finding.ranks, finding.evidence["line"], finding.evidence["waiting"]) == ((1,), 6, [0])


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        ("evaluation", "in evaluation, in train.py:6 stuck, sleeping"),
        ("checkpoint", "in checkpoint saving, in train.py:6 stuck, sleeping"),
        ("startup", "in start-up, in train.py:6 stuck, sleeping"),
        ("exit", "at its end, in train.py:6 stuck, sleeping"),
        ("rollout", "in phase 'rollout', in train.py:6 stuck, sleeping"),
        ("outside", "in train.py:6 stuck, sleeping"),
        ("other", "in train.py:6 stuck, sleeping"),
    ],
)
def test_the_phase_is_told_where_it_says_more_than_the_line(phase, told):
    """Of the rank that blocks the others, and of those that wait."""
    waits = snapshot(0, call("barrier"), line(30), phase="evaluation", groups=(group(15, "barrier"),))

    text = summary(found(waits, replace(STUCK, phase=phase)))

    assert f"has been {told} for 75 s" in text
    assert "in barrier #15 in evaluation (train.py:30 main)" in text


def test_a_rank_whose_script_ended_earlier_has_fewer_data():
    """It is said after 5 s, as it can never come."""
    ended = RankExit(rank=1, state="finished", code=0, last_step=8)
    waits = replace(in_backward(0), step=9, quiet_s=7.0, at_ns=NOW_NS)
    finding = judged(facts([waits], ended, steps=9))

    assert summary(finding) == (
        "Rank 1's script ended after 9 steps; rank 0 waits for it in all_reduce #15 in backward (train.py:28 main), "
        "for 7.0 s."
    )
    assert "drop_last" in finding.next


def test_more_steps_of_the_others_are_reported():
    """The numbers of steps are told where they differ."""
    ended = RankExit(rank=1, state="finished", code=0, last_step=8)

    assert "ended after 9 steps, the others had 12; rank 0 waits" in summary(
        judged(facts([replace(in_backward(0), step=12)], ended, steps=9))
    )


def test_the_step_in_which_a_script_ended_counts():
    """Its end has closed it: here both ranks have made 41 steps."""
    ended = RankExit(rank=1, state="finished", code=0, last_step=39, open_step=40)
    text = summary(judged(facts([replace(in_backward(0), step=41)], ended, steps=40)))

    assert text.startswith("Rank 1's script ended after 41 steps; rank 0 waits")


def test_different_operations_at_the_same_number_never_meet():
    """Both lines are named, after 5 s."""
    zero = snapshot(0, call("all_reduce"), line(25), quiet_s=6.0, groups=(group(6, "all_reduce"),))
    one = snapshot(1, call("all_gather"), line(24), quiet_s=6.0, groups=(group(6, "all_gather"),))

    assert summary(found(zero, one)) == (
        "Rank 0 is in all_reduce #6 (train.py:25 main), rank 1 is in all_gather #6 (train.py:24 main), for 6.0 s: "
        "different code paths."
    )
    assert found(zero, one).ranks == (0, 1)
    assert found(replace(zero, quiet_s=3.0), replace(one, quiet_s=3.0)) is None


def test_the_minority_of_operations_is_named():
    """Of four ranks the one in another collective."""
    known = {"members": (0, 1, 2, 3)}
    many = [
        snapshot(rank, call("all_reduce"), line(25), groups=(group(6, "all_reduce", **known),)) for rank in (0, 1, 3)
    ]
    one = snapshot(2, call("barrier"), line(24), groups=(group(6, "barrier", **known),))

    assert found(*many, one, ranks=4).ranks == (2,)


def test_different_operations_in_a_sub_group_are_told_though_others_wait():
    """The other ranks wait for these in a collective of all."""
    everyone = {"members": (0, 1, 2, 3)}

    def apart(rank, operation, number):
        mine = GroupSnapshot(name="mygrp", members=(0, 1), number=1, operation=operation, in_flight=True)
        groups = (group(5, "all_reduce", flying=False, **everyone), mine)
        return snapshot(rank, call(operation), line(number), groups=groups)

    rest = [
        snapshot(rank, call("all_reduce"), line(30), groups=(group(6, "all_reduce", **everyone),)) for rank in (2, 3)
    ]
    finding = found(apart(0, "all_reduce", 20), apart(1, "broadcast", 21), *rest, ranks=4)

    assert (finding.ranks, finding.evidence["cause"]) == ((0, 1), "mismatch")
    assert summary(finding) == (
        "Rank 0 is in all_reduce #1 of group 'mygrp' (train.py:20 main), rank 1 is in broadcast #1 of group 'mygrp' "
        "(train.py:21 main), for 75 s: different code paths; ranks 2, 3 wait for them in all_reduce #6 (train.py:30 "
        "main)."
    )


def test_sizes_of_an_all_reduce_must_agree():
    """Sizes of a gather need not."""

    def at(rank, operation, size):
        return snapshot(rank, call(operation), line(5), groups=(group(3, operation, sizes=(size,)),))

    assert "of 4,096 elements" in summary(found(at(0, "all_reduce", 1024), at(1, "all_reduce", 4096)))
    assert "sizes differ" not in summary(found(at(0, "gather", 1024), at(1, "gather", 4096)))
    assert "Rank 0 is in all_reduce #3 of 1 element (" in summary(found(at(0, "all_reduce", 1), at(1, "all_reduce", 9)))


def test_tensors_of_one_call_are_told_where_their_sum_is_the_same():
    """A sentence that says of all ranks that they have 5 elements would deny that their sizes differ."""
    one, other = (
        snapshot(rank, call("all_reduce"), line(5), groups=(group(3, "all_reduce", sizes=sizes),))
        for rank, sizes in enumerate([(2, 3), (3, 2)])
    )

    told = summary(found(one, other))
    assert "Rank 0 is in all_reduce #3 of 2 + 3 elements" in told
    assert "rank 1 is in all_reduce #3 of 3 + 2 elements" in told


def test_groups_of_one_description_do_not_meet():
    """torch names all groups of a dimension of the mesh alike; replicas may have batches of other sizes."""

    def at(rank, size, root):
        members = (0, 1) if rank < 2 else (2, 3)
        known = {"name": "mesh_tp", "members": members, "sizes": (size,), "peer": root}
        return snapshot(rank, call("broadcast"), line(5), groups=(group(100, "broadcast", **known),))

    ranks = [at(rank, 4096 if rank < 2 else 8192, rank // 2 * 2) for rank in range(4)]

    assert found(*ranks, ranks=4).evidence["cause"] == "network"
    assert found(*(replace(each, quiet_s=6.0) for each in ranks), ranks=4) is None


def test_roots_of_a_broadcast_must_agree():
    """Each rank sends; those whose root is not known are not compared."""

    def at(rank, root):
        return snapshot(rank, call("broadcast"), line(5), groups=(group(3, "broadcast", peer=root),))

    finding = found(at(0, 0), at(1, 1))
    assert (finding.ranks, finding.evidence["cause"]) == ((0, 1), "roots")
    assert summary(finding) == (
        "Rank 0 is in broadcast #3 from rank 0 (train.py:5 main), rank 1 is in broadcast #3 from rank 1 (train.py:5 "
        "main), for 75 s: they name different ranks."
    )
    assert found(at(0, 0), at(1, None)).evidence["cause"] == "network"
    assert found(at(0, 0), at(1, 0)).evidence["cause"] == "network"


def test_a_rank_alone_in_a_barrier_is_reported():
    """As for a barrier that only the saving rank calls."""
    known = {"members": (0, 1, 2)}
    alone = snapshot(0, call("barrier"), line(30, "save"), groups=(group(6, "barrier", **known),))
    others = [snapshot(rank, line(41), groups=(group(5, "all_reduce", flying=False, **known),)) for rank in (1, 2)]

    assert summary(found(alone, *others, ranks=3)) == (
        "Rank 0 alone has waited in barrier #6 (train.py:30 save) for 75 s: ranks 1, 2 never reached it: ranks 1, 2 in "
        "train.py:41 main."
    )


def test_sub_groups_in_different_order_are_a_cycle():
    """The ranks of the cycle are named, not those that only wait for it."""
    mine = GroupSnapshot(name="mygrp", members=(0, 1), number=1, operation="all_reduce", in_flight=True)
    everyone = {"members": (0, 1, 2)}
    zero = snapshot(0, call("all_reduce"), line(20), groups=(group(5, "barrier", flying=False, **everyone), mine))
    rest = [
        snapshot(rank, call("all_reduce"), line(30), groups=(group(6, "all_reduce", **everyone),)) for rank in (1, 2)
    ]

    assert summary(found(zero, *rest, ranks=3)) == (
        "Ranks 0, 1 wait for each other: rank 0 in all_reduce #1 of group 'mygrp' (train.py:20 main), rank 1 in "
        "all_reduce #6 (train.py:30 main), for 75 s; rank 2 waits for them in all_reduce #6 (train.py:30 main)."
    )


def test_a_collective_of_a_thread_is_told_with_the_threads_line():
    """The training thread waits for the lock that it holds, at a line that calls none."""
    metrics = GroupSnapshot(name="metrics", members=(0, 1), number=4, operation="all_reduce", in_flight=True)
    thread = ThreadSnapshot(name="metrics", line=line(10, "publish"), is_daemon=True, collective="all_reduce")
    waits = {"wchan": "futex_do_wait", "groups": (group(14, "all_reduce", flying=False), metrics)}
    finding = found(snapshot(0, line(19), threads=(thread,), **waits), in_backward(1))

    assert summary(finding) == (
        "Ranks 0, 1 wait for each other: rank 0 in all_reduce #4 of group 'metrics' in its thread 'metrics' in "
        "train.py:10 publish, while train.py:19 main is waiting for a lock, rank 1 in all_reduce #15 in backward "
        "(train.py:28 main), for 75 s."
    )
    assert finding.next.endswith("Hold no lock in a thread's collective for which the training waits.")


def test_a_cycle_without_threads_tells_nothing_of_locks():
    """The training thread itself is in the collective."""
    metrics = GroupSnapshot(name="metrics", members=(0, 1), number=4, operation="all_reduce", in_flight=True)
    thread = ThreadSnapshot(name="log", line=line(10, "log"), is_daemon=True)
    waits = {"wchan": "futex_do_wait", "groups": (group(14, "all_reduce", flying=False), metrics)}
    finding = found(snapshot(0, call("all_reduce"), line(19), threads=(thread,), **waits), in_backward(1))

    assert "rank 0 in all_reduce #4 of group 'metrics' (train.py:19 main), rank 1" in summary(finding)
    assert "lock" not in finding.next


CHECKPOINT = ThreadSnapshot(name="checkpoint", is_daemon=True, collective="gather_object")


def test_two_threads_in_collectives_of_one_group_are_told():
    """As an asynchronous checkpoint without a group of its own: ranks are apart, and no branch is the cause."""
    gathers = snapshot(1, call("all_gather"), line(20), groups=(group(15, "all_gather"),), threads=(CHECKPOINT,))
    finding = found(in_backward(0, threads=(CHECKPOINT,)), gathers)

    assert summary(finding).endswith(
        ", for 75 s. On ranks 0, 1 the thread 'checkpoint' in gather_object is in a collective, too."
    )
    assert finding.next.startswith("If that thread uses the same process group, give it one of its own")


def test_the_newest_collective_of_a_group_may_be_the_threads():
    """The training thread, beside it, is in another one: its stack does not fit the operation."""
    reduces = snapshot(
        1, call("reduce_scatter_single"), line(20), groups=(group(15, "gather"),), threads=(CHECKPOINT,), phase="comm"
    )

    assert summary(found(in_backward(0, threads=(CHECKPOINT,)), reduces)).startswith(
        "Rank 0 is in all_reduce #15 in backward (train.py:28 main), rank 1 is in gather #15 in its thread "
        "'checkpoint' in gather_object, beside train.py:20 main, for 75 s. On ranks 0, 1 the thread 'checkpoint'"
    )


@pytest.mark.parametrize(
    ("collective", "groups"),
    [
        ("gather_object", (GroupSnapshot(name="saving", number=3, operation="gather", in_flight=True),)),
        ("", ()),
    ],
)
def test_a_thread_in_a_group_of_its_own_is_not_the_cause(collective: str, groups: tuple[GroupSnapshot, ...]):
    """Nor is one that is in no collective."""
    threads = (replace(CHECKPOINT, collective=collective),)
    gathers = snapshot(1, call("all_gather"), line(20), groups=(group(15, "all_gather"), *groups), threads=threads)
    finding = found(in_backward(0), gathers)

    assert summary(finding).endswith(": different code paths.")
    assert finding.next.startswith("Call the same collectives in the same order")


def test_ranks_in_one_operation_are_compared_once(monkeypatch):
    """With 10,000 ranks each comparison of all with all would take minutes."""
    compared = []
    monkeypatch.setattr(blame, "_is_behind", lambda snapshot, *_, **__: compared.append(1) or snapshot.rank == 2)
    waiting = [
        snapshot(rank, call("barrier"), line(30), groups=(group(6, "barrier", members=()),)) for rank in range(9)
    ]

    assert found(*waiting, ranks=9).ranks == (2,)
    assert len(compared) == 9


def test_a_receive_from_a_rank_in_a_collective_is_a_cycle():
    """Point to point operations need no number."""
    receives = snapshot(
        0, call("recv"), line(56), groups=(group(5, "x", flying=False), group(1, "recv", is_p2p=True, peer=1))
    )
    one = snapshot(1, call("all_reduce"), line(57), groups=(group(6, "all_reduce"),))

    finding = found(receives, one)
    assert "rank 0 in recv from rank 1 (train.py:56 main), rank 1 in all_reduce #6" in summary(finding)
    assert "Give each send a receive" in finding.next


def test_ranks_that_wait_at_several_places_are_told_apart():
    """As the stages of a pipeline: each has its own peer and line."""
    waiting = [
        snapshot(rank, call("recv"), line(50 + rank), groups=(group(1, "recv", is_p2p=True, peer=peer),))
        for rank, peer in ((0, 1), (1, 2), (3, 2))
    ]

    assert summary(found(*waiting, snapshot(2, line(6, "stuck"), wchan="hrtimer_nanosleep"), ranks=4)) == (
        "Rank 2 has been in train.py:6 stuck, sleeping for 75 s; rank 0 waits for it in recv from rank 1 "
        "(train.py:50 main), rank 1 in recv from rank 2 (train.py:51 main), rank 3 in recv from rank 2 "
        "(train.py:53 main)."
    )


def in_schedule(rank: int, **known: Any) -> RankSnapshot:
    """Return a snapshot of a stage that waits for another one, which nothing tells."""
    frames = [FrameSnapshot(file=f"{TORCH}/distributed/pipelining/schedules.py", function=name, line=9)
              for name in ("_wait_batch_p2p", "PipelineScheduleSingle.step")]  # fmt: skip
    groups = (GroupSnapshot(members=(0, 1, 2), number=655),)
    return snapshot(rank, *frames, line(70 + rank), phase="comm", groups=groups, **known)


@pytest.mark.parametrize("left", [0, 40])
def test_a_stage_that_has_left_its_pipeline_is_told(left):
    """It meets the others in a barrier that they never come to, with or without data of its own that ended."""
    known = {"batches": 41, "epoch": 1} if left else {}
    ended = {"batches": left, "epoch": 1, "data_ended": True} if left else {}
    barrier = (group(1, "barrier", members=(0, 1, 2)),)
    stages = [in_schedule(0, **known), in_schedule(1, **known)]
    finding = found(*stages, snapshot(2, call("barrier"), line(131), phase="comm", groups=barrier, **ended), ranks=3)

    assert finding.ranks == (2,)
    assert summary(finding).startswith(
        "Rank 2 never reached step: its data ended (40 batches, the others 41), and it has been in barrier #1"
        if left
        else "Ranks 0, 1 are in step (train.py:70 main, train.py:71 main), rank 2 is in barrier #1 (train.py:131 main)"
    )


def test_a_stage_that_computes_is_waited_for():
    """Not the one that waits in the barrier."""
    barrier = snapshot(2, call("barrier"), line(131), groups=(group(1, "barrier", members=(0, 1, 2)),))
    finding = found(in_schedule(0), snapshot(1, line(6, "stuck"), groups=()), barrier, ranks=3)

    assert finding.ranks == (1,)


def test_a_remote_call_is_told_with_the_thread_that_may_run_it():
    """It is no collective: what the other rank runs for it may be what waits."""
    frame = FrameSnapshot(file=f"{TORCH}/distributed/rpc/api.py", function="rpc_sync", line=842)
    running = (ThreadSnapshot(line=line(6, "stuck"), is_daemon=True),)
    ranks = [snapshot(rank, frame, line(20), wchan="futex_do_wait", threads=running) for rank in (0, 1)]
    finding = found(*ranks)

    assert "ranks 0, 1 in rpc_sync (train.py:20 main), with its thread in train.py:6 stuck" in summary(finding)
    assert "network" not in summary(finding) + finding.next


@pytest.mark.parametrize(("state", "words"), [("R", "what that call computes"), ("S", "ctypes.PyDLL does not")])
def test_a_call_that_holds_the_interpreter_has_advice(state, words):
    """By whether it computes."""
    held = snapshot(1, line(24, "hold"), answered="signal", process_state=state, quiet_s=500.0)

    assert words in found(in_backward(0, quiet_s=500.0), held).next


@pytest.mark.parametrize(
    ("lines", "words", "blamed"),
    [
        ([line(9, "match")], "which its thread in train.py:9 match holds in C code", 9),
        ([line(9, "match"), line(12, "poll")], "which another thread holds in C code", 6),
    ],
)
def test_a_rank_whose_thread_holds_the_interpreter_is_told_with_that_thread(lines, words, blamed):
    """Where it is known which one; the main thread's own call is not in C, however often it wakes."""
    threads = tuple(ThreadSnapshot(line=each, is_daemon=True) for each in lines)
    waits = snapshot(1, line(6, "stuck"), answered="signal", is_waiting_for_gil=True, threads=threads, groups=BEHIND)

    finding = found(in_backward(0), waits)

    assert f"it has been in train.py:6 stuck, waiting for the GIL, {words} for 75 s" in summary(finding)
    assert (finding.evidence["line"], finding.evidence.get("thread")) == (blamed, None)
    assert "must release the GIL" in finding.next


def test_lines_of_one_collective_are_all_told():
    """Ranks may call it in different lines."""
    ranks = [in_backward(0), in_backward(1, at=44)]

    assert "all_reduce #15 in backward (train.py:28 main, train.py:44 main)" in summary(found(*ranks))


def test_all_ranks_in_the_same_collective_blame_nobody():
    """The network may be it."""
    finding = found(in_backward(0), in_backward(1))

    assert finding.ranks == ()
    assert summary(finding) == (
        "All ranks have been in all_reduce #15 in backward (train.py:28 main) for 75 s: none is missing, so look "
        "at network and devices."
    )


def test_ranks_that_do_not_find_each_other_are_told_what_they_wait_for():
    """A wrong address or world size is no fault of the network; the headline says so, too."""
    seen = ("tcp 127.0.0.1:29500", "connect 10.0.0.9:29500", "connect 10.0.0.9:29500")
    finding = found(
        *(
            snapshot(rank, call("init_process_group"), line(5), phase="startup", wchan="do_sys_poll", waits_on=each)
            for rank, each in enumerate(seen)
        ),
        world_size=3,
    )

    assert (finding.ranks, finding.evidence["cause"]) == ((), "rendezvous")
    assert summary(finding) == (
        "All ranks have been in init_process_group in start-up (train.py:5 main) for 75 s and do not find each other: "
        "rank 0 waiting for the network (127.0.0.1:29500), ranks 1, 2 connecting to 10.0.0.9:29500."
    )
    assert finding.headline == "The ranks do not find each other in init_process_group, in train.py:5 main"
    assert "MASTER_ADDR" in finding.next


@pytest.mark.parametrize("spawned", [True, False])
def test_ranks_that_a_script_below_torchrun_has_spawned_find_no_store(*, spawned: bool) -> None:
    """They have torchrun's variables, by which rank 0 makes no store; with other ranks the address may be wrong."""
    process = FrameSnapshot(file="/usr/lib/python3.11/multiprocessing/process.py", line=108, function="BaseProcess.run")
    frames = [call("init_process_group"), line(5, "work"), *([process] if spawned else [])]
    finding = found(*(snapshot(rank, *frames, phase="startup") for rank in range(2)))

    assert finding.evidence["cause"] == "rendezvous"
    assert ("The script starts these ranks itself" in finding.next) is spawned
    assert "Compare MASTER_ADDR" in finding.next


@pytest.mark.parametrize(("restarts", "words"), [(1, "a store of its own"), (0, "MASTER_ADDR")])
def test_ranks_that_torchrun_has_restarted_may_have_read_old_addresses(restarts: int, words: str) -> None:
    """Its store serves each attempt; the address of the store itself was right before."""
    waiting = [snapshot(rank, call("init_process_group"), line(5), phase="startup") for rank in range(2)]

    finding = judged(structs.replace(facts(waiting), store_restarts=restarts))

    assert finding is not None
    assert words in finding.next


def test_calls_that_point_to_no_rank_are_listed():
    """As of torch.distributed.rpc: all ranks have answered, so none is to be looked for."""
    zero = snapshot(0, call("rpc_sync"), line(20))
    one = snapshot(1, call("shutdown"), line(30), groups=())
    finding = found(zero, one)

    assert "rank 0 in rpc_sync (train.py:20 main), rank 1 in shutdown (train.py:30 main)" in summary(finding)
    assert "did not answer" not in finding.next
    assert finding.next.startswith("Find out what these calls wait for")
    assert finding.headline == "No rank makes progress, rank 0 in train.py:20 main"


def test_the_place_of_one_rank_is_not_that_of_all():
    """The headline says whose it is, unless all of them are there."""
    waits = in_backward(0, groups=(group(15, "all_reduce", members=()),))
    apart = [snapshot(rank, line(5 + rank, "stuck"), groups=BEHIND) for rank in (1, 2)]
    together = [replace(each, frames=apart[0].frames) for each in apart]
    met = [replace(waits, rank=rank, frames=(ENGINE, line(27 + rank))) for rank in range(3)]

    assert found(waits, *apart, ranks=3).headline == "Ranks 1, 2 block the others, rank 1 in train.py:6 stuck"
    assert found(waits, *together, ranks=3).headline == "Ranks 1, 2 block the others, in train.py:6 stuck"
    assert found(*met, ranks=3).headline == "All ranks hang in all_reduce #15, rank 0 in train.py:27 main"
    alone = [replace(each, rank=each.rank - 1) for each in apart]
    assert found(*alone).headline == "Ranks 0, 1 make no progress, rank 0 in train.py:6 stuck"


def test_a_rank_without_an_answer_is_no_culprit():
    """It is named as one that did not answer."""
    finding = found(in_backward(0, groups=(group(15, "all_reduce", members=(0, 2)),)), ranks=2, silent=(1,))

    assert "rank 1 did not answer" in summary(finding)
    assert "init_process_group" not in finding.next


@pytest.mark.parametrize(("quiet_s", "is_hang"), [(75.0, True), (20.0, False)])
def test_a_rank_that_never_answered_is_missed_after_the_end_too(quiet_s, is_hang):
    """What was a hang while the job ran is one when it was ended; a rank that is still starting is none."""
    waiting = snapshot(0, call("init_process_group"), line(7), step=-1, in_step=False, phase="startup", quiet_s=quiet_s)
    ended = RankExit(rank=0, state="killed", signal=15)
    finding = judged(facts([waiting], ended, state="stopped", rows=False, ranks=2, silent=(1,), absent=(1,)))

    assert (finding is not None) is is_hang
    if finding is not None:
        assert "in init_process_group in start-up (train.py:7 main)" in summary(finding)
        assert "rank 1 did not answer" in summary(finding)
        assert "what they do before init_process_group" in finding.next
        assert "MASTER_ADDR" in finding.next


GIL = "in C code called at train.py:6 stuck that holds the GIL"
LOCK_FILE = {"wchan": "locks_lock_inode_wait", "waits_on": "/tmp/lock"}


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"answered": "signal", "process_state": "S"}, f"{GIL}, waiting"),
        ({"answered": "signal", "process_state": "R"}, f"{GIL}, computing"),
        ({"answered": "signal", "process_state": "D", "waits_on": "/ck/a.pt"}, f"{GIL}, waiting for a disk (/ck/a.pt)"),
        ({"answered": "kernel", "process_state": "T"}, "in train.py:6 stuck, stopped by a signal"),
        ({"answered": "kernel", "wchan": "do_wait"}, "in train.py:6 stuck, waiting for a child process to end"),
        ({"answered": "kernel", "wchan": "do_wait", "is_gil_held": True}, f"{GIL}, waiting for a child"),
        ({"wchan": "anon_pipe_write", "waits_on": "stderr"}, "stuck, writing to stderr, which nobody reads"),
        (LOCK_FILE, "in train.py:6 stuck, waiting for a file lock (/tmp/lock)"),
        ({"wchan": "do_wait"}, "in train.py:6 stuck, waiting for a child process to end"),
        ({"wchan": "futex_do_wait"}, "in train.py:6 stuck, waiting for a lock"),
        ({"process_state": "D", "waits_on": "/data/x.bin"}, "stuck, waiting for a disk (/data/x.bin)"),
        ({"wchan": "an_unknown_function"}, "in train.py:6 stuck for 75 s"),
    ],
)
def test_the_state_of_the_process_is_reported(seen, words):
    """And nothing where the kernel's word is not known."""
    assert words in summary(found(in_backward(0), snapshot(1, line(6, "stuck"), groups=BEHIND, **seen)))


def test_a_rank_alone_is_reported_too():
    """One process needs no collective to hang."""
    finding = found(snapshot(0, line(6, "stuck"), wchan="anon_pipe_read"), ranks=1)

    assert summary(finding) == (
        "Rank 0 has been in train.py:6 stuck, reading from a pipe that nobody writes to for 75 s."
    )


def test_the_worker_whose_batch_is_awaited_is_named():
    """With its line and what it waits for; the other worker is not."""
    code = line(12, "Data.__getitem__", "/home/me/data.py")
    workers = (
        WorkerSnapshot(index=0, pid=77, state="S", wchan="futex_do_wait", frames=(code,), waits_for_batch=2),
        WorkerSnapshot(index=1, pid=78, state="S", wchan="anon_pipe_read"),
    )
    waits = snapshot(1, call("x").__class__(file="/lib/multiprocessing/queues.py", function="get"), line(28),
                 phase="input_wait", groups=BEHIND, workers=workers)  # fmt: skip
    finding = found(in_backward(0), waits)

    assert (
        "it has been waiting for batch 2 of its data loader, whose worker 0 (process 77) is in data.py:12 "
        "Data.__getitem__, waiting for a lock for 75 s"
    ) in summary(finding)
    assert (finding.evidence["worker"], finding.evidence["line"]) == (77, 12)
    assert "worker_init_fn" in finding.next


def test_a_spawned_worker_with_a_lock_is_not_advised_to_be_spawned():
    """It has inherited no lock from the training process."""
    worker = WorkerSnapshot(pid=77, state="S", wchan="futex_do_wait", waits_for_batch=2, start_method="spawn")
    finding = found(in_backward(0), snapshot(1, line(28), phase="input_wait", groups=BEHIND, workers=(worker,)))

    assert "waiting for a lock" in summary(finding)
    assert finding.next.startswith("Look at what the dataset does there")


def test_a_worker_whose_line_is_not_known_is_reported_by_its_state():
    """And one of which nothing is known, as what it is."""
    worker = WorkerSnapshot(pid=77, state="S", wchan="futex_do_wait", waits_for_batch=2)
    waits = snapshot(1, line(28), phase="input_wait", groups=BEHIND, workers=(worker,))
    unknown = replace(waits, workers=(replace(worker, state="", wchan=""),))

    assert "whose worker 0 (process 77) is waiting for a lock for" in summary(found(in_backward(0), waits))
    assert "whose worker 0 (process 77) is in unknown code for" in summary(found(in_backward(0), unknown))


def test_a_job_that_was_ended_because_it_hung_has_hung():
    """Also where what was seen last would take longer to be a hang."""
    busy = replace(STUCK, cpu_share=1.0, process_state="R", wchan="")
    ended = [RankExit(rank=rank, state="killed", signal=15, at_s=100.0) for rank in (0, 1)]

    assert judged(facts([in_backward(0), busy], *ended, state="failed")) is None
    assert judged(facts([in_backward(0), busy], *ended, state="failed", was_aborted=True)) is not None
    assert judged(facts([in_backward(0), busy], *ended, state="finished", was_aborted=True)) is None


def skips_a_backward(rank: int, step: int) -> int:
    """Return the column `bits` of ranks of which the second runs no backward in step 20."""
    is_skipped = rank == 1 and step == 20
    return pack_bits(0 if is_skipped else 1, 0, step + 6 - (rank == 1 and step >= 20))


def test_ranks_that_diverged_earlier_are_reported_since_when():
    """The hang comes at the end; the step before was the first with another number of collectives."""
    other = snapshot(1, call("barrier"), line(30), wchan="futex_do_wait", groups=(group(15, "barrier"),))
    finding = found(in_backward(0), other, calls=skips_a_backward)

    assert finding is not None
    assert finding.summary.endswith(
        " The ranks have been out of step since step 20, in which rank 1 ran no backward pass: at its end rank 1 had "
        "called 25 collectives, rank 0 26."
    )
    assert finding.evidence["apart_since_step"] == 20


def test_ranks_that_diverged_tell_nothing_about_one_that_waits_for_no_collective():
    """Nor is it said of ranks that agree, or that never did."""
    stands = [snapshot(rank, line(6, "stuck"), wchan="anon_pipe_read") for rank in (0, 1)]
    never = in_backward(0), STUCK

    for snapshots, calls in (
        (stands, skips_a_backward),
        (never, lambda _rank, step: pack_bits(1, 0, step + 6)),
        (never, lambda rank, step: pack_bits(1, 0, step + 6 + rank)),
    ):
        finding = found(*snapshots, calls=calls)
        assert "apart" not in summary(finding)
        assert "apart_since_step" not in finding.evidence


# --- what is no hang ---


@pytest.mark.parametrize(
    "seen",
    [
        {"is_waiting_for_terminal": True},
        {"is_debugged": True},
        {"is_suspended": True, "process_state": "T"},
        {"is_idle_notebook": True},
        {"is_compiling": True, "cpu_share": 0.6},
        {"process_state": "t"},
    ],
)
def test_a_rank_that_may_stand_still_is_no_hang(seen):
    """Input, debuggers, job control, idle notebooks and compilation."""
    assert found(in_backward(0), replace(STUCK, **seen)) is None


def test_a_compiler_in_the_stack_is_no_hang():
    """Whatever the line of the user's code."""
    compiler = FrameSnapshot(file="/venv/torch/_inductor/compile_fx.py", line=5, function="compile_fx")

    assert found(in_backward(0), snapshot(1, compiler, line(9), groups=BEHIND, cpu_share=0.5)) is None


def test_a_backward_pass_that_is_compiled_is_no_hang():
    """torch.compile makes its code in the first one; whoever waits there waits below the engine, in C."""
    compiler = FrameSnapshot(file="/venv/torch/_inductor/lowering.py", line=5, function="lower")
    compiles = {"is_compiling": True, "cpu_share": 0.15, "process_state": "R"}

    assert found(in_backward(0), snapshot(1, compiler, ENGINE, line(9), phase="backward", **compiles)) is None
    assert found(in_backward(0), in_backward(1, **compiles)) is not None
    alone = snapshot(0, ENGINE, line(9), phase="backward", **compiles)
    assert found(alone, ranks=1) is None


def test_a_rank_that_makes_progress_is_no_hang():
    """One without a snapshot, whose recorder sends rows."""
    assert found(in_backward(0)) is None


def test_standing_still_takes_the_time_that_was_set():
    """And longer in a run that has had such pauses before."""
    assert found(in_backward(0), STUCK, hang_timeout_s=80.0) is None
    assert found(in_backward(0), STUCK, hang_timeout_s=70.0) is not None
    paused = snapshot(1, line(6), quiet_s=60.0, at_ns=NOW_NS - 90 * S)
    over = replace(paused, quiet_s=62.0, ended=True, at_ns=NOW_NS - 88 * S)
    assert found(paused, over, in_backward(0), STUCK) is None


def test_a_rank_that_computes_gets_twice_as_long_if_others_wait_for_it():
    """Tokenizing on one rank is slow at first, then a hang; one that reads may load a checkpoint."""
    busy = replace(STUCK, cpu_share=1.0, process_state="R", wchan="")
    reads = replace(busy, io_bytes_per_s=1e8)

    assert found(in_backward(0), busy, hang_timeout_s=40.0) is None
    assert "in train.py:6 stuck, computing" in summary(found(in_backward(0), busy, hang_timeout_s=34.0))
    assert found(in_backward(0), reads, hang_timeout_s=34.0) is None
    assert found(in_backward(0), reads, hang_timeout_s=14.0) is not None


def test_a_rank_whose_other_threads_report_now_and_then_gets_twice_as_long_if_others_wait_for_it():
    """A thread that prints that it lives would hide the hang; one that works in the background may be slow."""
    reports = replace(STUCK, has_output=True)

    assert found(in_backward(0), reports, hang_timeout_s=40.0) is None
    assert summary(found(in_backward(0), reports, hang_timeout_s=34.0)) == summary(found(in_backward(0), STUCK))
    assert found(replace(in_backward(0), has_output=True), STUCK, hang_timeout_s=40.0) is not None


def test_a_job_that_computes_gets_five_times_as_long():
    """Nobody waits for it: it prepares its data."""
    busy = replace(STUCK, rank=0, cpu_share=1.0, process_state="R", wchan="")

    assert found(busy, ranks=1, hang_timeout_s=16.0) is None
    assert found(busy, ranks=1, hang_timeout_s=14.0) is not None


def test_a_child_that_is_ready_to_run_computes():
    """However little of a core it gets, the rank that waits for it is slow."""
    child = ProcessSnapshot(pid=77, name="ffmpeg", state="R")
    waits = replace(STUCK, wchan="do_wait", blocker=child, cpu_share=0.1)

    assert found(in_backward(0), waits) is None
    assert found(in_backward(0), replace(waits, blocker=replace(child, state="S"))) is not None


def test_a_worker_that_is_ready_to_run_computes():
    """On a host with many programs it gets little of a core, for instance to import torch."""
    worker = WorkerSnapshot(pid=77, state="R", cpu_share=0.05, waits_for_batch=0)
    waits = snapshot(1, line(28), phase="input_wait", groups=BEHIND, workers=(worker,))

    assert found(in_backward(0), waits) is None
    assert found(in_backward(0), waits, hang_timeout_s=14.0) is not None


def test_progress_after_a_snapshot_ends_the_hang():
    """Steps that were made since, or the rank's own word."""
    over = replace(STUCK, ended=True)

    assert found(in_backward(0), STUCK, over) is None
    early = [replace(each, at_ns=NOW_NS - 80 * S) for each in (in_backward(0), STUCK)]
    assert found(*early) is None


def test_what_a_rank_does_after_it_was_asked_to_end_is_no_progress():
    """As the error that torch prints when a signal ends the set-up of its store."""
    last = replace(STUCK, at_ns=NOW_NS - 20 * S, is_last=True)
    prints = replace(STUCK, at_ns=NOW_NS - 19 * S, ended=True)
    exits = [RankExit(rank=rank, state="killed", signal=15) for rank in (0, 1)]

    assert "Rank 1 never reached" in summary(found(in_backward(0), last, prints, exits=exits, state="stopped"))
    goes_on = replace(last, is_last=False)
    assert found(in_backward(0), goes_on, prints, exits=exits, state="stopped") is None
    dies = replace(prints, at_ns=NOW_NS - 5 * S)  # on a busy machine
    assert found(in_backward(0), goes_on, dies, exits=exits, state="stopped") is not None


@pytest.mark.parametrize("is_exiting", [True, False])
def test_what_a_rank_reports_of_its_steps_at_its_end_is_no_progress(is_exiting):
    """Such as its reductions per step: they are those of the steps before. While the script runs, it has gone on."""
    builder, last_ns = JobFactsBuilder(2), NOW_NS + S
    builder.state = "stopped"
    for each in (in_backward(0), STUCK):
        builder.host(each.rank, "node1")
        builder.info(each.rank, {"kind": "process", "t_ns": NOW_NS - 100 * S})
        builder.info(each.rank, replace(each, is_last=True).to_info())

    if is_exiting:
        builder.info(1, {"kind": "exit", "t_ns": last_ns, "exception": "KeyboardInterrupt", "at_s": 1e9})

    builder.info(1, {"kind": "reductions", "t_ns": last_ns + 1, "reductions_per_step": 1.0})
    for rank in (0, 1):
        builder.exit(RankExit(rank=rank, state="killed", signal=2, at_s=1e9 + rank))

    finding = judged(builder.build())
    assert (finding is not None and finding.ranks == (1,)) == is_exiting


def test_a_collective_in_flight_is_not_waited_for_by_a_sleeping_rank():
    """The stack tells: an asynchronous all_reduce that nobody waits for."""
    flying = (group(6, "all_reduce"),)
    sleeps = snapshot(1, line(6, "stuck"), groups=flying, wchan="hrtimer_nanosleep")

    assert found(snapshot(0, line(9), groups=flying, wchan="hrtimer_nanosleep"), sleeps).evidence["cause"] == "stuck"


def test_a_backward_that_computes_waits_for_nobody():
    """With nothing in flight, the engine computes."""
    computes = snapshot(1, ENGINE, line(28), phase="backward", groups=BEHIND, cpu_share=1.0, process_state="R")

    assert found(in_backward(0), computes) is None


def test_a_rank_that_did_not_come_to_ddps_constructor_is_named():
    """It calls C itself, from a module of helpers; torch may keep no record of it."""
    verifies = FrameSnapshot(file=f"{TORCH}/distributed/utils.py", function="_verify_param_shape_across_processes")
    waits = snapshot(0, verifies, line(20), wchan="futex", groups=(GroupSnapshot(),))

    assert found(waits, snapshot(1, line(5, "load"), wchan="hrtimer_nanosleep", groups=(GroupSnapshot(),))).ranks == (
        1,
    )


def test_a_checkpoint_that_all_ranks_load_is_no_collective():
    """Library code of torch.distributed reads and computes, too; a collective that it calls is one."""
    files = ("serialization.py _load", "distributed/checkpoint/state_dict_loader.py load",
             "distributed/checkpoint/utils.py _api_bc_check.<locals>.inner_func")  # fmt: skip
    frames = [FrameSnapshot(file=f"{TORCH}/{file}", function=name) for file, name in map(str.split, files)]
    start = {"step": -1, "in_step": False, "phase": "startup"}
    reads = start | {"cpu_share": 1.0, "io_bytes_per_s": 5e8, "process_state": "R"}
    groups = (group(4, "gather", flying=False),)
    loading = [snapshot(rank, *frames, line(30), groups=groups, **reads) for rank in (0, 1)]
    waiting = [snapshot(rank, call("gather"), *frames, line(30), wchan="futex", **start) for rank in (0, 1)]

    assert found(*loading, rows=False) is None
    assert found(*(replace(each, groups=()) for each in loading), rows=False) is None
    assert "in load in start-up (train.py:30 main)" in summary(found(*waiting, rows=False))


def test_a_rank_that_waits_for_the_device_waits_for_the_collective_there():
    """As in `loss.item()`: a rank is behind by its number. Where none is, the device may do anything."""
    item = snapshot(0, line(30, "log"), process_state="R", uses_device=True, groups=(group(15, "all_reduce"),))

    assert summary(found(item, STUCK)).startswith(
        "Rank 1 never reached all_reduce #15: it has been in train.py:6 stuck, sleeping for 75 s; rank 0 waits for it"
    )
    assert found(item, replace(item, rank=1)) is None
    assert found(item, replace(item, rank=1), hang_timeout_s=14.0).evidence["cause"] == "stuck"
    assert found(replace(item, uses_device=False), STUCK) is None


def test_a_lost_rank_is_the_cause_of_the_wait():
    """The others wait because it has gone."""
    assert judged(facts([in_backward(0)], RankExit(rank=1, state="killed", signal=9), silent=(1,))) is None


def test_one_process_waits_in_no_collective():
    """Its backward is long, and there is no other rank."""
    finding = found(snapshot(0, ENGINE, line(28), phase="backward"), ranks=1)

    assert finding.evidence["cause"] == "stuck"


def test_an_older_snapshot_does_not_replace_a_newer_one():
    """A report reads the snapshots of other processes, as one at an import that held the GIL, after the rank's own."""
    silent = snapshot(1, line(2, "import_torch"), answered="signal", quiet_s=3.0, step=-1, at_ns=NOW_NS - 90 * S)
    over = replace(silent, ended=True, quiet_s=4.0, at_ns=NOW_NS - 89 * S)

    for snapshots in ((silent, over, in_backward(0), STUCK), (in_backward(0), STUCK, silent, over)):
        assert "it has been in train.py:6 stuck, sleeping for 75 s" in summary(found(*snapshots))


def test_a_pause_that_is_read_late_counts():
    """It shows what is normal in this run."""
    paused = snapshot(1, line(6), quiet_s=60.0, at_ns=NOW_NS - 90 * S)
    over = replace(paused, quiet_s=62.0, ended=True, at_ns=NOW_NS - 88 * S)

    assert found(in_backward(0), STUCK, paused, over) is None


def test_steps_that_take_long_give_more_time():
    """With steps of 40 s, a pause of 75 s is none."""
    slow = window_of(Job(ranks=2, own={"forward": 40_000.0}))

    assert hang(slow, facts([in_backward(0), STUCK])) is None


def test_an_end_without_a_number_takes_the_usual_time():
    """Whether a backward waits for a rank that has ended is not certain where its collectives are not known."""
    ended = RankExit(rank=1, state="finished", code=0, last_step=8)
    waits = snapshot(0, ENGINE, line(28), phase="backward", quiet_s=20.0)

    assert judged(facts([waits], ended)) is None


# --- afterwards ---

STOPPED = (RankExit(rank=0, state="killed", signal=2), RankExit(rank=1, state="killed", signal=15, stopped=True))


def test_a_hung_job_that_was_interrupted_has_hung():
    """By the snapshots before the end; also where nobody shows Ctrl-C."""
    assert "Rank 1 never reached" in summary(found(in_backward(0), STUCK, exits=STOPPED, state="stopped"))
    terminated = tuple(RankExit(rank=rank, state="killed", signal=15) for rank in (0, 1))
    assert "Rank 1 never reached" in summary(found(in_backward(0), STUCK, exits=terminated, state="failed"))


def test_rows_alone_tell_that_a_job_hung():
    """Without any snapshot: open steps that were far older than steps take, and the line that Ctrl-C met."""
    interrupted = RankExit(
        rank=1, state="failed", code=130, exception="KeyboardInterrupt: ", file="/home/me/train.py", line=6,
        function="stuck", open_step=40, open_phase="other", open_s=75.0,
    )  # fmt: skip
    blocked = RankExit(rank=0, state="killed", signal=15, open_step=40, open_phase="backward", open_s=75.0)

    finding = found(exits=(blocked, interrupted), state="stopped")

    assert summary(finding) == ("Rank 1 has been in train.py:6 stuck for 75 s; rank 0 waits for it in backward.")


def test_rows_do_not_outweigh_a_pause_that_ended():
    """A long step is compiled, with a pause now and then, when a scheduler ends it: no snapshot is open."""
    terminated = tuple(RankExit(rank=rank, state="killed", signal=15, open_step=40, open_s=75.0) for rank in (0, 1))
    paused = [snapshot(rank, line(6), quiet_s=5.0, at_ns=NOW_NS - 30 * S) for rank in (0, 1)]
    over = [replace(each, quiet_s=7.0, ended=True, at_ns=NOW_NS - 28 * S) for each in paused]

    assert found(*paused, *over, exits=terminated, state="failed") is None
    assert found(exits=terminated, state="failed") is not None  # a recorder that has never told of a pause


def test_a_recorder_that_ran_until_the_end_would_have_told_of_a_pause():
    """The step is old, but the script printed a line each second: Ctrl-C ended no hang."""
    interrupted = RankExit(rank=0, state="killed", signal=2, open_step=40, open_s=75.0)
    job = {"exits": (interrupted,), "ranks": 1, "state": "stopped"}

    assert found(**job, samples_s=70) is None
    assert found(**job) is not None  # it had slept itself, until the end woke it


def test_a_job_that_was_interrupted_at_work_has_not_hung():
    """Its last step is young, or it was between steps, as in an evaluation."""
    young = tuple(RankExit(rank=rank, state="killed", signal=2, open_step=400, open_s=0.1) for rank in (0, 1))
    job = facts([], *young, state="stopped", steps=400, silent=(0, 1))
    assert judged(job) is None
    between = facts([], *(RankExit(rank=rank, state="killed", signal=2) for rank in (0, 1)), state="stopped", steps=39)
    progress = {
        rank: structs.replace(each, snapshot=replace(each.snapshot, in_step=False))
        for rank, each in between.progress.ranks.items()
    }
    assert judged(structs.replace(between, progress=structs.replace(between.progress, ranks=progress))) is None


def test_a_rank_that_failed_at_work_did_not_hang():
    """Its own exception ended the job, whatever the others waited for."""
    failed = RankExit(rank=1, state="failed", code=1, exception="ValueError: no", open_s=0.1)
    ended = RankExit(rank=0, state="killed", signal=15, open_s=20.0)

    assert judged(facts([in_backward(0)], failed, ended, state="failed", silent=(1,))) is None


@pytest.mark.parametrize(("exception", "is_hang"), [("Timed out waiting 8000ms for recv", True), ("no", False)])
def test_a_collective_s_time_limit_may_be_short(exception: str, is_hang: bool) -> None:
    """It ended the wait before a pause counts as a hang; a rank of which only rows tell may have worked."""
    reached_time_limit = RankExit(rank=0, state="failed", code=1, exception=f"RuntimeError: {exception}")
    swept = RankExit(rank=1, state="killed", signal=15, stopped=True)
    waiting, stuck = (replace(each, quiet_s=7.0) for each in (in_backward(0), STUCK))

    assert (found(waiting, stuck, exits=(reached_time_limit, swept), state="failed") is not None) == is_hang
    assert found(waiting, replace(stuck, answered="rows"), exits=(reached_time_limit, swept), state="failed") is None


def test_a_longer_time_limit_is_advised_where_one_has_ended_the_wait():
    """Rank 1 may prepare the data for all: that is no fault of it."""
    timed_out = RankExit(rank=0, state="failed", code=1, exception="RuntimeError: Timed out waiting 8000ms for recv")
    swept = RankExit(rank=1, state="killed", signal=15, stopped=True)
    slow = found(in_backward(0), STUCK, exits=(timed_out, swept), state="failed")
    stuck = found(in_backward(0), STUCK)

    assert summary(slow).endswith(" Rank 0 waited until the time limit of its collective.")
    assert slow.next.endswith("give what takes so long more time: init_process_group(timeout=...).")
    assert "time limit" not in summary(stuck)
    assert "timeout=..." not in stuck.next


def test_a_rank_that_prepares_for_longer_than_others_wait_in_the_store_is_named():
    """The store ended their wait, before the group was made."""
    exception = "torch.distributed.DistStoreError: wait timeout after 3000ms, keys: /default_pg/0//cpu//0/1"
    timed_out = RankExit(rank=0, state="failed", code=1, exception=exception)
    swept = RankExit(rank=1, state="killed", signal=15, stopped=True)
    starting = {"step": -1, "in_step": False, "phase": "startup", "quiet_s": 7.0}
    waits = snapshot(0, call("init_process_group"), line(5), **starting)

    finding = found(waits, snapshot(1, line(6, "prepare"), **starting), exits=(timed_out, swept), state="failed")

    assert finding.ranks == (1,)
    assert summary(finding).endswith(" Rank 0 waited until the time limit of init_process_group.")


def test_a_longer_time_limit_is_not_advised_to_ranks_that_never_meet():
    """They would wait for ever."""
    timed_out = RankExit(rank=0, state="failed", code=1, exception="RuntimeError: Timed out waiting 8000ms for recv")
    zero = snapshot(0, call("all_reduce"), line(25), groups=(group(6, "all_reduce"),))
    one = snapshot(1, call("all_gather"), line(24), groups=(group(6, "all_gather"),))

    finding = found(zero, one, exits=(timed_out, structs.replace(timed_out, rank=1)), state="failed")

    assert finding.evidence["cause"] == "mismatch"
    assert "timeout=..." not in finding.next


def test_what_a_rank_does_after_the_job_was_asked_to_end_is_no_hang() -> None:
    """It saves, or waits for a server, until the scheduler kills it."""
    killed = RankExit(rank=0, state="killed", signal=9, at_s=1000.0)
    job = facts([snapshot(0, line(80, "upload"), quiet_s=28.0)], killed, ranks=1, state="failed")
    asked = [structs.replace(job, ended_by=EndingSignal(15, 1000.0 - before_s)) for before_s in (30.0, 25.0, 10.0)]

    assert judged(job) is not None
    assert [judged(each) is not None for each in asked] == [False, False, True]


@pytest.mark.parametrize("oom", [None, "group"])
def test_a_rank_that_the_kernel_killed_for_lack_of_memory_did_not_hang(oom: str | None) -> None:
    """It waited for its pages before; the finding about its end has the cause."""
    waiting, swaps = in_backward(0, quiet_s=20.0), replace(STUCK, process_state="D", wchan="folio_wait", quiet_s=20.0)
    exits = (structs.replace(STOPPED[1], rank=0), RankExit(rank=1, state="killed", signal=9, oom=oom))

    assert (found(waiting, swaps, exits=exits, state="failed") is None) is (oom is not None)


def test_a_finished_run_has_not_hung():
    """However long it stood still at some time."""
    assert found(in_backward(0), STUCK, exits=[RankExit(rank=rank) for rank in (0, 1)], state="finished") is None


def test_the_step_that_the_end_has_closed_is_no_progress():
    """Ctrl-C ends the step in which a rank hung: it has a row, of a minute."""
    job = JobFactsBuilder(1)
    job.state = "stopped"
    job.info(0, {"kind": "process", "t_ns": 1})
    rows = np.zeros(41, STEPS.dtype)
    rows["step"], rows["t_end_ns"] = np.arange(41), [*np.arange(1, 41) * S // 10, 64 * S]
    job.progress.steps(np.zeros(41, np.int64), rows)
    end = {"kind": "exit", "t_ns": 64 * S, "code": 130, "exception": "KeyboardInterrupt", "step": 40, "open_s": 60.0}
    job.info(0, end | {"file": "/home/me/train.py", "line": 6, "function": "stuck"})

    assert summary(judged(job.build([40]))) == "Rank 0 has been in train.py:6 stuck for 60 s."


def test_a_rank_that_was_interrupted_first_did_not_end_by_itself():
    """While Ctrl-C ends one rank after the other, the sentence stays."""
    interrupted = RankExit(rank=1, state="failed", code=130, exception="KeyboardInterrupt: ", open_step=40, open_s=75.0)

    assert "Rank 1 never reached" in summary(found(in_backward(0), STUCK, exits=[interrupted]))


def test_what_was_a_hang_stays_one():
    """A job that is ended 9 s after its last progress has hung, if it may stand still for 8 s."""
    young = [replace(each, quiet_s=9.0) for each in (in_backward(0), STUCK)]

    assert found(*young, exits=STOPPED, state="stopped", hang_timeout_s=8.0) is not None
    assert found(*young, exits=STOPPED, state="stopped") is None


def test_the_headline_tells_the_state_where_no_line_is_known():
    """A stopped process cannot be asked for its line."""
    finding = found(in_backward(0), snapshot(1, answered="kernel", process_state="T", groups=()))

    assert finding.headline == "Rank 1 blocks the others, stopped by a signal"
    assert "kill -CONT" in finding.next
    assert "it has been stopped by a signal for 75 s; rank 0" in summary(finding)


@pytest.mark.parametrize("held", [{"process_state": "T"}, {"process_state": "S", "wchan": "do_freezer_trap"}])
def test_a_rank_that_is_stopped_in_a_collective_blocks_the_others(held: dict[str, str]):
    """It has come to it, but cannot answer."""
    finding = found(in_backward(0), in_backward(1, answered="kernel", groups=(), **{"wchan": "", **held}))

    assert finding.ranks == (1,)
    assert finding.headline.startswith("Rank 1 blocks the others")


def test_the_line_that_was_sampled_last_is_told_of_a_stopped_rank():
    """A reader knows its text, by the names that the rank has sent."""
    rows = [in_backward(0), snapshot(1, answered="kernel", process_state="T", line_id=3)]
    job = facts(rows, names={1: {3: "/home/me/train.py:31 main"}})
    finding = judged(job)

    assert "it has been stopped by a signal for 75 s, last seen at train.py:31 main; rank 0 waits" in summary(finding)
    assert finding.headline == "Rank 1 blocks the others, stopped by a signal"
    assert finding.evidence["seen"] == "/home/me/train.py:31 main"


def test_a_silent_rank_stands_still_until_its_end():
    """It sends nothing, and its last snapshot is of the beginning of the hang."""
    held = snapshot(1, line(7, "hold"), answered="signal", quiet_s=4.0, at_ns=NOW_NS - 71 * S)
    exits = [RankExit(rank=rank, state="killed", signal=15, at_s=1000.0 + 0.3 * rank) for rank in (0, 1)]
    early = [RankExit(rank=0, state="killed", signal=15, at_s=1000.0), RankExit(rank=1, state="killed", at_s=930.0)]

    assert "hold that holds the GIL, waiting for 75 s" in summary(
        found(in_backward(0), held, exits=exits, state="failed", silent=(1,))
    )
    assert found(in_backward(0), held, exits=early, state="failed", silent=(1,)) is None

    # Its own recorder could not run: the last sign of life is 70 s older than the end that the launcher saw.
    seen = [early[0], structs.replace(early[1], reported_s=1000.5)]
    assert "hold that holds the GIL, waiting for 75 s" in summary(
        found(in_backward(0), held, exits=seen, state="failed", silent=(1,))
    )


def test_a_rank_that_runs_and_sleeps_by_turns_may_work():
    """An evaluation that is no loader's: the same lines again and again."""
    turns = [replace(STUCK, process_state=state, at_ns=NOW_NS - (9 - at) * S) for at, state in enumerate("SRSRS")]

    assert found(in_backward(0), *turns) is None
    assert found(in_backward(0), *turns, hang_timeout_s=14.0) is not None
    held = [replace(each, answered="signal") for each in turns]  # inside one call in C that keeps the GIL
    assert found(in_backward(0), *held) is not None


def test_a_rank_that_polls_does_no_work():
    """A loop that waits for a lock file: it wakes to look, and on a busy host waits for a core most of the time."""
    polls = replace(STUCK, process_state="R", wchan="", thread_share=0.0005)
    turns = [replace(polls, process_state=state, at_ns=NOW_NS - (9 - at) * S) for at, state in enumerate("SRSRS")]
    seen = replace(STUCK, process_state="R", answered="kernel", frames=(), quiet_s=4.0, step=-1, at_ns=NOW_NS)

    assert "it has been in train.py:6 stuck for 75 s" in summary(found(in_backward(0), polls))
    assert found(in_backward(0), *turns) is not None
    assert "train.py:6 stuck" in summary(found(in_backward(0), *turns, seen))
    assert found(in_backward(0), replace(polls, thread_share=0.03)) is None


def test_a_recorder_that_was_silent_for_a_while_has_not_seen_progress():
    """It lacked a core in the middle of a hang: then another process took a snapshot, and told when it ran again."""
    own = replace(STUCK, quiet_s=65.0, at_ns=NOW_NS - 10 * S)
    silent = replace(STUCK, quiet_s=4.0, at_ns=NOW_NS - 5 * S, frames=(), answered="kernel")
    runs_again = replace(silent, quiet_s=5.0, at_ns=NOW_NS - 4 * S, ended=True)

    assert "train.py:6 stuck" in summary(found(in_backward(0), own, silent, runs_again))
    assert found(in_backward(0), own, silent, runs_again, replace(own, at_ns=NOW_NS - S, ended=True)) is None
    assert found(in_backward(0), silent, runs_again) is None
    assert found(in_backward(0), own, silent, replace(runs_again, step=41)) is None


def test_a_function_that_has_returned_comes_to_no_collective():
    """A launch holds its process until the others return, too: it is in no code of the user, and no hang alone."""
    waits = snapshot(1, wchan="unix_stream_read_generic", groups=(group(14, "all_reduce", flying=False),))
    finding = found(in_backward(0), waits, returned=(1,))

    assert finding.evidence["cause"] == "ended"
    assert finding.summary == (
        "Rank 1's function returned after 40 steps; rank 0 waits for it in all_reduce #15 in backward "
        "(train.py:28 main), for 75 s."
    )
    assert summary(found(in_backward(0), waits, returned=(1,), ran_script=True)).startswith(
        "Rank 1's script ended after 40 steps; rank 0 waits for it in all_reduce #15"
    )
    assert found(waits, replace(waits, rank=0), returned=(0, 1)) is None
    stopped = [RankExit(rank=rank, state="killed", signal=15, stopped=True) for rank in (0, 1)]
    assert summary(found(in_backward(0), waits, returned=(1,), exits=stopped, state="stopped")).startswith(
        "Rank 1's function returned after 40 steps; rank 0 waits for it"
    )


def test_a_rank_that_sleeps_on_is_where_its_own_snapshot_was():
    """Its recorder lacks a core at this moment: what another process sees, no stack and no collective, is no news."""
    own = replace(STUCK, quiet_s=65.0, at_ns=NOW_NS - 10 * S)
    silent = replace(STUCK, quiet_s=4.0, at_ns=NOW_NS, frames=(), groups=(), answered="kernel")

    assert "it has been in train.py:6 stuck, sleeping for 75 s" in summary(found(in_backward(0), own, silent))
    assert "stuck" not in summary(found(in_backward(0), own, replace(silent, process_state="D", quiet_s=75.0)))


def test_a_recorder_without_a_core_is_no_loop_of_the_rank():
    """It sleeps in all snapshots, whether or not its recorder could take them."""
    at = [replace(STUCK, at_ns=NOW_NS - (9 - number) * S) for number in range(5)]
    lacking = [replace(each, frames=(), answered="kernel") for each in at[1::2]]

    assert found(in_backward(0), at[0], lacking[0], at[2], lacking[1], at[4]) is not None


@pytest.mark.parametrize(
    ("raised", "ranks", "is_hang"),
    [({"line": 12}, 1, False), ({"line": 9}, 1, True), ({}, 1, True), ({"line": 12}, 2, True)],
)
def test_an_exception_of_another_line_shows_that_a_process_went_on(raised, ranks, is_hang):
    """Code in C held the interpreter, as at the end of a profile, and a later line raised: it was no hang.

    A queue raises where it waited too long, and with other ranks the wait of one may have been for the other.
    """
    long = snapshot(0, line(9), quiet_s=62.0)
    ended = RankExit(
        rank=0, state="failed", exception="ValueError: x", file="/home/me/train.py", function="main", **raised
    )
    others = [in_backward(1)][: ranks - 1]

    finding = found(long, *others, exits=[ended], ranks=ranks, state="failed")

    assert (finding is not None) is is_hang
    if finding is not None:  # what ended the job is said, too
        at = f" at train.py:{raised['line']} main" if raised else ""
        assert finding.summary.endswith(f" {'It' if ranks == 1 else 'Rank 0'} then ended with ValueError: x{at}.")


def test_the_signal_that_ends_a_rank_is_no_work_of_it():
    """Ctrl-C has woken its thread when the last snapshot is taken: it runs, a line further up."""
    writes = snapshot(0, line(105, "write"), phase="checkpoint", quiet_s=62.0, at_ns=NOW_NS - 13 * S)
    last = replace(writes, frames=(line(193),), process_state="R", quiet_s=75.0, at_ns=NOW_NS, is_last=True)
    exits = [RankExit(rank=0, state="killed", signal=2)]

    assert summary(found(writes, last, exits=exits, ranks=1, state="stopped")) == (
        "Rank 0 has been in checkpoint saving, in train.py:105 write for 75 s."
    )
    assert found(last, exits=exits, ranks=1, state="stopped") is None
    silent = replace(last, frames=(), answered="kernel")  # it could not be asked again
    assert "in train.py:105 write" in summary(found(writes, silent, exits=exits, ranks=1, state="stopped"))
    stopped = replace(silent, process_state="T")
    assert "stopped by a signal" in summary(found(writes, stopped, exits=exits, ranks=1, state="stopped"))


def test_the_last_look_at_a_rank_that_lacks_a_core_is_no_progress():
    """On a busy host it does not answer at once, and another process sees how long its recorder has not run."""
    before = replace(STUCK, at_ns=NOW_NS - 13 * S, quiet_s=62.0)
    last = replace(STUCK, frames=(), answered="kernel", process_state="R", quiet_s=0.4, is_last=True)
    exits = [RankExit(rank=rank, state="killed", signal=2) for rank in (0, 1)]

    assert "stuck, sleeping for 75 s" in summary(found(in_backward(0), before, last, exits=exits, state="stopped"))
    answered = replace(before, at_ns=NOW_NS, quiet_s=0.4, is_last=True)
    assert found(in_backward(0), before, answered, exits=exits, state="stopped") is None


def test_a_rank_that_computes_waits_for_nothing():
    """An endless loop, five times as long as another rank may stand still."""
    finding = found(snapshot(0, line(6, "spin"), process_state="R", quiet_s=310.0), ranks=1)

    assert summary(finding) == "Rank 0 has been in train.py:6 spin, computing for 5:10."
    assert "what that line computes" in finding.next
    assert "device" not in finding.next


def test_a_rank_that_uses_a_device_may_wait_for_it():
    """A thread in cudaStreamSynchronize uses a whole core: `loss.item()` after a kernel that does not end."""
    finding = found(snapshot(0, line(6, "log"), process_state="R", quiet_s=310.0, uses_device=True), ranks=1)

    assert summary(finding) == "Rank 0 has been in train.py:6 log, computing, or waiting for the device for 5:10."
    assert "it waits for what an earlier line has launched" in finding.next


def test_the_exception_that_a_rank_handles_is_told():
    """Its `finally` calls a barrier, for which the others, who have no exception, do not come."""
    handling = {"handled": "ValueError: bad row\nmore", "raised_line": line(17, "check")}
    apart = snapshot(1, call("barrier"), line(30), groups=(group(15, "barrier"),), **handling)
    finding = found(in_backward(0), apart)

    assert summary(finding).endswith(
        "for 75 s: different code paths. Rank 1 is handling ValueError: bad row, raised at train.py:17 check."
    )
    assert finding.next.startswith("Look at that exception first: it took rank 1 away from the others.")
    assert finding.evidence["handled_exception"] == handling["handled"]

    waits = found(in_backward(0), replace(STUCK, **handling))
    assert summary(waits).endswith(" Rank 1 is handling ValueError: bad row, raised at train.py:17 check.")
    assert waits.next.startswith("Find out what keeps rank 1 there while the others have moved on")


def test_the_exception_of_a_rank_that_does_not_end_is_told():
    """Its script has failed, and a thread or an exit handler keeps its process."""
    failed = {"phase": "exit", "handled": "ValueError: bad row", "raised_line": line(17, "check")}
    thread = ThreadSnapshot(name="logger", line=line(6, "log"))
    shutdown = FrameSnapshot(file="/usr/lib/python3.11/threading.py", line=1590, function="_shutdown")
    kept = snapshot(1, shutdown, wchan="futex_do_wait", threads=(thread,), **failed)
    meets = snapshot(1, call("barrier"), line(30), groups=(group(15, "barrier"),), **failed)
    killed = RankExit(rank=1, state="killed", signal=9, exception="ValueError: bad row", file="train.py", line=17)

    alone, apart = found(replace(kept, rank=0), ranks=1), found(in_backward(0), meets)
    after = found(in_backward(0), kept, exits=[RankExit(rank=0, state="killed", signal=15), killed], state="failed")

    assert summary(alone).endswith(" It had failed with ValueError: bad row, raised at train.py:17 check.")
    assert alone.next.startswith("Look at that exception first. Tell that thread to end")
    assert "took rank 1 away from the others. What runs at the end of the process (atexit)" in apart.next
    assert summary(after).endswith(" Rank 1 had failed with ValueError: bad row, raised at train.py:17 check.")


def test_an_exception_of_a_rank_that_waits_is_no_cause():
    """Rank 0 retries in `except`, and waits there for rank 1, which is stuck."""
    finding = found(replace(in_backward(0), handled="OSError: again"), STUCK)

    assert "handling" not in summary(finding)
    assert "handled_exception" not in finding.evidence


def test_the_right_rank_of_a_mesh_is_not_blamed_for_the_wrong_one() -> None:
    """Rank 3 has left out an all_reduce of its replicas; nobody waits for it, as it goes on in its other groups."""

    def in_mesh(rank: int, dp: tuple[int, str], tp: tuple[int, str], at: str) -> RankSnapshot:
        replicas, shards = (rank % 2, rank % 2 + 2), (rank // 2 * 2, rank // 2 * 2 + 1)
        groups = (
            GroupSnapshot(name="mesh_dp", members=replicas, number=dp[0], operation=dp[1], in_flight=at == "dp"),
            GroupSnapshot(name="mesh_tp", members=shards, number=tp[0], operation=tp[1], in_flight=at == "tp"),
        )
        return snapshot(rank, call((dp if at == "dp" else tp)[1]), line(21), groups=groups)

    hang = found(
        in_mesh(0, (5, "all_reduce"), (6, "all_gather"), "tp"),
        in_mesh(1, (5, "all_reduce"), (5, "all_gather"), "dp"),
        in_mesh(2, (6, "reduce_scatter"), (6, "all_gather"), "dp"),
        in_mesh(3, (5, "reduce_scatter"), (6, "all_gather"), "dp"),
        ranks=4,
    )

    assert (hang.evidence["cause"], hang.ranks) == ("mismatch", (1, 3))
    assert "Call the same collectives" in hang.next
