from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
from dataclasses import replace

import pytest

from traceml.aggregator.recovery import dead_flights
from traceml.aggregator.registry import Registry, prepare_runs_dir, safe_run_id
from traceml.aggregator.unfinished_runs import finish_run
from traceml.clock import boot_id, monotonic_ns, process_start_ticks
from traceml.database.flight.flight import FlightFile
from traceml.database.schema import STEPS
from traceml.database.store import store_file
from traceml.database.store.reader import StoreReader
from traceml.errors import StoreError
from traceml.run_folder import STORE_NAME
from traceml.transport.folder_aggregator import FolderLock
from traceml.transport.hello import Hello
from traceml.transport.server import RefusedError


class Silent:
    """A peer that accepts any message."""

    context = None

    def pause(self, paused):
        pass

    def abort(self):
        pass

    def write(self, frames):
        pass


def hello(rank=0, world_size=2, *, run="job", recorder="r", **facts) -> Hello:
    return Hello(role="rank", run=run, rank=rank, world_size=world_size, recorder=recorder, name="test", **facts)


def join(registry: Registry, hello: Hello):
    """Do with a hello what the aggregator does; return (run, stream)."""
    known = registry.find_stream(hello)
    if known is not None:
        known[0].connect(known[1], hello, Silent())
        return known

    run, attempt = registry.assign(hello)
    return run, run.join(hello, attempt, Silent())


def leave(run, stream, reason="finished"):
    run.bye(stream, reason, Silent.__new__(_Answered))
    run.disconnected(stream)


class _Answered(Silent):
    def send(self, message):
        pass

    def close(self):
        pass


@pytest.fixture
def registry(tmp_path, memory):
    made = Registry(tmp_path / "runs")
    prepare_runs_dir(made.runs_dir)
    yield made
    for run in made.open_runs:
        run.close()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("exp1", "exp1"),
        ("a b/c", "a-b-c"),
        ("../../etc", "etc"),
        ("x" * 300, "x" * 200),
        ("lr=0.1+wd@2", "lr=0.1+wd@2"),
    ],
)
def test_run_id_is_kept_but_for_what_no_folder_can_have(text, name):
    """Only what could leave the runs folder, or trouble a shell, is replaced."""
    assert safe_run_id(text) == name


@pytest.mark.parametrize("text", ["", "..", "/", "latest", "-"])
def test_run_id_of_which_nothing_is_left(text):
    """A name that cannot be one is refused."""
    with pytest.raises(RefusedError):
        safe_run_id(text)


def test_ranks_of_a_job_share_a_run(registry):
    """The same key is the same run; another key another."""
    first, _ = join(registry, hello(0))

    assert join(registry, hello(1))[0] is first
    assert join(registry, hello(0, run="other"))[0] is not first


def test_recorder_that_comes_back_has_its_stream(registry):
    """A reconnect continues the stream, also when the run was over."""
    run, stream = join(registry, hello(0, 1))
    leave(run, stream)
    assert run.end()

    assert join(registry, hello(0, 1)) == (run, stream)
    assert not run.ended


def test_rank_of_a_live_process_is_not_given_away(registry):
    """A subprocess that inherits a rank's variables gets a run of its own, and keeps it when it comes back."""
    run, _ = join(registry, hello(0))
    intruder = replace(hello(0, recorder="x"), pid=1, start_ticks=5)

    other, stream = join(registry, intruder)

    assert other is not run
    assert other.path != run.path
    assert join(registry, intruder) == (other, stream)


def test_ranks_that_train_again_meet_in_the_next_run(registry):
    """One rank is at its second training while another still ends the first: two runs, with both ranks in each."""
    first = [join(registry, hello(rank, pid=10 + rank, recorder="1")) for rank in (0, 1)]
    leave(*first[1])
    second = join(registry, hello(1, pid=11, recorder="2"))[0]
    assert second is not first[0][0]

    leave(*first[0])
    assert join(registry, hello(0, pid=10, recorder="2"))[0] is second
    assert join(registry, hello(0, pid=10, recorder="1"))[0] is first[0][0]


