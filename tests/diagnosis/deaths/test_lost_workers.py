"""Loader workers that died: the cause of a rank's end, or a finding of their own."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from traceml.database.schema import LOADER_WORKERS
from traceml.diagnosis.deaths.lost_loader_workers import worker_causing_end, worker_lost
from traceml.diagnosis.deaths.lost_ranks import rank_lost
from traceml.diagnosis.facts.ends import LostWorker, RankExit, lost_worker_of, worker_in
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.memory_growth import MemoryHistory
from traceml.diagnosis.kinds import Kind

KILLED = "RuntimeError: DataLoader worker (pid 4711) is killed by signal: Killed. "
DEAD = LostWorker(pid=4711, worker=1, workers=2, signal=9, step=108, oom_kills=0, shm_bytes=1 << 30)


def ended(exception: str) -> RankExit:
    return RankExit(rank=0, state="failed", code=1, exception=exception, file="train.py", line=11, last_step=107)


@pytest.mark.parametrize(
    ("exception", "how"),
    [
        (KILLED, (4711, 9, None)),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", (7, 7, None)),
        ("RuntimeError: DataLoader worker (pid(s) 5, 6) exited unexpectedly", (5, None, None)),
        ("RuntimeError: DataLoader worker (pid 5) exited unexpectedly with exit code 3. Details", (5, None, 3)),
    ],
)
def test_torch_says_which_worker_died(exception, how):
    """Process, signal and status are in its text."""
    told = worker_in(exception)

    assert told is not None
    assert (told.pid, told.signal, told.code) == how


def test_an_exception_that_a_worker_raised_is_no_death():
    """The worker went on, and the dataset's own message is the cause."""
    assert worker_in("ValueError: sample 1777 is damaged (in DataLoader worker process 0)") is None


def test_the_rank_ended_because_of_the_worker_that_was_noted():
    """The note knows what the exception does not: number and signal."""
    facts = JobFacts(
        exits=(ended("RuntimeError: DataLoader worker (pid(s) 4711) exited unexpectedly"),), lost_workers={0: [DEAD]}
    )

    finding = rank_lost(facts)

    assert finding.summary == (
        "Rank 0 ended because loader worker 1 (process 4711) was killed by signal 9 (SIGKILL), after step 107."
    )
    assert finding.headline == "Rank 0 ended because one of its loader workers was killed by SIGKILL after step 107"
    assert "ended no process here" in finding.next


@pytest.mark.parametrize(("how", "says"), [("", "Look in the output"), (" with exit code 3", "os._exit or sys.exit")])
def test_how_an_unknown_worker_ended_is_not_guessed(how, says):
    """Torch tells no status of a worker whose queue it has found empty."""
    finding = rank_lost(JobFacts(exits=(ended(f"RuntimeError: DataLoader worker (pid 7) exited unexpectedly{how}"),)))

    assert says in finding.next


@pytest.mark.parametrize("kills", [0, 1])
def test_a_worker_that_the_kernel_killed_is_told_with_its_memory(kills):
    """That of all workers, as the limit is for them all; another kill says nothing of memory."""
    rows = np.zeros(8, LOADER_WORKERS.dtype)
    rows["t_ns"], rows["step"], rows["private_bytes"] = np.arange(8) * 10**9, np.arange(8), np.arange(8) << 28
    memory = MemoryHistory()
    memory.worker_rows(0, rows)
    dead = replace(DEAD, oom_kills=kills, memory_limit_bytes=2 << 30)

    finding = rank_lost(JobFacts(exits=(ended(KILLED),), lost_workers={0: [dead]}, memory=memory))

    words = "; the loader's workers used 1.75 GiB, 15.0 GiB more each minute, with a limit of 2.00 GiB for its cgroup"
    assert (words in finding.summary) == bool(kills)
    assert finding.evidence.get("bytes_per_minute") == (15 << 30 if kills else None)


def test_without_a_note_the_exception_tells():
    """The rank ended before its recorder could say more."""
    finding = rank_lost(JobFacts(exits=(ended(KILLED),)))

    assert "a loader worker (process 4711) was killed by signal 9 (SIGKILL)" in finding.summary
    assert "dmesg" in finding.next


NO_FILE = "FileNotFoundError: [Errno 2] No such file or directory"


@pytest.mark.parametrize("exception", ["ConnectionResetError: [Errno 104] Connection reset by peer", NO_FILE])
def test_a_batch_that_a_dead_worker_had_sent_cannot_be_read(exception):
    """The exception is that of the connection, in data loading; elsewhere it has another cause."""
    cut = {"rank": 0, "state": "failed", "exception": exception}
    reading, reducing = (RankExit(**cut, open_phase=phase) for phase in ("input_wait", "backward"))

    assert worker_causing_end(reading, JobFacts(lost_workers={0: [DEAD]})) is DEAD
    assert worker_causing_end(reducing, JobFacts(lost_workers={0: [DEAD]})) is None
    assert worker_causing_end(reading, JobFacts()) is None


