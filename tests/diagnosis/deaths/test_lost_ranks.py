"""Ranks that failed: the cause among them, and its report."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from traceml.database.schema import Resource
from traceml.diagnosis.deaths.lost_ranks import rank_lost, root_causes
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.resource_use import ResourceUse
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.recorder.exits import describe


def test_a_signal_is_reported_with_step_and_phase():
    """The summary names rank, signal, step and open phase."""
    ended = RankExit(rank=3, state="killed", signal=9, last_step=41, open_step=42, open_phase="backward")

    finding = rank_lost(JobFacts(exits=(ended,)))

    assert finding.summary == "Rank 3 was killed by signal 9 (SIGKILL), in step 42, in backward."
    assert finding.evidence["step"] == 42
    assert "out-of-memory" in finding.next


@pytest.mark.parametrize(("code", "number", "told"), [(0, 6, True), (None, 6, False), (1, 6, False), (0, 9, False)])
def test_a_crash_after_a_good_end_is_one_of_the_interpreters_end(code, number, told):
    """A daemon thread that calls torch there ends the process by SIGABRT; a kill is from outside at any time."""
    facts = {"signal": number, "last_step": 41, **({} if code is None else {"code": code})}
    ended = RankExit.from_facts(0, "killed", facts)

    finding = rank_lost(JobFacts(exits=(ended,)))

    assert ended.code is None
    assert ("in the end of the process, after step 41" in finding.summary) == (code == 0)
    assert ("daemon thread" in finding.next) == told


def test_the_phase_of_one_rank_is_not_said_of_all():
    """Under torchrun alone nobody reports which rank a signal has ended first."""
    ends = [
        RankExit(rank=rank, state="lost", process_gone=True, open_step=60, open_phase=phase, at_s=2.0 - rank)
        for rank, phase in enumerate(("backward", "other"))
    ]

    finding = rank_lost(JobFacts(exits=tuple(ends), world_size=2))

    assert finding.summary == "Ranks 0, 1 ended without a report: by a signal or by os._exit, in step 60."
    assert finding.phase is None


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({"exception": "OSError: [Errno 28] No space left on device", "file": "a.py", "line": 3},
         "Ranks 0, 1 ended with OSError: [Errno 28] No space left on device at a.py:3, in step 42 on rank 1."),
        ({"state": "lost", "host_lost": "no answer", "unsent": True, "open_step": None},
         "Ranks 0, 1 were lost with their host: no answer, after step 41 on rank 1 had arrived."),
        ({"exception": "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error."},
         "Ranks 0, 1 ended because loader workers died: on rank 1 a loader worker (process 7) was killed by signal 7"),
    ],
)  # fmt: skip
def test_what_one_of_several_ranks_has_is_not_said_of_all(end: dict, words: str) -> None:
    """Its step, and its loader's worker: ranks that fail alike need not do so in one step."""
    ends = [
        RankExit(**{"rank": rank, "state": "failed", "last_step": 2 + 39 * rank, "open_step": 3 + 39 * rank,
                    "at_s": 9.0 - rank, **end})
        for rank in (0, 1)
    ]  # fmt: skip

    finding = rank_lost(JobFacts(exits=tuple(ends), world_size=2))

    assert finding.summary.startswith(words)
    assert finding.evidence["first_rank"] == 1
    assert " on rank 1" in finding.headline
    assert finding.headline.startswith("Ranks 0, 1 were lost with their host") is ("host_lost" in end)
    assert "one of its" not in finding.headline


def test_a_rank_whose_error_was_raised_again_is_no_victim():
    """Both ranks raise the same at the same line for what they caught: an own error, and that its peer is gone."""
    own = {"exception": "ValueError: corrupt record 50", "line": 9, "at_s": 2.0}
    peer = {
        "exception": "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer",
        "line": 11,
        "at_s": 1.0,
    }
    ends = tuple(
        RankExit(rank=rank, state="failed", file="a.py", raised_as="RuntimeError: training failed", **end)
        for rank, end in enumerate((peer, own))
    )

    finding = rank_lost(JobFacts(exits=ends, world_size=2))

    assert finding.summary == (
        "Rank 1 ended with ValueError: corrupt record 50 at a.py:9, before the first step, which was raised again as "
        "RuntimeError: training failed; rank 0 ended because of that."
    )
    assert finding.evidence["raised_as"] == "RuntimeError: training failed"