def test_ranks_of_a_job_that_is_started_again_meet_in_one_run(registry):
    """The aggregator of a host keeps the run before open for a minute: it does not see the ranks of other hosts end."""
    before = [join(registry, hello(rank, 4, pid=10 + rank, recorder="1")) for rank in (0, 1)]
    for run, stream in before:
        leave(run, stream)

    assert not before[0][0].ended
    first, second = (join(registry, hello(rank, 4, pid=20 + rank, recorder="2"))[0] for rank in (0, 1))

    assert first is second
    assert first is not before[0][0]


def test_second_recorder_of_a_process_takes_the_rank_over_in_a_new_run(registry):
    """init, shutdown, init in one process are two runs, as each has its own job key."""
    run, stream = join(registry, hello(0, 1, run="a"))
    leave(run, stream)

    assert join(registry, hello(0, 1, run="b", recorder="r2"))[0] is not run


@pytest.fixture
def host(monkeypatch):
    """Make this the host of a name, as far as names tell."""
    return lambda name: monkeypatch.setattr(socket, "gethostname", lambda: name)


@pytest.mark.parametrize("run_id", ["", "mine"])
def test_ranks_of_a_second_host_of_a_folder_are_a_run_of_their_own(registry, host, run_id):
    """Each host has an aggregator that only its own ranks reach: both store what they get, also after a restart."""
    host("node1")
    job = [hello(rank, 4, run_id=run_id, host=f"node{rank // 2 + 1}", recorder=f"r{rank}") for rank in range(4)]
    first, _ = join(registry, job[0])
    assert join(registry, job[1])[0] is first
    with FolderLock.acquire(registry.runs_dir):
        host("node2")
        second = Registry(registry.runs_dir)
        part, _ = join(second, job[2])
        assert (join(second, job[3])[0], part.id) == (part, f"{first.id}-node2")
        assert (registry.runs_dir / "latest").readlink().name == first.id
        part.close()

        again = Registry(registry.runs_dir)
        resumed, stream = join(again, job[2])
        assert (resumed.id, stream.rank) == (part.id, 2)
        resumed.close()


def test_a_store_that_is_written_on_this_host_is_not_split(registry, host):
    """Its aggregator may just be ending: the rank asks again a minute later."""
    host("node1")
    join(registry, hello(0, run_id="mine"))
    with FolderLock.acquire(registry.runs_dir), pytest.raises(RefusedError, match="another aggregator is writing"):
        join(Registry(registry.runs_dir), hello(1, run_id="mine"))

    assert not list(registry.runs_dir.glob("mine-*"))


def test_late_rank_joins_the_run_that_is_over(registry):
    """A rank whose place is free belongs to the job, however late."""
    run, stream = join(registry, hello(0))
    leave(run, stream)
    assert run.end()

    assert join(registry, hello(1))[0] is run


def test_other_world_size_after_the_end_is_another_job(registry):
    """A free place in a run of another size is not this job's."""
    run, stream = join(registry, hello(0, 2))
    leave(run, stream)
    assert run.end()

    assert join(registry, hello(3, 4))[0] is not run


def test_killed_aggregator_leaves_runs_that_are_found(registry, tmp_path):
    """Another registry finds the run by its key, with its streams and how far they are."""
    run, stream = join(registry, hello(0))
    run.ingest.take(stream, "steps", 0, 2, bytes(2 * STEPS.row_bytes))
    run.commit()
    run.store.close()
    later = Registry(tmp_path / "runs")

    found, again = join(later, hello(0))

    assert found.path == run.path
    assert again.next["steps"] == 2
    found.close()


def test_unfinished_runs_are_adopted_once_and_the_lock_of_a_living_one_respected(registry, tmp_path, caplog):
    """Runs that are open elsewhere are left alone, without a word; those of a dead aggregator are taken up."""
    run, _ = join(registry, hello(0))
    run.commit()
    later = Registry(tmp_path / "runs")
    caplog.set_level("INFO", logger="traceml")

    later.resume_unfinished_runs()
    assert later.open_runs == []
    assert caplog.text == ""

    run.close()
    later.resume_unfinished_runs()
    assert [each.path for each in later.open_runs] == [run.path]
    later.open_runs[0].close()


