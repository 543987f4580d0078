"""Jobs that another process ended as a whole: who it was, what is lost, and ends that are none of it."""

from __future__ import annotations

import signal

import pytest

from traceml.diagnosis.deaths.lost_ranks import rank_lost
from traceml.diagnosis.facts.ends import EndingSignal, RankExit, ending_signal_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.kinds import Kind, Severity

AT_S = 1_000_000.0
SLURM = EndingSignal(15, AT_S, "slurmstepd", 812, 3.0)


def swept(rank: int, **facts: object) -> RankExit:
    """Return the end of a rank to which its launcher passed SIGTERM on."""
    usual = {"state": "killed", "signal": 15, "last_step": 811, "open_step": 812, "stopped": True}
    return RankExit(rank=rank, **{**usual, **facts})  # type: ignore[arg-type]


def job(*exits: RankExit, by: EndingSignal | None = SLURM, **facts: object) -> JobFacts:
    return JobFacts(world_size=2, exits=exits, ended_by=by, **facts)  # type: ignore[arg-type]


def test_who_ended_the_job_is_reported_with_the_lost_steps() -> None:
    """Program, process and signal; no rank is blamed."""
    finding = rank_lost(job(swept(0, saved_steps=700, open_phase="forward"), swept(1)))

    assert finding.summary == (
        "SIGTERM from slurmstepd (process 812) ended the job, in step 812, in forward; 112 steps since the last "
        "checkpoint are lost."
    )
    assert (finding.kind, finding.severity, finding.ranks) == (Kind.RANK_LOST, Severity.CRITICAL, ())
    assert finding.headline == "The job was ended from outside by SIGTERM at step 812"
    assert "sacct" in finding.next
    assert finding.evidence["lost_steps"] == 112


@pytest.mark.parametrize(
    ("phase", "words"),
    [("forward", "in step 812, in forward."), ("backward", "in step 812."), (None, "in step 812, in f")],
)
def test_the_phase_of_one_rank_is_not_that_of_the_job(phase: str | None, words: str) -> None:
    """The rank that came furthest tells the step."""
    ends = swept(0, open_phase="forward"), swept(1, open_phase=phase, last_step=810)
    for facts in (job(*ends), job(*ends, by=SLURM._replace(scheduler="preempted"))):
        assert words in rank_lost(facts).summary

    evaluates = swept(0, open_phase="evaluation"), swept(1, open_phase=phase, last_step=810)
    assert "after step 811" in rank_lost(job(*evaluates)).summary


@pytest.mark.parametrize(
    ("open_s", "wall_s", "phase", "told"),
    [(211.0, 900.0, "other", True), (50.0, 900.0, "other", False), (211.0, 90_000.0, "other", False),
     (211.0, 900.0, "backward", False)],
    ids=["waited", "not for long", "steps that may take as long", "all wait"],
)  # fmt: skip
def test_a_rank_that_had_waited_for_another_one_is_told(open_s: float, wall_s: float, phase: str, told: bool) -> None:
    """The job seemed to hang, and was ended by hand: rank 1 had left the loop, and evaluated."""
    waits = swept(0, open_phase="backward", open_s=open_s)
    elsewhere = swept(1, open_phase=phase, open_step=811, open_s=open_s, seen="train.py:7 final")
    finding = rank_lost(job(waits, elsewhere, time=RunTime(wall_s=wall_s)))

    words = " Rank 0 had been in step 812 for 3:31; meanwhile rank 1 was in code outside the known phases, last seen at"
    assert (words in finding.summary) is told
    assert ("meanwhile" in finding.summary) is told


def test_the_usual_step_of_a_script_that_counts_on_is_that_of_the_run() -> None:
    """It resumed at step 800: each of its 12 steps took a minute."""
    waits = swept(0, open_phase="backward", open_s=211.0)
    elsewhere = swept(1, open_phase="other", open_step=811, open_s=211.0, seen="train.py:7 final")

    finding = rank_lost(job(waits, elsewhere, time=RunTime(wall_s=720.0), first_step=800))

    assert "meanwhile" not in finding.summary