def test_an_end_before_the_first_step_is_not_said_of_all():
    ends = (
        RankExit(rank=0, state="killed", signal=9, at_s=1.0),
        RankExit(rank=1, state="killed", signal=9, last_step=4, open_step=5, at_s=2.0),
    )

    summary = rank_lost(JobFacts(exits=ends, world_size=2)).summary

    assert summary == "Ranks 0, 1 were killed by signal 9 (SIGKILL), before the first step on rank 0."


def test_a_kill_is_reported_with_the_line_that_was_seen_last():
    """A signal from outside names none, but a sample may have seen one in the phase that was open."""
    ended = RankExit(rank=3, state="killed", signal=9, open_step=42, open_phase="other", seen="/a/train.py:23 load")

    finding = rank_lost(JobFacts(exits=(ended,)))

    assert finding.summary == (
        "Rank 3 was killed by signal 9 (SIGKILL), in step 42, in code outside the known phases, last seen at "
        "train.py:23 load."
    )
    assert (finding.evidence["file"], finding.evidence["line"]) == ("/a/train.py", 23)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("device-side assert triggered", "an index is out of range"),
        ("an illegal memory access was encountered", "compute-sanitizer"),
    ],
)
def test_an_error_of_the_device_is_older_than_its_line(error, words):
    """The line waited for the device, as `loss.item()`: an earlier one launched what failed."""
    ended = RankExit(rank=0, state="failed", code=1, exception=f"torch.AcceleratorError: CUDA error: {error}",
                     file="/a/train.py", line=10, last_step=300)  # fmt: skip

    advice = rank_lost(JobFacts(exits=(ended,))).next

    assert advice.startswith("The device reports errors late: run it with CUDA_LAUNCH_BLOCKING=1")
    assert words in advice


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"open_step": 0, "open_phase": "evaluation"}, ", in evaluation, before the first step."),
        ({"open_step": 42, "last_step": 41, "open_phase": "evaluation"}, ", in evaluation, after step 41."),
        ({"open_step": 42, "open_phase": "evaluation"}, ", in evaluation, after step 41."),
        ({"open_step": 42, "last_step": 41, "open_phase": "exit"}, ", in the end of the process, after step 41."),
        ({"last_step": 41, "open_phase": "checkpoint"}, ", in checkpoint saving, after step 41."),
        (
            {"open_step": 41, "last_step": 41, "open_phase": "other"},
            ", in code outside the known phases, after step 41.",
        ),
        ({"untraced": True}, "."),
    ],
)
def test_an_end_outside_the_steps_is_in_none(where, words):
    """A sanity check comes before the first step, and a script goes on after its last one.

    Nothing is known of the steps of a script that only logs.
    """
    finding = rank_lost(JobFacts(exits=(RankExit(rank=0, state="killed", signal=15, **where),)))

    assert finding.summary == f"Rank 0 was killed by signal 15 (SIGTERM){words}"
    assert " at step" not in finding.headline


@pytest.mark.parametrize(("open_step", "words"), [(42, "in step 42 of this run"), (None, "after step 41 of this run")])
def test_steps_of_a_run_that_went_on_from_a_checkpoint_are_its_own(open_step, words):
    """The script may count them on from there; ours begin at 0."""
    ended = RankExit(
        rank=0, state="failed", exception="ValueError", open_step=open_step, last_step=41, counts_anew=True
    )
    finding = rank_lost(JobFacts(exits=(ended,)))

    assert finding.summary == f"Rank 0 ended with ValueError, {words}."
    assert finding.headline.endswith("step 42 of this run" if open_step else "after step 41 of this run")


@pytest.mark.parametrize("seen", [None, "/a/train.py:23 load"])
def test_a_line_that_is_known_hides_the_one_seen_last(seen):
    """An exception tells its own line."""
    ended = RankExit(rank=0, state="failed", code=1, exception="ValueError: no", file="b.py", line=17, seen=seen)

    finding = rank_lost(JobFacts(exits=(ended,)))

    assert "last seen" not in finding.summary
    assert (finding.evidence["file"], finding.evidence["line"]) == ("b.py", 17)


def test_an_exception_is_reported_with_its_line():
    """Message, file and line are in the evidence."""
    ended = RankExit(
        rank=0, state="failed", code=1, exception="ValueError: bad label 11", file="train.py", line=17, last_step=8
    )

    finding = rank_lost(JobFacts(exits=(ended,)))

    assert "ValueError: bad label 11 at train.py:17" in finding.summary
    assert (finding.evidence["file"], finding.evidence["line"], finding.evidence["step"]) == ("train.py", 17, 8)