def test_an_unfinished_run_ended_when_its_store_was_last_written(registry):
    """Not when somebody finishes it, which may be the next day."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        facts = {"host": socket.gethostname(), "boot_id": boot_id(), "pid": process.pid}
        facts |= {"start_ticks": process_start_ticks(process.pid), "script_ms": 7_200_000}
        run, stream = join(registry, hello(0, 1, **facts))

    run.disconnected(stream)
    run.close()
    written_s = run.path.stat().st_mtime - 3600
    for path in run.path.iterdir():
        os.utime(path, (written_s, written_s))

    assert finish_run(run.path)

    with StoreReader(run.path / STORE_NAME) as reader:
        assert reader.meta()["run"]["ended"] == written_s
        (rank,) = reader.streams()
        assert rank.facts["ended"] == written_s  # of which another one who finishes it makes the run's end


def test_an_unfinished_run_takes_no_rows_of_a_run_elsewhere(registry, tmp_path, memory):
    """A job of the same name has left a dead rank in the host's memory, whose run is in another folder."""
    facts = {"run_dir": str(tmp_path / "others" / "20260101-a"), "job": "job", "recorder": "another"}
    FlightFile.create(memory, facts).close(unlink=False)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        facts = {"host": socket.gethostname(), "boot_id": boot_id(), "pid": process.pid}
        run, stream = join(registry, hello(0, 1, **facts, start_ticks=process_start_ticks(process.pid)))

    run.disconnected(stream)
    run.close()
    assert finish_run(run.path)

    with StoreReader(run.path / STORE_NAME) as reader:
        assert len(list(reader.streams())) == 1


@pytest.mark.parametrize(("parent_trains", "is_rank"), [(True, False), (False, True)])
def test_a_child_that_trained_for_itself_is_not_its_parent(registry, memory, parent_trains, is_rank):
    """A worker of a process pool, killed before it connected: rank 0 has not died. Another parent only starts ranks."""
    facts = {"job": "job", "recorder": "child", "spawned_by": "r", "world_size": 1, "pid": 9}
    flight = FlightFile.create(memory, facts)
    flight.ring("steps").append(0, monotonic_ns(), 5_000_000, *[0] * (len(STEPS.names) - 3))
    flight.close(unlink=False)
    run, stream = join(registry, hello(0, 1))
    if parent_trains:
        run.ingest.take(stream, "steps", 0, 1, bytes(STEPS.row_bytes))

    (dead,) = dead_flights("job", registry.runs_dir)
    run.recover_flight(dead)

    (child,) = (each for each in run.streams if each is not stream)
    assert child.next["steps"] == 1
    assert child.is_helper is not is_rank


def test_a_second_job_of_a_runs_id_is_an_attempt_of_its_own(registry, memory):
    """It ran while the first one did, found no aggregator, and left its files; launchers of both count from 0."""
    for rank in (0, 1):
        run, _ = join(registry, hello(rank, pid=rank + 7, recorder="first"))
        facts = {"job": "job", "recorder": "second", "world_size": 2, "rank": rank, "pid": rank + 9}
        flight = FlightFile.create(memory, facts)
        flight.ring("steps").append(0, monotonic_ns(), 5_000_000, *[0] * (len(STEPS.names) - 3))
        flight.close(unlink=False)

    for dead in dead_flights("job", registry.runs_dir):
        run.recover_flight(dead)

    assert sorted((each.attempt, each.rank) for each in run.streams) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(("left", "is_stored"), [("folder", True), ("store", False), ("nothing", False)])