def test_a_killed_launcher_takes_its_ranks_along() -> None:
    """How they ended, nobody has seen; the last beat of their recorders is older than the launcher's death."""
    ends = (RankExit(rank=rank, state="lost", last_step=811, at_s=AT_S - 3, process_gone=True) for rank in range(2))
    finding = rank_lost(job(*ends, by=EndingSignal(0, AT_S, launcher_pid=77)))

    assert finding.summary.startswith(
        "The job's launcher (process 77) was killed or crashed, and the job ended with it"
    )
    assert finding.headline.startswith("The job ended with its killed launcher")
    assert (finding.ranks, finding.evidence["launcher_pid"], finding.evidence.get("signal")) == ((), 77, None)
    assert finding.next.endswith("Save checkpoints often, and resume from the last one.")


@pytest.mark.parametrize(
    "end",
    [RankExit(rank=0, last_step=99), RankExit(rank=0, state="killed", signal=9, at_s=AT_S - 9)],
    ids=["finished", "killed before"],
)
def test_a_launcher_that_is_killed_after_its_ranks_is_no_cause(end: RankExit) -> None:
    """They had ended already."""
    found = rank_lost(job(end, by=EndingSignal(0, AT_S, launcher_pid=77)))

    assert found is None or "launcher_pid" not in found.evidence


@pytest.mark.parametrize(("state", "is_told"), [("running", False), ("lost", True)])
def test_ranks_that_outlive_their_launcher_are_not_lost(state: str, is_told: bool) -> None:
    """A script that handles SIGTERM goes on, at least until its checkpoint is saved."""
    found = rank_lost(job(by=EndingSignal(0, AT_S, launcher_pid=77), state=state))

    assert (found is not None) is is_told


@pytest.mark.parametrize(
    ("number", "before_s", "words"),
    [
        (15, 1.2, "SIGTERM from slurmstepd (process 812) ended the job"),
        (15, 30.0, "Rank 1 was killed by signal 15"),
        (9, 1.2, "Rank 1 was killed by signal 9"),
        (None, 1.2, "SIGTERM from slurmstepd (process 812) ended the job"),
        (None, 30.0, "Rank 1 lost its connection without a report"),
    ],
)
def test_a_rank_that_got_the_signal_before_its_launcher_is_no_cause(
    number: int | None, before_s: float, words: str
) -> None:
    """A scheduler signals all processes of a job, within seconds. What killed a rank otherwise, or earlier, did.

    Of a rank without a report only the last beat is known, which is older than its end.
    """
    state = "lost" if number is None else "killed"
    first = RankExit(rank=1, state=state, signal=number, last_step=811, open_step=812, at_s=AT_S - before_s)
    finding = rank_lost(job(swept(0), first))

    assert finding.summary.startswith(words)


def test_a_job_that_saved_all_steps_is_not_told_to_save() -> None:
    """It saved on the signal, and was advised to do so."""
    finding = rank_lost(job(swept(0, saved_steps=812), swept(1)))

    assert finding.evidence["lost_steps"] == 0
    assert finding.next.endswith("TIMEOUT). Resume from the checkpoint, which has all steps.")


@pytest.mark.parametrize(
    ("by", "words", "advice"),
    [
        (EndingSignal(15, AT_S, "timeout", 9), "from timeout (process 9)", "more time"),
        (EndingSignal(15, AT_S, "bash", 9), "from bash (process 9)", "kill command"),
        (EndingSignal(15, AT_S, "res", 9), "from res (process 9)", "Ask the scheduler"),
        (EndingSignal(15, AT_S, "restart.sh", 9), "from restart.sh (process 9)", "kill command"),
        (EndingSignal(15, AT_S, "init_job.sh", 9), "from init_job.sh (process 9)", "kill command"),
        (EndingSignal(15, AT_S, "", 9), "from a program that has ended (process 9)", "kill command"),
        (EndingSignal(15, AT_S, "", 0), "from outside the container", "preempted node"),
        (EndingSignal(15, AT_S), "from another process", "kill command"),
        (EndingSignal(1, AT_S), "SIGHUP from another process", "kill command"),
        (EndingSignal(1, AT_S, from_terminal=True), "SIGHUP from the terminal", "tmux"),
        (EndingSignal(15, AT_S, "systemd-oomd", 1), "from systemd-oomd", "memory"),
    ],
)
def test_the_sender_decides_the_advice(by: EndingSignal, words: str, advice: str) -> None:
    """What is not known of it is not said."""
    finding = rank_lost(job(swept(0), swept(1), by=by))

    assert words in finding.summary
    assert advice in finding.next