@pytest.mark.parametrize(
    ("ended", "advice"),
    [
        ({"signal": 1, "state": "killed"}, "tmux"),
        ({"signal": 7, "state": "killed"}, "--shm-size"),
        ({"signal": 13, "state": "killed"}, "its reader had closed"),
        ({"signal": 14, "state": "killed"}, "setitimer"),
        ({"signal": 24, "state": "killed"}, "ulimit -t"),
        ({"signal": 25, "state": "killed"}, "ulimit -f"),
        ({"exception": "OSError: [Errno 27] File too large", "file": "a.py", "line": 3}, "ulimit -f"),
        ({"exception": "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                       "dataloader's workers are out of shared memory."}, "--shm-size"),
        ({"exception": "OSError: [Errno 24] Too many open files: 'a.jpg'", "file": "a.py", "line": 3}, "ulimit -n"),
        ({"exception": "RuntimeError: unable to open shared memory object </torch_2164_23854_110> in read-write mode: "
                       "Too many open files (24)"}, "ulimit -n"),
        ({"exception": "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 147456, "
                       "Hardware limit: 101376. Reducing block sizes or `num_stages` may help."}, "num_stages"),
        ({"exception": "google.api_core.exceptions.TooManyRequests: 429 Quota exceeded", "file": "a.py", "line": 3},
         "Read a.py:3"),
        ({"exception": "ValueError: dropout probability has to be between 0 and 1, but got 1.5", "file": "a.py",
          "line": 3}, "Read a.py:3"),
        (
            {"exception": "RuntimeError: DataLoader timed out after 2 seconds", "file": "a.py", "line": 3},
            "raise the loader's timeout",
        ),
        ({"exception": "OSError: [Errno 28] No space left on device", "file": "a.py", "line": 3}, "df -h"),
        ({"exception": "OSError: [Errno 122] Disk quota exceeded", "file": "a.py", "line": 3}, "quota"),
        ({"exception": "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"}, "df -h"),
        ({"exception": "RuntimeError: [enforce fail at inline_container.cc:595] . PytorchStreamWriter failed writing "
                       "file data/1: file write failed"}, "df -h"),
        ({"exception": "RuntimeError: basic_ios::clear: iostream error", "open_phase": "checkpoint"}, "df -h"),
        ({"exception": "RuntimeError: basic_ios::clear: iostream error", "file": "a.py", "line": 3}, "Read a.py:3"),
        ({"exception": "ValueError: unexpected pos", "file": "a.py", "line": 3}, "Read a.py:3"),
        ({"exception": "ValueError: no", "file": "a.py", "line": 3}, "Read a.py:3"),
        ({"exception": "TypeError: cannot pickle '_thread.lock' object", "open_phase": "checkpoint"}, "state_dict()"),
        ({"exception": "TypeError: cannot pickle 'module' object", "file": "a.py", "line": 3}, "Read a.py:3"),
        ({"exception": "SystemExit: no data", "file": "a.py", "line": 3}, "that leads to a.py:3"),
        ({"exception": "SystemExit: no data"}, "that leads to it"),
        ({"exception": "RuntimeError: Expected to have finished reduction in the prior iteration before starting a new "
                       "one.", "file": "a.py", "line": 3}, "find_unused_parameters=True"),
        ({"exception": "EOFError: EOF when reading a line", "file": "a.py", "line": 3}, "an option of the script"),
        (
            {"exception": "BrokenPipeError: [Errno 32] Broken pipe", "file": "a.py", "line": 3},
            "a.py:3 wrote to a pipe or a connection that its reader had closed. If that line prints",
        ),
        ({"exception": "RuntimeError: Broken pipe", "file": "a.py", "line": 3}, "Read a.py:3"),
        ({"exception": "EOFError: Ran out of input", "file": "a.py", "line": 3}, "Read a.py:3"),
        ({"exception": "SyntaxError: invalid syntax (a.py, line 3)"}, "full traceback of rank 0 is in the run's"),
        ({"exception": "ValueError: no", "file": "a.py", "line": 3}, "full traceback of rank 0 is in the run's"),
        ({"exception": "ValueError: no", "file": "a.py", "line": 3, "caught": True}, "only if the script printed it"),
    ],
)  # fmt: skip
def test_the_advice_is_for_the_cause(ended, advice):
    """A closed terminal, shared memory, descriptors; else the line."""
    finding = rank_lost(JobFacts(exits=(RankExit(**{"rank": 0, "state": "failed", "code": 1, **ended}),)))

    assert advice in finding.next


@pytest.mark.parametrize(("used", "advice"), [(590, "the 600 s of CPU time"), (300, "out-of-memory killer")])
def test_a_kill_at_the_limit_of_cpu_time_is_explained_by_it(used, advice):
    """Where the hard limit is the soft one, the kernel sends SIGKILL; of another process the limit says nothing."""
    ended = RankExit(rank=0, state="killed", signal=9)
    limits = (ResourceUse(1, Resource.CPU_TIME, 600, 600), ResourceUse(0, Resource.CPU_TIME, used, 600))

    finding = rank_lost(JobFacts(exits=(ended,), limits=limits))

    assert advice in finding.next


@pytest.mark.parametrize(
    ("exception", "advice"),
    [
        ("RuntimeError: Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: SO_ERROR: refused",
         "could not reach another rank"),
        ("RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:34197", "closed its connection"),
        ("RuntimeError: NCCL error: remote process exited or there was a network error", "closed its connection"),
    ],
)  # fmt: skip
def test_a_group_that_was_never_set_up_lost_no_member(exception, advice):
    """Where ranks could not connect, none has left: the advice is about start and network."""
    ended = RankExit(rank=0, state="failed", code=1, exception=exception, file="train.py", line=3)

    finding = rank_lost(JobFacts(exits=(ended,), world_size=2))

    assert advice in finding.next


@pytest.mark.parametrize(("restarts", "step", "told"), [(1, None, True), (0, None, False), (1, 40, False)])
def test_a_group_of_restarted_ranks_may_have_read_old_addresses(restarts: int, step: int | None, told: bool) -> None:
    """torchrun's store serves each attempt; a group that is made later is no matter of a restart."""
    exception = "RuntimeError: Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: SO_ERROR: refused"
    ended = RankExit(rank=0, state="failed", code=1, exception=exception, file="train.py", line=3, last_step=step)

    finding = rank_lost(JobFacts(exits=(ended,), world_size=2, store_restarts=restarts))

    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in finding.next) is told


@pytest.mark.parametrize(("lost_at", "host", "cause"), [(11.0, "a", 0), (9.5, "a", 1), (11.0, "b", 1), (None, "a", 1)])
def test_a_rank_that_ran_when_another_failed_is_not_its_cause(lost_at: float | None, host: str, cause: int) -> None:
    """Rank 0 does not reach an old address after a restart, then torchrun ends rank 1, which cannot report that."""
    exception = "RuntimeError: Gloo connectFullMesh failed with ... SO_ERROR: Connection refused"
    failed = RankExit(rank=0, state="failed", code=1, exception=exception, at_s=10.0, host="a")
    lost = RankExit(rank=1, state="lost", process_gone=True, at_s=lost_at, host=host)

    finding = rank_lost(JobFacts(exits=(failed, lost)))

    assert finding.ranks == (cause,)
    assert ("without a report" in finding.summary) == (cause == 1)
    assert finding.summary.endswith(f"rank {1 - cause} ended because of that.")
    for unsure in (replace(lost, process_gone=False), replace(lost, reported_s=11.0)):
        assert rank_lost(JobFacts(exits=(failed, unsure))).ranks == (1,)


@pytest.mark.parametrize(
    ("end", "at_s", "cause"),
    [({"signal": 6}, 600.0, 1), ({"signal": 6}, 20.0, 0), ({"signal": 11}, 600.0, 0), ({"exception": "E"}, 600.0, 0)],
)
def test_a_host_that_fell_silent_before_others_were_aborted_is_the_cause(end: dict, at_s: float, cause: int) -> None:
    """NCCL's watchdog aborts ranks that wait for it, after ten minutes; a crash of its own needs no other cause."""
    aborted = RankExit(rank=0, state="killed", at_s=at_s, host="a", **end)
    silent = RankExit(rank=1, state="lost", at_s=30.0, host="b", unsent=True)

    finding = rank_lost(JobFacts(exits=(aborted, silent), world_size=2))

    assert (finding.ranks, finding.evidence["followed"]) == ((cause,), [1 - cause])


def test_a_script_that_ends_itself_is_told_with_its_text():
    """Its own words, though they look like another rank's end; of an exception that only names it, nothing changes."""
    own = RankExit(rank=0, state="failed", code=1, exception="SystemExit: nccl is missing\nask", file="a.py", line=3)
    other = RankExit(rank=0, state="failed", code=1, exception="my.SystemExitError: x", file="a.py", line=3)

    finding = rank_lost(JobFacts(exits=(own,), world_size=2))

    assert finding.summary == "Rank 0 ended by sys.exit('nccl is missing') at a.py:3, before the first step."
    assert "a.py:3" in finding.next
    assert "ended with my.SystemExitError: x at a.py:3" in rank_lost(JobFacts(exits=(other,))).summary


def test_the_line_that_an_exception_announces_is_told():
    """As libraries do that import lazily, and torch for a state that does not fit; other messages are one line."""
    exception = "RuntimeError: Error(s) in loading state_dict for Net:\n\tsize mismatch for fc.bias: 3 and 4\n\tmore"
    announced = RankExit(rank=0, state="failed", code=1, exception=exception, file="a.py", line=3)
    other = RankExit(rank=0, state="failed", code=1, exception="KeyError: no\nask: me", file="a.py", line=3)

    summary = rank_lost(JobFacts(exits=(announced,))).summary

    assert "loading state_dict for Net: size mismatch for fc.bias: 3 and 4 at a.py:3" in summary
    assert "ended with KeyError: no at a.py:3" in rank_lost(JobFacts(exits=(other,))).summary


def test_a_process_that_left_in_the_middle_is_told():
    """With exit code 0 it is no failure of the job, and no finished run either."""
    left = RankExit(rank=0, state="lost", code=0, process_gone=True, last_step=41, open_step=42, open_phase="backward")

    finding = rank_lost(JobFacts(exits=(left,)))

    assert finding.summary == "Rank 0 ended with exit code 0 in the middle of its script, in step 42, in backward."
    assert finding.severity == "warning"
    assert "os._exit(0)" in finding.next
    assert finding.headline == "Rank 0 ended with exit code 0 at step 42, in backward"
    assert rank_lost(JobFacts(exits=(RankExit(rank=0, code=0),))) is None

    swept = RankExit(rank=2, state="killed", signal=15, stopped=True)
    finding = rank_lost(JobFacts(exits=(left, replace(left, rank=1), swept)))
    assert finding.summary.startswith("Ranks 0, 1 ended with exit code 0 in the middle of their script, in step 42")
    assert finding.severity == "critical"  # others did not end well


def test_an_exit_code_is_reported():
    """sys.exit(3) is a lost rank too."""
    finding = rank_lost(JobFacts(exits=(RankExit(rank=1, state="failed", code=3),)))

    assert "exit code 3, before the first step" in finding.summary


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "ended with exit code 3, before"),
        (127, "a shell's code for 'command not found'"),
        (134, "a shell's code for signal 6 (SIGABRT)"),
        (137, "a shell's code for signal 9 (SIGKILL)"),
        (139, "a shell's code for signal 11 (SIGSEGV)"),
        (200, "ended with exit code 200, before"),
    ],
)
def test_exit_codes_of_shells_are_explained(code, words):
    """128 + n stands for a signal, if there is such a one."""
    finding = rank_lost(JobFacts(exits=(RankExit(rank=1, state="failed", code=code),)))

    assert words in finding.summary