def test_steps_of_a_run_that_never_had_a_store_are_stored(registry, memory, left, is_stored):
    """The disk was full while it ran. A run that was removed stays so, and a stored one had an aggregator."""
    facts = {"job": "a-run", "run_id": "a-run", "runs_dir": str(registry.runs_dir)}
    FlightFile.create(memory, facts).close(unlink=False)
    if left != "nothing":
        (registry.runs_dir / "a-run").mkdir()
    if left == "store":
        (registry.runs_dir / "a-run" / STORE_NAME).touch()

    assert [run.id for run in registry.recover_flights()] == ["a-run"] * is_stored


def test_steps_of_a_rank_without_launcher_and_aggregator_are_left(registry, memory):
    """It had no run."""
    FlightFile.create(memory, {"job": "job", "runs_dir": str(registry.runs_dir)}).close(unlink=False)

    assert registry.recover_flights() == []


def test_a_file_that_may_not_grow_is_no_end_of_the_aggregator(registry, monkeypatch):
    """Like a full disk: it answers its ranks with the reason, and they try again."""

    def build(_path):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(store_file, "_build", build)
    with pytest.raises(RefusedError, match="disk I/O error") as refused:
        registry.begin("a-run", "job", named=True)

    assert refused.value.retry


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_run_of_another_folder_is_continued_in_its_copy_only(registry, memory, tmp_path, is_copied):
    """Its first rows are in that folder: a run of the last ones alone would be told as one that lost the others."""
    elsewhere = tmp_path / "unwritable" / "a-run"
    elsewhere.mkdir(parents=True)
    facts = {"job": "job", "run_dir": str(elsewhere), "run_id": "a-run"}
    flight = FlightFile.create(memory, facts)
    flight.log("logged").append({"kind": "text"})
    flight.close(unlink=False)
    if is_copied:
        (registry.runs_dir / "a-run").mkdir()

    assert [run.id for run in registry.recover_flights(left_in=elsewhere.parent)] == ["a-run"] * is_copied
    copy_first = {flight.path: f"its run is {elsewhere}: copy that into {registry.runs_dir} first"}
    assert registry.not_recovered == ({} if is_copied else copy_first)


def test_steps_that_another_folder_never_stored_become_a_run(registry, memory, tmp_path):
    """Without this folder's name they are left alone."""
    FlightFile.create(memory, {"job": "job", "runs_dir": str(tmp_path / "unwritable")}).close(unlink=False)

    assert registry.recover_flights() == []
    assert len(registry.recover_flights(left_in=tmp_path / "unwritable")) == 1


def test_an_unfinished_run_ended_with_its_last_rank(registry):
    """Its store may have been written since, by whoever merged it."""
    run, stream = join(registry, hello(0, 1))
    leave(run, stream)
    run.close()

    assert finish_run(run.path)

    with StoreReader(run.path / STORE_NAME) as reader:
        (rank,) = reader.streams()
        assert reader.meta()["run"]["ended"] == rank.facts["ended"]


def test_a_run_that_was_removed_does_not_come_back(registry, memory):
    """Its aggregator was killed, and left a mark; its rank was too, and left a flight file."""
    run, _ = join(registry, hello(0, 1))
    run.close()
    FlightFile.create(memory, {"run_dir": str(run.path), "job": "job", "recorder": "r"}).close(unlink=False)
    shutil.rmtree(run.path)
    later = Registry(registry.runs_dir)

    later.resume_unfinished_runs()

    assert later.recover_flights() == []
    assert not run.path.exists()
    assert list((registry.runs_dir / ".open").glob("*.json")) == []


@pytest.mark.parametrize("left", ["", "[]", '{"job": 5, "run": "x"}', '{"job": "j", "run": "../x"}', '{"job": "j"}'])
def test_damaged_markers_are_ignored(registry, left):
    """Damaged files in the folder of open runs are ignored."""
    (registry.runs_dir / ".open").mkdir()
    (registry.runs_dir / ".open" / "x.json").write_text(left)

    registry.resume_unfinished_runs()

    assert registry.open_runs == []