def test_a_missing_file_of_the_dataset_is_no_dead_worker():
    """It has a name; another worker may have died before."""
    ended = RankExit(rank=0, state="failed", open_phase="input_wait", exception=f"{NO_FILE}: 'train.bin'")

    assert worker_causing_end(ended, JobFacts(lost_workers={0: [DEAD]})) is None


def test_a_rank_that_ended_with_its_worker_did_not_go_on() -> None:
    """What torch ended for it is told with that end; of what the launcher ended, it is not said that it went on."""
    swept = RankExit(rank=1, state="killed", signal=15, stopped=True, last_step=107)
    facts = {"world_size": 2, "state": "failed", "lost_workers": {0: [DEAD], 1: [replace(DEAD, pid=4712)]}}
    told = worker_lost(JobFacts(exits=(ended(KILLED), swept), **facts), [0])
    later = worker_lost(JobFacts(exits=(ended(KILLED), replace(swept, last_step=120)), **facts), [0])
    raised = replace(ended(KILLED), rank=1, exception=KILLED.replace("4711", "4712"), line=30)

    assert told.summary == (
        "Loader worker 1 (process 4712) was killed by signal 9 (SIGKILL) on rank 1, in step 108. The rank has ended, "
        "too, without a further step."
    )
    assert later.summary.endswith("The script continued; batches of that iterator may be missing.")
    assert worker_lost(JobFacts(exits=(ended(KILLED), raised), **facts), [0]) is None


def test_a_script_that_caught_it_has_a_finding():
    """The run goes on, and says which worker and when."""
    finding = worker_lost(JobFacts(lost_workers={3: [DEAD]}))

    assert finding.kind is Kind.WORKER_LOST
    assert finding.ranks == (3,)
    assert finding.headline == "A loader worker of rank 3 was killed by SIGKILL at step 108"
    assert "worker 1 (process 4711)" in finding.summary
    assert finding.evidence["oom_kills"] == 0


def test_later_deaths_are_counted():
    """The first is told."""
    finding = worker_lost(JobFacts(lost_workers={0: [DEAD, LostWorker(pid=9, code=1, step=120)]}))

    assert finding.evidence["lost"] == 2
    assert "1 more died later" in finding.summary
    assert finding.headline == "2 loader workers of rank 0 died from step 108 on"


@pytest.mark.parametrize("facts", [
    {"state": "stopped"},  # the scheduler ends all processes
    {"explained": [0]},
])  # fmt: skip
def test_a_death_that_is_reported_already_is_not_reported_again(facts):
    """Of a run that was stopped, and of a rank whose end it explains."""
    explained = facts.pop("explained", ())

    assert worker_lost(JobFacts(lost_workers={0: [DEAD]}, **facts), explained) is None


@pytest.mark.parametrize(
    ("lost", "advice"),
    [
        ({"signal": 9, "oom_kills": 1, "memory_limit_bytes": 1 << 30}, "memory limit of 1.00 GiB"),
        ({"signal": 9}, "dmesg"),
        ({"signal": 7, "shm_bytes": 64 << 20}, "/dev/shm of 64.0 MiB more room (docker run --shm-size=8g"),
        ({"signal": 7, "shm_bytes": 16 << 30}, "--shm-size=32g"),
        ({"signal": 7, "shm_bytes": 16 << 30, "shm_used_bytes": 9 << 30}, "--shm-size=32g"),
        ({"signal": 7, "shm_bytes": 64 << 20, "shm_used_bytes": 0}, "--shm-size=8g"),  # its own batch is gone
        ({"signal": 7, "shm_bytes": 16 << 30, "shm_used_bytes": 1 << 30}, "only 6 % was used: probably a mapped file"),
        ({"signal": 11}, "faulthandler"),
        ({"signal": 15}, "what sent the signal"),
        ({"code": 1}, "num_workers=0"),
    ],
)
def test_the_advice_is_for_the_cause(lost, advice):
    """Memory, shared memory, native code, a signal from outside, a status."""
    finding = worker_lost(JobFacts(lost_workers={0: [LostWorker(pid=5, **lost)]}))

    assert advice in finding.next


def test_rows_of_the_rank_are_read():
    """A row without a process is damaged, and left out."""
    builder = JobFactsBuilder()
    for row in ({"pid": 5, "signal": 9, "worker": 0, "workers": 4, "oom_kills": 1}, {"signal": 9}):
        builder.info(2, {"kind": "worker_lost", **row})

    assert builder.build().lost_workers == {2: [LostWorker(pid=5, signal=9, worker=0, workers=4, oom_kills=1)]}
    assert lost_worker_of({"pid": 4711, "message": KILLED}) == LostWorker(pid=4711, signal=9)