def test_a_crash_names_the_line_that_called_into_c():
    """faulthandler has told it; without it, the advice is how to get it."""
    place = {"file": "train.py", "line": 12, "function": "f", "stack": "File ..."}
    told, silent = RankExit(rank=0, state="killed", signal=11, **place), RankExit(rank=0, state="killed", signal=11)

    known, unknown = (rank_lost(JobFacts(exits=(each,))) for each in (told, silent))

    assert known.summary.startswith("Rank 0 was killed by signal 11 (SIGSEGV) in C code called at train.py:12")
    assert (known.evidence["line"], known.evidence["function"]) == (12, "f")
    assert "train.py:12" in known.next
    assert "faulthandler" in unknown.next


@pytest.mark.parametrize(
    ("used", "host", "words"),
    [
        (60, "a", "give /dev/shm of 64.0 MiB more room"),
        (3, "a", "Of /dev/shm only 5 % was used: probably a mapped file at train.py:12 f has become shorter"),
        (3, "b", "give /dev/shm more room"),
    ],
)
def test_a_bus_error_is_shared_memory_or_a_mapped_file(used, host, words):
    """By what was used of shared memory on that host; where that is not known, shared memory is the usual cause."""
    ended = RankExit(rank=0, state="killed", signal=7, file="train.py", line=12, function="f", stack="File ...")
    use = ResourceUse(1, Resource.SHARED_MEMORY, used << 20, 64 << 20)

    finding = rank_lost(JobFacts(exits=(ended,), limits=(use,), hosts={0: "a", 1: host}, world_size=2))

    assert "SIGBUS" in finding.summary
    assert words in finding.next