def test_markers_and_latest(registry):
    """An open run has a marker, an ended one none; `latest` points at the newest."""
    run, stream = join(registry, hello(0, 1))
    markers = list((registry.runs_dir / ".open").iterdir())

    assert json.loads(markers[0].read_text()) == {"job": "job", "run": run.id, "named": False}
    assert (registry.runs_dir / "latest").resolve() == run.path
    leave(run, stream)
    assert run.end()
    registry.mark_ended(run)
    assert list((registry.runs_dir / ".open").iterdir()) == []


def test_a_folder_named_latest_stays_as_it_is(registry, caplog):
    """It is told, and nothing is left beside it."""
    (registry.runs_dir / "latest").mkdir(parents=True)

    registry.begin("first", "job", named=False)

    assert (registry.runs_dir / "latest").is_dir()
    assert not (registry.runs_dir / "latest").is_symlink()
    assert list(registry.runs_dir.glob(".latest-*")) == []
    assert "latest does not point at run first: it is a folder of its own" in caplog.text


def test_a_run_has_its_folders_from_the_start(registry):
    run = registry.begin("new", "job", named=False)
    assert [(run.path / folder).is_dir() for folder in ("logs", "artifacts")] == [True, True]


def test_run_without_ranks_leaves_no_folder(registry):
    """The folder of a run that a killed aggregator only began is removed, but no other files."""
    run = registry.begin("empty", "job", named=False)
    assert run.end()

    registry.discard(run)

    assert not run.path.exists()
    kept = registry.begin("kept", "job", named=False)
    (kept.path / "notes.txt").write_text("mine")
    assert kept.end()
    registry.discard(kept)
    assert [path.name for path in kept.path.iterdir()] == ["notes.txt"]


def test_store_of_a_run_describes_the_run(registry):
    """Readers find the run's facts under one key."""
    run, _ = join(registry, hello(0, 2, project="vision", command="train.py --lr 1"))
    run.commit()

    with StoreReader(run.path / STORE_NAME) as reader:
        facts = reader.meta()["run"]

    assert {key: facts[key] for key in ("id", "name", "project", "job", "command", "world_size", "state", "ended")} == {
        "id": run.id, "name": "test", "project": "vision", "job": "job", "command": "train.py --lr 1",
        "world_size": 2, "state": "running", "ended": None,
    }  # fmt: skip


def test_runs_dir_that_cannot_be_made(tmp_path):
    """The error names folder, reason and way out."""
    (tmp_path / "file").write_text("")

    with pytest.raises(
        StoreError, match=r"cannot write the runs folder .*/file is a file, not a folder\. .*--runs-dir"
    ):
        prepare_runs_dir(tmp_path / "file" / "runs")
    with pytest.raises(StoreError, match=r"^\S+/file is a file, not a folder\. Choose another"):
        prepare_runs_dir(tmp_path / "file")


def test_ranks_that_a_process_spawns_take_its_place(registry):
    """The parent has no step: it is no rank of the run, and leaves rank 0 to its child."""
    _, parent = join(registry, hello(0, 1, run_id="named", recorder="parent", pid=1))
    run, first = join(registry, hello(1, 2, run_id="named", recorder="b", pid=3, spawned_by="parent"))
    same, second = join(registry, hello(0, 2, run_id="named", recorder="a", pid=2, spawned_by="parent"))

    assert run is same
    assert [stream.is_helper for stream in (parent, first, second)] == [True, False, False]
    assert (second.attempt, run.world_size) == (0, 2)


def test_a_process_that_has_spawned_ranks_may_come_after_them(registry):
    """As where the aggregator starts late: it is no rank either, and its run began with its script."""
    run, first = join(registry, hello(0, 2, run_id="named", recorder="a", pid=2, spawned_by="parent"))
    _, second = join(registry, hello(1, 2, run_id="named", recorder="b", pid=3, spawned_by="parent"))
    same, parent = join(registry, hello(0, 1, run_id="named", recorder="parent", pid=1, script_ms=60_000))

    assert run is same
    assert [stream.is_helper for stream in (parent, first, second)] == [True, False, False]
    assert (parent.attempt, run.attempt, run.world_size) == (0, 0, 2)
    assert run.started_s <= run.now_s - 60
    leave(run, first)
    leave(run, second)
    assert not run.is_over(has_launcher=False)
    leave(run, parent)
    assert run.end()
    assert run.state == "finished"