def test_a_script_that_returned_by_itself_is_a_warning() -> None:
    """It handled the signal and saved; nothing is lost."""
    ends = (RankExit(rank=rank, last_step=99, saved_steps=100) for rank in range(2))
    finding = rank_lost(job(*ends))

    assert finding.severity is Severity.WARNING
    assert finding.summary == (
        "SIGTERM from slurmstepd (process 812) asked the job to end, and it exited on its own, 3.0 s later, after step "
        "99."
    )


def test_a_script_that_ignored_the_signal_ended_by_itself() -> None:
    """It trained on to its end."""
    assert rank_lost(job(RankExit(rank=0, last_step=99), by=SLURM._replace(waited_s=7200.0))) is None


def test_the_status_of_a_handler_is_no_cause() -> None:
    """A script that exits with a code of its own after the signal was ended by the signal."""
    finding = rank_lost(job(RankExit(rank=0, state="failed", code=1, last_step=5, at_s=AT_S + 2)))

    assert finding.evidence["cause"] == "ended_from_outside"


@pytest.mark.parametrize(
    "facts",
    [
        job(RankExit(rank=0, state="failed", code=1, exception="KeyError: 3", at_s=AT_S - 9), swept(1)),
        job(RankExit(rank=0, state="killed", signal=9, oom="group", at_s=AT_S - 20), swept(1)),
        job(swept(0, at_s=AT_S), swept(1, at_s=AT_S), job_end_s=AT_S),
    ],
    ids=["exception before", "out of memory before", "time limit"],
)
def test_what_came_before_is_the_cause(facts: JobFacts) -> None:
    """Who ends a job that has failed is not its cause; a known limit says more."""
    finding = rank_lost(facts)

    assert finding.evidence.get("cause") != "ended_from_outside"


def test_ctrl_c_and_a_normal_end_are_no_finding() -> None:
    """A user who stops a job knows it."""
    interrupted = tuple(swept(rank, signal=2) for rank in range(2))

    assert rank_lost(job(*interrupted, by=None)) is None
    assert rank_lost(job(RankExit(rank=0, last_step=99), by=None)) is None


@pytest.mark.parametrize("facts", [None, {}, {"signal": 2, "time": 1.0}, {"signal": "15"}, [15]])
def test_reports_without_an_ending_signal(facts: object) -> None:
    """Another signal, or another form."""
    assert ending_signal_of(facts) is None


def test_a_report_is_read() -> None:
    """As `traceml run` sends it; what it does not know is missing."""
    told = {"signal": int(signal.SIGTERM), "time": AT_S, "sender": "slurmstepd", "sender_pid": 812, "waited_s": 3}

    assert ending_signal_of(told) == SLURM
    assert ending_signal_of({"signal": 1, "time": AT_S}) == EndingSignal(1, AT_S)
    assert ending_signal_of({"launcher_pid": 7, "time": AT_S}) == EndingSignal(0, AT_S, launcher_pid=7)


def test_what_the_scheduler_said_is_read() -> None:
    """What is no reason of a scheduler, or no limit, is left out."""
    told = {"signal": 15, "time": AT_S, "scheduler": "time_limit", "limit_s": 1800}

    assert ending_signal_of(told) == EndingSignal(15, AT_S, scheduler="time_limit", limit_s=1800.0)
    assert ending_signal_of(told | {"limit_s": -1}) == EndingSignal(15, AT_S, scheduler="time_limit")
    assert ending_signal_of(told | {"scheduler": "mood"}) == EndingSignal(15, AT_S)


def test_a_script_that_saved_at_its_limit_is_a_warning() -> None:
    """It returned by itself, after a signal whose reason the scheduler told."""
    finding = rank_lost(job(RankExit(rank=0, last_step=99), by=SLURM._replace(scheduler="time_limit")))

    assert finding.severity is Severity.WARNING
    assert finding.next.startswith("Ask for more time")


def test_a_host_that_was_given_up_is_reported() -> None:
    """The launcher lost its agent; how its ranks ended then says nothing."""
    ends = (RankExit(rank=rank, state="lost", process_gone=True, host_lost="its agent was lost") for rank in range(2))
    finding = rank_lost(JobFacts(world_size=2, exits=tuple(ends)))

    assert finding.summary.startswith("Ranks 0, 1 were lost with their host: its agent was lost")
    assert "silent for 15 s" in finding.next