def test_ranks_that_followed_are_not_the_cause():
    """The launcher's SIGTERM and a collective whose peer is gone are consequences, in any order."""
    exits = (
        RankExit(rank=0, state="failed", code=1, exception="RuntimeError: [gloo] Connection closed by peer", at_s=1.0),
        RankExit(rank=1, state="killed", signal=11, at_s=2.0),
        RankExit(rank=2, state="killed", signal=15, at_s=3.0),
    )

    finding = rank_lost(JobFacts(exits=exits))

    assert finding.ranks == (1,)
    assert finding.evidence["followed"] == [0, 2]
    assert "ranks 0, 2 ended because of that" in finding.summary


def test_the_same_exception_on_all_ranks_names_all():
    """An error in the script affects every rank."""
    exits = [RankExit(rank=rank, state="failed", exception="KeyError: 'x'", file="a.py", line=3) for rank in range(4)]

    assert [ended.rank for ended in root_causes(exits)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("exception", "line", "alike"),
    [
        ("KeyError: 'x'", 3, True),
        ("KeyError: 'x'", 4, False),
        ("OSError: 'x'", 3, False),
        ("RuntimeError: [gloo] Connection closed by peer", 3, False),
        ("KeyboardInterrupt: ", 3, False),
        (None, None, False),
    ],
)
def test_a_rank_with_the_same_exception_is_no_follower(exception, line, alike):
    """The launcher's SIGTERM may come while it ends by its own error; it did not end because of the other rank."""
    place = {"file": "a.py", "line": line} if line else {}
    exits = [
        RankExit(rank=0, state="killed", signal=15, exception=exception, at_s=1.0, stopped=True, **place),
        RankExit(rank=1, state="failed", code=1, exception="KeyError: 'x'", file="a.py", line=3, at_s=2.0),
    ]

    finding = rank_lost(JobFacts(exits=tuple(exits)))

    ranks, because = ("Ranks 0, 1", "") if alike else ("Rank 1", "; rank 0 ended because of that")
    assert finding.summary == f"{ranks} ended with KeyError: 'x' at a.py:3, before the first step{because}."