def test_a_process_that_has_spawned_one_training_is_a_run_of_its_own(registry):
    """A child that trains for itself came before it: it may train, too."""
    run, _ = join(registry, hello(0, 1, run_id="named", recorder="a", pid=2, spawned_by="parent"))
    other, parent = join(registry, hello(0, 1, run_id="named", recorder="parent", pid=1))

    assert other is not run
    assert not parent.is_helper


@pytest.mark.parametrize(("flight", "steps", "attempt"), [("a", 0, 0), ("a", 10, 1), ("b", 0, 1)])
def test_a_rank_that_joins_a_process_group_is_no_restart(registry, flight, steps, attempt):
    """The same recording without steps, now one of two ranks, is of the same attempt; a later one trains again."""
    run, alone = join(registry, hello(0, 1, run_id="named", recorder="alone", pid=1, flight="/a"))
    alone.next["steps"] = steps
    leave(run, alone)
    same, grouped = join(registry, hello(0, 2, run_id="named", recorder="grouped", pid=1, flight=f"/{flight}"))
    _, other = join(registry, hello(1, 2, run_id="named", recorder="other", pid=2, flight="/c"))

    assert same is run
    assert (grouped.attempt, other.attempt, run.attempt, run.world_size) == (attempt, attempt, attempt, 2)


@pytest.mark.process
@pytest.mark.parametrize(("reason", "is_same"), [("failed", True), ("finished", False)])
def test_ranks_that_torchrun_starts_again_uncounted_are_the_next_attempt(registry, reason, is_same):
    """A host has joined or left; another job at the same address has another agent, or the first one's had finished."""
    joined = []
    for _ in range(2):
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as worker:
            facts = {"pid": worker.pid, "start_ticks": process_start_ticks(worker.pid), "recorder": str(worker.pid)}
            joined += [join(registry, hello(rank, 2, run="torchrun@vm:29500", **facts)) for rank in range(2)]
            for run, stream in joined[-2:]:
                leave(run, stream, reason)

    first = joined[0][0]
    assert [(run is first, stream.attempt) for run, stream in joined] == [
        (True, 0), (True, 0), (is_same, int(is_same)), (is_same, int(is_same)),
    ]  # fmt: skip


def test_children_that_train_each_for_themselves_are_runs(registry):
    """Without a process group they are no ranks of one training, also one after the other."""
    join(registry, hello(0, 1, run_id="named", recorder="parent", pid=1))
    run, first = join(registry, hello(0, 1, run_id="named", recorder="a", pid=2, spawned_by="parent"))
    leave(run, first)
    other, second = join(registry, hello(0, 1, run_id="named", recorder="b", pid=3, spawned_by="parent"))

    assert other is not run
    assert (first.attempt, second.attempt) == (0, 0)


def test_a_rank_with_steps_is_no_helper_of_its_children(registry):
    """A training that starts another one goes on."""
    run, parent = join(registry, hello(0, 1, run_id="named", recorder="parent", pid=1))
    parent.next["steps"] = 10
    other, _ = join(registry, hello(0, 1, run_id="named", recorder="a", pid=2, spawned_by="parent"))

    assert other is not run
    assert not parent.is_helper


def test_jobs_that_are_refused_are_not_kept_for_ever(registry, monkeypatch):
    """A job that comes again after many others gets a new id; the newest ones get theirs again."""
    begun = []

    def refuse(run_id, key, **_):
        begun.append(run_id)
        raise RefusedError("full", retry=True)

    monkeypatch.setattr(registry, "begin", refuse)
    for number in [*range(150), 149, 0]:
        with pytest.raises(RefusedError):
            registry.assign(hello(run=f"job{number}"))

    assert begun[150] == begun[149]
    assert begun[151] != begun[0]