def test_ranks_that_fail_together_did_not_end_because_of_each_other():
    """Memory that ends is one cause, whatever the line; an exception elsewhere, at the same time, is another one."""

    def failed(rank: int, exception: str, line: int, at_s: float) -> RankExit:
        return RankExit(rank=rank, state="failed", code=1, exception=exception, file="a.py", line=line, at_s=at_s)

    memory = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    for other, ranks, words in (
        (memory, (0, 1), "an allocation of 2.00 GiB failed at a.py:3 on rank 1, before the first step."),
        ("KeyError: 9", (1,), "; rank 0 ended with KeyError: 9 at a.py:4, too."),
    ):
        exits = (failed(0, other, 4, 1.05), failed(1, memory, 3, 1.0))
        finding = rank_lost(JobFacts(exits=exits))

        assert finding.ranks == ranks
        assert finding.summary.endswith(words)
        assert "followed" not in finding.evidence

    killed = RankExit(rank=1, state="killed", signal=9, oom="group", at_s=0.8)
    worker = failed(0, "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed.", 4, 1.0)
    finding = rank_lost(JobFacts(exits=(worker, killed)))
    assert (finding.ranks, finding.evidence["failed_too"]) == ((1,), [0])


def test_a_later_exception_of_a_ranks_own_is_not_said_to_be_because_of_another():
    """Ranks without a process group, say: nothing shows that one needed the other."""
    own = {"state": "failed", "code": 1, "file": "a.py"}
    exits = [RankExit(rank=at, exception=f"KeyError: {at}", line=at, at_s=300.0 * at, **own) for at in (1, 2, 3)]
    two, three = (rank_lost(JobFacts(exits=tuple(exits[:number]))) for number in (2, 3))

    assert two.summary.endswith("; rank 2 ended with KeyError: 2 at a.py:2, 5:00 later.")
    assert three.summary.endswith("; ranks 2, 3 failed, up to 10:00 later.")
    assert (two.ranks, two.evidence["failed_too"], "followed" in two.evidence) == ((1,), [2], False)


def test_ranks_that_the_launcher_killed_are_no_cause():
    """The signal with which a launcher ends the others is no cause."""
    exits = (
        RankExit(rank=0, state="killed", signal=9, at_s=1.0, stopped=True),
        RankExit(rank=1, state="failed", exception="ValueError: x", at_s=2.0),
    )

    assert [ended.rank for ended in root_causes(exits)] == [1]
    assert root_causes(exits[:1]) == []


@pytest.mark.parametrize(
    "ended",
    [
        RankExit(rank=0, state="failed", code=130, exception="KeyboardInterrupt: "),
        RankExit(rank=0, state="killed", signal=2),
        RankExit(rank=0, state="finished", code=0),
    ],
)
def test_a_run_that_was_stopped_by_hand_lost_nobody(ended):
    """Ctrl-C and a clean end are no findings."""
    assert rank_lost(JobFacts(exits=(ended,))) is None


def test_only_sigterm_is_still_a_loss():
    """A run whose ranks were all ended from outside reports that."""
    finding = rank_lost(JobFacts(exits=(RankExit(rank=0, state="killed", signal=15, last_step=5),)))

    assert "SIGTERM" in finding.summary


def test_exits_are_read_from_what_streams_hold():
    """The rank's words, its launcher's and its flight file's become one exit."""
    told = {
        "code": 1,
        "exception": "OSError",
        "message": "no space",
        "file": "t.py",
        "line": 3,
        "stack": "Traceback",
        "step": 7,
    }

    ended = RankExit.from_facts(2, "failed", told, "node1")

    assert (ended.exception, ended.open_step, ended.stack, ended.host) == ("OSError: no space", 7, "Traceback", "node1")
    assert RankExit.from_facts(0, "lost", {"last_step": -1}).last_step is None


def test_facts_are_gathered_from_info_rows():
    """Loaders, cores and the end of a rank come from its rows; later reports complete them."""
    builder = JobFactsBuilder(2)
    builder.host(0, "node1")
    builder.info(0, {"kind": "process", "cores": 8})
    builder.info(0, {"kind": "loader", "dataset": "Train", "num_workers": 0})
    builder.info(0, {"kind": "loader", "dataset": "Validation", "num_workers": 2})
    builder.info(0, {"kind": "model", "parallel": "fsdp2"})
    builder.info(0, {"kind": "exit", "code": 1, "exception": "ValueError", "message": "x"})
    builder.exit(RankExit(rank=0, state="failed", at_s=5.0))

    facts = builder.build()

    assert facts.loader is not None
    assert (facts.loader.dataset, facts.cores_per_rank) == ("Train", 8)
    assert (facts.exits[0].exception, facts.exits[0].at_s) == ("ValueError: x", 5.0)


def test_the_loader_of_the_advice_is_the_one_that_is_trained_on():
    """A script may validate first; a number between two known ones is of a loader like the one before."""
    builder = JobFactsBuilder()
    for number, dataset in ((0, "Validation"), (1, "Train"), (4, "Validation")):
        builder.info(0, {"kind": "loader", "dataset": dataset, "number": number})

    first = builder.build().loader
    builder.info(0, {"kind": "training_loader", "number": 2})
    facts = builder.build()

    assert first == LoaderFacts(dataset="Validation", number=0)
    assert facts.loader == LoaderFacts(dataset="Train", number=1)
    assert [getattr(facts.loader_of(0, number), "number", None) for number in range(6)] == [0, 1, 1, 1, 4, 4]
    assert facts.loader_of(1, 0) is None


def test_what_a_rank_tells_of_its_exception_is_understood():
    """The words of the recorder's exit row are those that are read here: type with message, file, line and stack."""
    try:
        raise ValueError("no such shard")
    except ValueError as error:
        told = {"code": 1, **describe(error)}

    ended = RankExit.from_facts(0, "failed", told)

    assert ended.exception == "ValueError: no such shard"
    assert (ended.file, ended.code) == (__file__, 1)
    assert "raise ValueError" in (ended.stack or "")


def test_a_rank_that_was_killed_while_it_failed_has_no_exit_code():
    """A signal replaces the exit status that the rank reported before."""
    builder = JobFactsBuilder(2)
    told = {"code": 1, "exception": "RuntimeError", "message": "Connection closed by peer"}
    builder.info(0, {"kind": "exit", **told})
    builder.exit(RankExit.from_facts(0, "killed", {**told, "signal": 15}))

    ended = builder.build().exits[0]

    assert (ended.signal, ended.code, ended.exception) == (15, None, "RuntimeError: Connection closed by peer")


def test_the_last_step_of_a_silent_rank_is_that_of_its_rows():
    """A rank of another host that lost its connection reports nothing; its rows show its last step."""
    builder = JobFactsBuilder(2)
    builder.exit(RankExit(rank=1, state="lost", host="node7", unsent=True))

    finding = rank_lost(builder.build([120, 99]))

    assert "after step 99 had arrived" in finding.summary
    assert finding.headline == "Rank 1 lost its connection after step 99"
    assert finding.evidence["last_step"] == 99
    assert "before a step had arrived" in rank_lost(builder.build([120, -1])).summary


@pytest.mark.parametrize("unsent", [True, False])
def test_what_a_lost_host_still_has_is_stored_there(unsent):
    """Its memory has the last rows, unless its flight files were read."""
    lost = RankExit(rank=1, state="lost", host="node7", host_lost="its agent was lost", last_step=7, unsent=unsent)

    finding = rank_lost(JobFacts(exits=(lost,)))

    assert ("`traceml sync` there stores what had not arrived" in finding.next) is unsent
    assert ("after step 7 had arrived" in finding.summary) is unsent


def test_a_process_that_is_gone_is_no_silent_host():
    """If the process is known to have ended, the advice does not mention the network."""
    gone = RankExit.from_facts(1, "lost", {"process_gone": True, "open_step": 7, "open_phase": "backward"}, "node7")

    finding = rank_lost(JobFacts(exits=(gone,)))

    assert "ended without a report" in finding.summary
    assert "in step 7, in backward" in finding.summary
    assert "out-of-memory" in finding.next
    assert "network" not in finding.next


def test_lost_ranks_are_named_in_order():
    """Ranks with the same cause are reported together, whichever ended first."""
    exits = tuple(RankExit(rank=rank, state="failed", code=1, at_s=9.0 - rank) for rank in range(3))

    assert rank_lost(JobFacts(exits=exits)).ranks == (0, 1, 2)


def test_a_rank_that_missed_its_peer_is_not_the_cause_of_its_end():
    """Both were ended by signals that end whole jobs; the one whose collective failed is a consequence."""
    gone = "RuntimeError: Connection closed by peer"
    exits = [
        RankExit(rank=0, state="killed", signal=15, exception=gone, at_s=1.0),
        RankExit(rank=1, state="killed", signal=1, at_s=2.0),
    ]

    assert [ended.rank for ended in root_causes(exits)] == [1]


def test_a_rank_that_was_killed_while_it_ended_well_is_lost():
    """The rank reported exit status 0 before the signal, in either order of reading."""
    builder = JobFactsBuilder()
    builder.exit(RankExit(rank=0, state="killed", signal=9))

    builder.info(0, {"kind": "exit", "code": 0, "last_step": 58})

    [ended] = builder.build().exits
    assert (ended.state, ended.signal, ended.code, ended.last_step) == ("killed", 9, None, 58)


@pytest.mark.parametrize(("row", "ends"), [({"code": 0}, False), ({"code": 3}, True), ({"exception": "E"}, True)])
def test_a_script_that_ended_well_is_no_end_of_its_process(row, ends):
    """A thread may keep the process, or a function that is called at its end; then it hangs there."""
    builder = JobFactsBuilder(2)
    builder.info(0, {"kind": "exit", **row})
    assert bool(builder.build().exits) is ends

    builder.exit(RankExit(rank=0, state="finished", code=0))
    assert len(builder.build().exits) == 1


@pytest.mark.parametrize(
    ("place", "says", "advises"),
    [
        ({"file": "a.py", "line": 7, "function": "f"}, "exit code 3 at a.py:7 f, before", "leads to a.py:7 f"),
        ({}, "exit code 3, before", "Read rank 1's output"),
    ],
)
def test_an_exit_with_a_number_names_its_line(place, says, advises):
    """Where it is known: a program that the rank became has none."""
    finding = rank_lost(JobFacts(exits=(RankExit(rank=1, state="failed", code=3, **place),)))

    assert says in finding.summary
    assert advises in finding.next


@pytest.mark.parametrize("value", ["no", [], {}, b"x", float("inf")])
@pytest.mark.parametrize("name", ["at_s", "signal", "code", "last_step", "open_step", "step", "saved_steps"])
def test_a_number_that_is_none_is_left_out(name: str, value: object) -> None:
    """As of a script that has replaced `time.time`, or a row of another program: the report is made all the same."""
    if (name, value) != ("at_s", float("inf")):
        assert RankExit.from_facts(0, "finished", {"code": 0, name: value}) in (
            RankExit(rank=0, code=0),
            RankExit(rank=0),
        )


def test_a_text_that_is_none_is_left_out() -> None:
    """Nothing is said of it."""
    garbage = {"exception": 5, "file": 3, "seen": [], "open_phase": 7, "scheduler": {}}

    assert RankExit.from_facts(0, "failed", {"code": 1, **garbage}) == RankExit(rank=0, state="failed", code=1)
