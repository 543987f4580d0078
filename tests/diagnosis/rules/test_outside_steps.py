"""Findings about the parts of the run's wall time outside the steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from tests.diagnosis.fabricated import Job, adds, window_of
from tests.diagnosis.hangs import standing
from tests.diagnosis.hangs.standing import line, snapshot
from traceml.database.schema import IMPORTING
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.run_time import EvaluationParts, RunTime
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts, ModelFacts
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)
NO_STEPS = window_of(ALONE).select(np.zeros(len(window_of(ALONE)), bool))


def findings(wall_s: float, *faults, lines=(), evaluations=0, waited_s=0.0, run_s=0.0, ranks=1, **parts: float):
    time = RunTime.of(wall_s, parts, evaluations)
    facts = JobFacts(
        time=time, lines=lines, startup_wait_s=waited_s, startup_run_s=run_s, world_size=ranks, state="finished"
    )
    return diagnose(window_of(ALONE, *faults), facts)


def line_of(part: str, function: str, samples: int) -> SampledLine:
    return SampledLine(0, part, "/x/train.py", 7, function, None, samples)


def test_a_run_of_steps_says_nothing_about_its_time():
    """Nearly all of the time is steps."""
    (found,) = findings(100.0, startup=5.0, steps=93.0, idle=2.0)

    assert "run's time" not in found.summary


def test_a_verdict_on_steps_says_what_it_covers():
    """Steps are fine, and less than half of the run."""
    found = findings(100.0, startup=10.0, steps=45.0, evaluation=20.0, idle=25.0)[0]

    assert found.kind in (Kind.HEALTHY, Kind.COMPUTE_BOUND)
    assert "they take 45 % of the run's time" in found.headline
    assert "The rest of the run's 1:40: after the last step 25 %, evaluation 20 %." in found.summary


@pytest.mark.parametrize(
    ("share_read", "state", "is_told"), [(0.0, "running", False), (0.9, "running", True), (0.0, "finished", True)]
)
def test_a_time_that_was_read_before_the_steps_is_not_told(share_read: float, state: str, is_told: bool) -> None:
    """It is a few seconds old while a run is in progress, and soon after the start-up had hardly any of the steps."""
    window = window_of(ALONE)
    read_s = share_read * float(window.total.sum()) / 1e9
    time = RunTime.of(read_s + 100.0, {"startup": 100.0, "steps": read_s})
    found = diagnose(window, JobFacts(time=time, world_size=1, state=state))[0]

    assert ("of the run's time" in found.headline) is is_told
    assert ("The rest of the run's" in found.summary) is is_told


@pytest.mark.parametrize(
    ("wall_s", "steps", "after", "is_told"),
    [
        (100.0, 25.0, "evaluate", True),
        (100.0, 55.0, "evaluate", False),  # more than that in steps
        (10.0, 2.5, "evaluate", False),  # 4 s
        (100.0, 25.0, None, False),  # as the end of a process, or the time in which a person reads a notebook
    ],
)
def test_code_after_the_last_step_is_named(wall_s, steps, after, is_told):
    """It is the verdict where it takes more of the run than the steps."""
    lines = (*(line_of("after", each, 97) for each in [after] if each), line_of("other", "main", 40))

    found = findings(wall_s, lines=lines, startup=0.6 * wall_s - steps, steps=steps, idle=0.4 * wall_s)
    told = [each for each in found if each.kind is Kind.AFTER_STEPS]

    assert (found[0].kind is Kind.AFTER_STEPS, bool(told)) == (is_told, is_told)
    if is_told:
        assert found[0].headline == "40 % of the run's time is after the last step, mostly at train.py:7 evaluate"
        assert "40 s of the run's 1:40 (40 %) passed after the last step, all of it in train.py:7" in found[0].summary
        assert found[0].next.startswith("Look at train.py:7 evaluate: make it cheaper")
        assert found[0].speedup_if_fixed == pytest.approx(1 / 0.6)


@pytest.mark.parametrize(
    ("state", "open_step", "told"), [("failed", 100, False), ("failed", 99, True), ("finished", 100, True)]
)
def test_the_step_in_which_a_run_ends_is_no_code_after_it(state: str, open_step: int, told: bool) -> None:
    """It waited for ranks whose data had ended until the time limit of a collective, after its last whole step."""
    time = RunTime.of(100.0, {"startup": 30.0, "steps": 20.0, "idle": 50.0})
    lines = (line_of("after", "main", 97), line_of("other", "main", 40))
    end = RankExit(rank=0, state="failed", exception="RuntimeError: Timed out", last_step=99, open_step=open_step)
    facts = JobFacts(time=time, lines=lines, state=state, exits=(end,))

    assert any(each.kind is Kind.AFTER_STEPS for each in diagnose(window_of(ALONE), facts)) is told


@pytest.mark.parametrize("hangs", [True, False])
def test_a_hang_between_two_steps_is_no_code_after_the_last_one(hangs: bool) -> None:
    """The line that makes no progress is the hang's, and the training had not ended."""
    time = RunTime.of(100.0, {"startup": 30.0, "steps": 20.0, "idle": 50.0})
    seen = [snapshot(0, line(6, "save"), wchan="futex_do_wait")] if hangs else []
    lines = (line_of("after", "save", 97), line_of("other", "main", 40))
    job = structs.replace(standing.facts(seen, ranks=1, state="failed"), time=time, lines=lines)
    kinds = [each.kind for each in diagnose(window_of(ALONE), job)]

    assert (Kind.HANG in kinds, Kind.AFTER_STEPS in kinds) == (hangs, not hangs)


def test_code_after_the_last_step_comes_before_causes_in_fewer_steps():
    """The steps lack a core, or wait for data, and are less than what follows them."""
    lines = (line_of("after", "plot", 97), line_of("other", "main", 40))
    contended = {"wait_of_ready_time": {0: 0.5}}
    time = RunTime.of(100.0, {"startup": 20.0, "steps": 30.0, "idle": 50.0})
    steps = RunTime.of(100.0, {"startup": 20.0, "steps": 75.0, "idle": 5.0})

    for faults in ([], [adds("input_wait", 40.0)]):
        window, known = window_of(ALONE, *faults), {} if faults else contended
        told, untold = (diagnose(window, JobFacts(time=each, lines=lines, **known)) for each in (time, steps))
        cause = Kind.INPUT_BOUND if faults else Kind.CPU_CONTENTION

        assert [each.kind for each in told[:2]] == [Kind.AFTER_STEPS, cause]
        assert untold[0].kind is cause


@pytest.mark.parametrize(
    ("wall_s", "startup", "severity", "place"),
    [(20.0, 8.0, "info", 1), (200.0, 80.0, "warning", 0), (10.0, 4.0, None, None), (1000.0, 80.0, None, None)],
)
def test_a_long_start_up_is_reported(wall_s, startup, severity, place):
    """From 5 s and a quarter of the run; it is the verdict from a minute on."""
    found = findings(wall_s, startup=startup, steps=wall_s - startup)
    kinds = [finding.kind for finding in found]

    if severity is None:
        assert Kind.STARTUP not in kinds
    else:
        assert kinds.index(Kind.STARTUP) == place
        assert found[place].severity == severity


@pytest.mark.parametrize(("steps", "words"), [(0.0, "No training step was seen up to"), (1.0, "Training began")])
def test_a_training_that_has_not_begun_did_not_begin(steps, words):
    """A job may be ended, or hang, before its first step."""
    facts = JobFacts(time=RunTime.of(80.0 + steps, {"startup": 80.0, "steps": steps}), state="stopped")
    (found,) = (each for each in diagnose(window_of(ALONE), facts) if each.kind is Kind.STARTUP)

    assert f"{words} 80 s after the start" in found.summary


@pytest.mark.parametrize(("state", "reported"), [("running", True), ("failed", True), ("finished", False)])
def test_a_script_that_ended_well_without_a_step_had_no_long_start_up(state, reported):
    """It trains without gradients, as by evolution strategies, or in another way that is not recognized."""
    facts = JobFacts(time=RunTime.of(80.0, {"startup": 80.0}), state=state)
    kinds = [each.kind for each in diagnose(window_of(replace(ALONE, steps=0)), facts)]

    assert (Kind.STARTUP in kinds) is reported


@pytest.mark.parametrize(
    ("state", "part", "reported"),
    [
        ("running", "startup", True),
        ("running", "input_wait", True),
        ("running", "other", False),
        ("running", "forward", False),
        ("failed", "other", True),
    ],
)
def test_a_training_in_its_first_step_has_begun(state, part, reported):
    """Steps of a minute, or a first one that compiles, are no start-up that goes on; waiting for the first batch is."""
    lines = (line_of("startup", "load", 30), line_of(part, "main", 50))
    facts = JobFacts(time=RunTime.of(80.0, {"startup": 80.0}), state=state, lines=lines)
    kinds = [each.kind for each in diagnose(window_of(replace(ALONE, steps=0)), facts)]

    assert (Kind.STARTUP in kinds) is reported


def test_a_run_without_steps_names_its_line():
    """A script that only infers, or prepares data, spends its time somewhere, too."""
    lines = (
        SampledLine(0, "startup", "/x/infer.py", 12, "tokenize", None, 80),
        SampledLine(0, "startup", "/x/infer.py", 1, "<module>", None, 20),
    )
    facts = JobFacts(time=RunTime.of(80.0, {}), state="finished", lines=lines)
    (found,) = diagnose(window_of(replace(ALONE, steps=0)), facts)

    assert found.kind is Kind.INSUFFICIENT_DATA
    assert found.headline == "No training step was seen; most of the time is in infer.py:12 tokenize"
    assert "80 % of the run's time is in infer.py:12 tokenize." in found.summary
    imports = SampledLine(0, "startup", "/x/infer.py", 1, "<module>", f"{IMPORTING}:1165 _find_and_load", 100)
    (beside, *_) = diagnose(window_of(replace(ALONE, steps=0)), structs.replace(facts, lines=(imports, *lines)))
    assert (
        "Beside imports, which take 50 % of the run's time, 80 % of the rest is in infer.py:12 tokenize."
        in beside.summary
    )
    assert found.next.startswith("If the run should be faster, look at infer.py:12 tokenize.")
    assert (found.evidence["line"], found.evidence["function"]) == (12, "tokenize")


def test_a_start_up_names_its_line():
    """Half of the samples before the first step."""
    lines = (
        SampledLine(0, "startup", "/x/train.py", 12, "tokenize", None, 80),
        SampledLine(0, "startup", "/x/train.py", 1, "<module>", None, 20),
    )

    found = next(each for each in findings(200.0, startup=90.0, steps=110.0, lines=lines) if each.kind is Kind.STARTUP)

    assert (found.evidence["line"], found.evidence["function"]) == (12, "tokenize")
    assert "train.py:12 tokenize" in found.summary
    assert found.headline == "45 % of the run's time is start-up, before the first step"


def test_a_start_up_of_imports_is_reported_as_such():
    """Nobody can cache the result of an import, nor do it beside the training."""
    lines = (
        SampledLine(0, "startup", "/x/train.py", 1, "<module>", f"{IMPORTING}:1165 _find_and_load", 60),
        SampledLine(0, "startup", "/x/train.py", 12, "tokenize", None, 40),
    )

    found = findings(20.0, startup=9.0, steps=11.0, lines=lines)[-1]

    assert found.kind is Kind.STARTUP
    assert found.summary.endswith("60 % of it in imports.")
    assert found.evidence["import_share"] == pytest.approx(0.6)
    assert "cache" not in found.next.lower()


def test_few_samples_of_a_start_up_are_enough_for_imports():
    """As of a run that was killed early: `import torch` has no result to cache."""
    lines = (SampledLine(0, "startup", "/x/train.py", 14, "<module>", f"{IMPORTING}:1165 _find_and_load", 25),)

    found = findings(20.0, startup=9.0, steps=11.0, lines=lines)[-1]

    assert found.summary.endswith("most of it in imports.")
    assert "import_share" not in found.evidence
    assert "cache" not in found.next.lower()


CHILD_ANSWER = "/usr/lib/python3.11/multiprocessing/connection.py:390 Connection._recv"


@pytest.mark.parametrize(
    ("file", "where"), [("/x/train.py", " in train.py:12 make_envs"), (None, "")], ids=["of the user", "of a library"]
)
def test_a_start_up_that_waits_for_child_processes_is_reported_as_such(file, where):
    """Environments in processes of their own import everything anew: nothing is there to cache."""
    place = (file, 12, "make_envs") if file else (None, None, None)
    lines = (
        SampledLine(0, "startup", "/x/train.py", 1, "<module>", f"{IMPORTING}:1165 _find_and_load", 30),
        SampledLine(0, "startup", *place, CHILD_ANSWER, 70),
    )

    found = findings(20.0, startup=9.0, steps=11.0, lines=lines)[-1]

    assert found.kind is Kind.STARTUP
    assert found.summary.endswith(f"70 % of it waiting for answers of child processes{where}.")
    assert found.evidence["child_wait_share"] == pytest.approx(0.7)
    assert "cache" not in found.next.lower()


@pytest.mark.parametrize(
    "library",
    [
        "/usr/lib/python3.11/multiprocessing/queues.py:113 Queue.get",
        "/usr/lib/python3.11/selectors.py:415 select",
        None,
    ],
)
def test_other_waiting_at_the_start_is_not_for_child_processes(library):
    """As for the first batch of loader workers, or a few answers during imports."""
    lines = (
        SampledLine(0, "startup", "/x/train.py", 12, "tokenize", library, 70),
        SampledLine(0, "startup", "/x/train.py", 13, "make_envs", CHILD_ANSWER, 30),
    )

    found = findings(20.0, startup=9.0, steps=11.0, lines=lines)[-1]

    assert "child processes" not in found.summary + found.next
    assert "child_wait_share" not in found.evidence


IMPORTS = (SampledLine(0, "startup", "/x/train.py", 1, "<module>", f"{IMPORTING}:1165 _find_and_load", 60),)


def test_imports_without_a_core_are_not_to_blame():
    """On a busy host they take long whatever is imported."""
    found = findings(20.0, startup=9.0, steps=11.0, lines=IMPORTS, waited_s=6.0)[-1]

    assert found.kind is Kind.STARTUP
    assert "It waited for a CPU core for 67 % of that." in found.summary
    assert found.evidence["core_wait_share"] == pytest.approx(2 / 3)
    assert "importtime" not in found.next
    assert found.next.endswith("With free cores the start-up takes about 3.0 s.")
    assert "ranks" not in found.next


def test_a_start_up_without_a_core_is_a_remark():
    """With free cores it would take 6 s: the verdict is about the steps."""
    found = findings(160.0, adds("other", 20.0), startup=80.0, steps=80.0, lines=IMPORTS, waited_s=74.0)

    assert [each.kind for each in found] == [Kind.RESIDUAL_HEAVY, Kind.STARTUP]
    assert found[-1].severity == "info"


def test_a_start_up_takes_what_it_ran():
    """The last reading before the first step may count waiting of that step: 62 s of 60 s."""
    found = findings(90.0, startup=60.0, steps=30.0, lines=IMPORTS, waited_s=62.0, run_s=5.0)[-1]

    assert found.next.endswith("With free cores the start-up takes about 5.0 s.")
    assert "92 % of that" in found.summary


def test_what_started_the_ranks_may_have_waited_too():
    """Its waiting is not counted, so the time that is left is a bound."""
    found = findings(90.0, startup=60.0, steps=30.0, lines=IMPORTS, waited_s=30.0, ranks=2)[-1]

    assert found.next.endswith("With free cores the start-up takes at most 30 s.")


def test_ranks_that_start_together_take_the_cores_of_each_other():
    """Fewer of them is then an advice too."""
    assert "fewer ranks" in findings(20.0, startup=9.0, steps=11.0, waited_s=6.0, ranks=4)[-1].next


def test_imports_that_had_their_core_are_told_to_be_fewer():
    """A little waiting is usual; a slow disk is no waiting for a core."""
    found = findings(20.0, startup=9.0, steps=11.0, lines=IMPORTS, waited_s=1.0)[-1]

    assert "CPU core" not in found.summary
    assert "importtime" in found.next


def test_own_code_that_lacked_a_core_is_still_named():
    """A cached result needs no core at all."""
    lines = (SampledLine(0, "startup", "/x/train.py", 12, "tokenize", None, 80),)
    found = findings(20.0, startup=9.0, steps=11.0, lines=lines, waited_s=6.0)[-1]

    assert "It waited for a CPU core" in found.summary
    assert "train.py:12 tokenize: cache its result" in found.next


def test_waiting_for_the_other_ranks_is_nothing_to_cache():
    """`init_process_group` returns when all ranks have come."""
    joins = "/lib/torch/distributed/distributed_c10d.py:1984 _new_process_group_helper"
    lines = (SampledLine(0, "startup", "/x/train.py", 8, "<module>", joins, 80),)
    found = findings(20.0, startup=9.0, steps=11.0, lines=lines, ranks=4)[-1]

    assert "all of it in train.py:8" in found.summary
    assert found.next.startswith("It waits there for the other ranks to join the process group")


@pytest.mark.parametrize(("rank_1", "says"), [(0, "63 % of it in train.py:12 download on rank 0"), (42, None)])
def test_a_start_up_that_one_rank_makes_long_names_what_it_does(rank_1: int, says: str | None) -> None:
    """Rank 1 waits in a barrier while rank 0 downloads; or it computes as long, each in a line of its own."""
    barrier = "/lib/torch/distributed/distributed_c10d.py:5283 barrier"
    lines = (
        SampledLine(0, "startup", "/x/train.py", 1, "<module>", f"{IMPORTING}:1165 _find_and_load", 25),
        SampledLine(0, "startup", "/x/train.py", 12, "download", None, 42),
        SampledLine(1, "startup", "/x/train.py", 1, "<module>", f"{IMPORTING}:1165 _find_and_load", 27),
        SampledLine(1, "startup", "/x/train.py", 16, "main", barrier, 40),
        SampledLine(1, "startup", "/x/train.py", 18, "prepare", None, rank_1),
    )

    found = findings(60.0, startup=29.0, steps=31.0, lines=lines, ranks=2)[-1]

    assert found.evidence.get("function") == ("download" if says else None)
    assert says is None or says in found.summary


def compiled(compile_s: float, startup_s: float, wall_s: float = 100.0, **parts: float):
    time = structs.replace(RunTime.of(wall_s, {"startup": startup_s, **parts}), compile_s=compile_s)
    lines = (SampledLine(0, "startup", "/x/train.py", 12, "tokenize", None, 80),)
    found = diagnose(window_of(ALONE), JobFacts(time=time, lines=lines))
    return next((each for each in found if each.kind is Kind.STARTUP), None)


def test_compiling_in_the_first_steps_is_reported_as_such():
    """No line of the user's is to blame, and the advice is on torch.compile."""
    found = compiled(42.0, 50.0, steps=50.0)

    assert found.headline == "50 % of the run's time is start-up, most of it torch.compile"
    assert found.summary == (
        "Start-up with the compilations of the first steps took 50 s: 50 % of the run's 1:40; torch.compile took 42 s "
        "of it."
    )
    assert "TORCHINDUCTOR_CACHE_DIR" in found.next
    assert found.evidence["compile_share"] == pytest.approx(0.84)
    assert "line" not in found.evidence


def test_what_first_steps_do_once_is_start_up():
    """Kernels that are built in the first forward, after imports of 6 s: these are not all of it."""
    time = structs.replace(RunTime.of(22.0, {"startup": 18.0, "steps": 4.0}), set_up_s=12.0)
    facts = JobFacts(time=time, lines=(SampledLine(0, "startup", "/x/train.py", 1, "<module>", IMPORTING, 80),))
    found = next(each for each in diagnose(window_of(ALONE), facts) if each.kind is Kind.STARTUP)

    assert found.headline == "82 % of the run's time is start-up, up to the end of the first steps"
    assert found.summary == (
        "Training began 6.0 s after the start, and the first steps took 12 s longer than the others: 82 % of the run's "
        "22 s."
    )
    assert found.evidence["set_up_s"] == 12.0


@pytest.mark.parametrize(
    ("first_data_s", "says"),
    [
        (15.0, "Training began 18 s after the start, after 15 s of waiting for data: 82 % of the run's 22 s."),
        (4.0, "Training began 18 s after the start: 82 % of the run's 22 s, 4.0 s of it waiting for data."),
        (0.1, "Training began 18 s after the start: 82 % of the run's 22 s, all of it in imports."),
    ],
)
def test_waiting_for_data_before_the_first_step_is_no_import(first_data_s: float, says: str):
    """A script that resumes skips batches which the loader makes; lines of the start-up are of the time before that."""
    time = structs.replace(RunTime.of(22.0, {"startup": 18.0, "steps": 4.0}), first_data_s=first_data_s)
    facts = JobFacts(time=time, lines=(SampledLine(0, "startup", "/x/train.py", 1, "<module>", IMPORTING, 80),))
    found = next(each for each in diagnose(window_of(ALONE), facts) if each.kind is Kind.STARTUP)

    assert found.summary == says
    assert ("skip_first_batches" in found.next) is (first_data_s == 15.0)
    assert ("waiting for data" in found.headline) is (first_data_s == 15.0)
    assert found.evidence.get("first_data_s") == (15.0 if first_data_s == 15.0 else None)


@pytest.mark.parametrize(("compile_s", "told"), [(0.0, False), (2.0, False), (6.0, True)])
def test_a_little_compiling_is_not_the_start_up(compile_s: float, told: bool):
    """Below a tenth the line is told instead; below a half the headline does not name it."""
    found = compiled(compile_s, 50.0, steps=50.0)

    assert ("torch.compile took" in found.summary) is told
    assert ("TORCHINDUCTOR" in found.next) is told
    assert "torch.compile" not in found.headline
    assert ("tokenize" in found.summary) is not told


def test_compiling_after_a_restart_is_no_start_up():
    """It is part of the restart."""
    found = compiled(9.0, 50.0, steps=30.0, restart=20.0)

    assert "torch.compile" not in found.summary


def test_a_few_imports_are_not_reported():
    """Most of the start-up is the user's own work."""
    lines = (
        SampledLine(0, "startup", "/x/train.py", 1, "<module>", f"{IMPORTING}:1165 _find_and_load", 40),
        SampledLine(0, "startup", "/x/train.py", 12, "tokenize", None, 60),
    )

    found = findings(20.0, startup=9.0, steps=11.0, lines=lines)[-1]

    assert "import" not in found.summary
    assert "train.py:12 tokenize" in found.next


def test_much_evaluation_is_reported_with_what_less_would_save():
    """12 times 5 s of 100: half as often saves 30 %."""
    found = findings(100.0, steps=38.0, evaluation=60.0, startup=2.0, evaluations=12)[0]

    assert (found.kind, found.severity) == (Kind.EVAL_HEAVY, "critical")
    assert "12 times 5.0 s" in found.summary
    assert "saves 30 %" in found.next
    assert found.speedup_if_fixed == pytest.approx(1 / 0.7)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("times", [5, 1])
def test_evaluation_that_the_training_may_learn_from_is_said_to_be(before: bool, times: int) -> None:
    """Pseudo-labels half as often are another training, also where most of the time comes once."""
    time = structs.replace(RunTime.of(100.0, {"steps": 60.0, "evaluation": 40.0}, times), evaluates_before=before)
    found = diagnose(window_of(ALONE), JobFacts(time=time, state="finished"))[0]

    assert found.kind is Kind.EVAL_HEAVY
    assert ("it is part of the training: make it cheaper instead." in found.next) is before


@pytest.mark.parametrize(("steps", "is_told"), [(9.0, True), (11.0, False)])
def test_evaluation_that_takes_longer_than_the_steps_is_heavy(steps: float, is_told: bool) -> None:
    """A short run may be mostly start-up, of which a longer one has less."""
    found = findings(50.0, evaluations=10, startup=40.0 - steps, steps=steps, evaluation=10.0)

    assert (found[0].kind is Kind.EVAL_HEAVY) is is_told
    assert any("that saves 10 % of the run" in each.next for each in found) is is_told


@pytest.mark.parametrize("library", ["/lib/torch/nn/modules/linear.py:130 forward", "/lib/matplotlib/text.py:1 draw"])
def test_what_follows_an_evaluation_is_told_apart_by_its_line(library: str):
    """Plots and metrics of an evaluation, up to the next training: larger batches do not help."""
    lines = (SampledLine(0, "outside", "/me/train.py", 15, "finish_epoch", library, 80),)
    found = findings(100.0, lines=lines, steps=38.0, evaluation=60.0, startup=2.0, evaluations=12)[0]
    is_model = "/torch/" in library

    assert found.headline == "60 % of the run's time is evaluation, mostly at train.py:15 finish_epoch"
    assert ("with what follows until the training continues" in found.summary) is not is_model
    assert ("larger ones, without gradients (torch.no_grad())" in found.next) is is_model
    assert found.next.startswith(
        "Evaluate half" if is_model else "Make train.py:15 finish_epoch cheaper, or run it half"
    )
    assert "saves 30 %" in found.next


WAITS_FOR_WORKERS = "/lib/selectors.py:402 _PollLikeSelector.select"


@pytest.mark.parametrize(
    ("trains", "library", "advice"),
    [
        (
            True,
            WAITS_FOR_WORKERS,
            "make val.py:9 Images.__getitem__ cheaper, or evaluate half as often: that saves 30 %",
        ),
        (False, WAITS_FOR_WORKERS, "there if there are cores for them, or make val.py:9 Images.__getitem__ cheaper."),
        (True, "/lib/matplotlib/text.py:1 draw", "Make train.py:15 finish cheaper, or run it half as often"),
    ],
)
def test_an_evaluation_that_waits_for_its_loader_is_told_so(trains: bool, library: str, advice: str) -> None:
    """Its line is that of its loop, in which nothing can be made cheaper."""
    time = RunTime.of(100.0, {"steps": 38.0 * trains, "evaluation": 60.0, "startup": 2.0}, 12)
    loaders = [LoaderFacts(dataset="Images", length=length, num_workers=1, number=n) for n, length in ((0, 9), (1, 5))]
    made = SampledLine(0, "workers", "/me/val.py", 9, "Images.__getitem__", None, 60)
    facts = JobFacts(
        time=time,
        lines=(SampledLine(0, "outside", "/me/train.py", 15, "finish", library, 80),),
        loader=loaders[0] if trains else loaders[1],
        loaders={0: loaders},
        lines_of_workers={1: (made,)},
        state="finished",
    )

    found = diagnose(window_of(ALONE) if trains else NO_STEPS, facts)

    (told,) = (each.next for each in found if each.kind == Kind.EVAL_HEAVY)
    assert advice in told
    assert told.startswith("It waits for the worker of its DataLoader: set a larger num_workers") is (
        library == WAITS_FOR_WORKERS
    )


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("evaluated", [5, 9])
def test_workers_of_an_evaluation_are_to_be_kept(persistent: bool, evaluated: int) -> None:
    """Each validation starts them anew otherwise, which takes longer than its batches do.

    Its loader may be one like the training's, with as much data.
    """
    time = RunTime.of(100.0, {"steps": 40.0, "evaluation": 60.0}, 12)
    loaders = [
        LoaderFacts(dataset="Images", length=length, num_workers=2, number=n, persistent_workers=persistent)
        for n, length in ((0, 9), (1, evaluated))
    ]
    facts = JobFacts(
        time=time,
        lines=(SampledLine(0, "outside", "/me/train.py", 15, "validate", WAITS_FOR_WORKERS, 80),),
        loader=loaders[0],
        loaders={0: loaders},
        lines_of_workers={1: (SampledLine(0, "workers", "/me/val.py", 9, "Images.__getitem__", None, 60),)},
        state="finished",
    )

    found = diagnose(window_of(ALONE), facts)[0]

    assert found.kind is Kind.EVAL_HEAVY
    assert (
        "keep them from one evaluation to the next (persistent_workers=True), make val" in found.next
    ) is not persistent


@pytest.mark.parametrize(("workers", "persistent", "told"), [(2, False, True), (2, True, False), (0, False, False)])
def test_workers_that_live_for_one_evaluation_are_to_be_kept(workers: int, persistent: bool, told: bool) -> None:
    """They are gone before they are seen to make batches; the training's loader has none."""
    time = RunTime.of(100.0, {"steps": 40.0, "evaluation": 60.0}, 12)
    loaders = [
        LoaderFacts(dataset="Images", length=900, num_workers=0, number=0),
        LoaderFacts(dataset="Val", length=9, num_workers=workers, number=1, persistent_workers=persistent),
    ]
    facts = JobFacts(
        time=time,
        lines=(SampledLine(0, "outside", "/me/train.py", 15, "validate", WAITS_FOR_WORKERS, 80),),
        loader=loaders[0],
        loaders={0: loaders},
        state="finished",
    )

    found = diagnose(window_of(ALONE), facts)[0]

    assert found.kind is Kind.EVAL_HEAVY
    assert ("which start for each evaluation: keep them from one evaluation to the next" in found.next) is told
    assert ("larger num_workers" in found.next) is (workers > 0 and persistent)


EVALUATED = "Val is read there by the process itself (num_workers=0): set num_workers=2"


@pytest.mark.parametrize(
    ("waits", "loader", "trains", "advice"),
    [
        (
            0.9,
            {},
            True,
            f"{EVALUATED} and persistent_workers=True for its DataLoader; that saves at most 29 % of the run",
        ),
        (0.9, {}, False, f"{EVALUATED} for its DataLoader; that saves at most 29 % of the run on 2 cores. Or make"),
        (0.9, {"num_workers": 2}, True, "Make train.py:7 decode cheaper, or run it half as often"),
        (0.9, {"in_memory": True, "batch_size": 10_000}, True, "Val is in memory: take whole batches by indexing its"),
        (0.3, {}, True, "Make train.py:7 decode cheaper, or run it half as often"),
        (
            0.9,
            {"library": "/lib/threading.py:327 Condition.wait"},
            True,
            "Make train.py:7 decode cheaper, or run it half",
        ),
    ],
)
def test_an_evaluation_that_reads_its_data_itself_is_told_to_use_workers(waits, loader, trains, advice):
    """Also where a function that the data set calls has the time, whose caller the samples do not show."""
    parts = EvaluationParts(input_share=waits, forward_share=0.05, batch_ns=1e8, batches=50.0)
    seconds = {"steps": 38.0 * trains, "evaluation": 60.0, "startup": 40.0 - 38.0 * trains}
    time = structs.replace(RunTime.of(100.0, seconds, 12 if trains else 1), evaluation_parts=parts)
    library = loader.get("library")
    loader = {name: value for name, value in loader.items() if name != "library"}
    val = LoaderFacts(**{"dataset": "Val", "num_workers": 0, "number": 1, **loader})
    train = LoaderFacts(dataset="Train", num_workers=0, number=0)
    facts = JobFacts(
        time=time,
        lines=(structs.replace(line_of("outside", "decode", 80), library=library),),
        loader=train if trains else val,
        loaders={0: [train, val] if trains else [val]},
        hosts={0: "here"},
        cores={"here": 2},
        state="finished",
    )

    found = next(
        each for each in diagnose(window_of(ALONE) if trains else NO_STEPS, facts) if each.kind is Kind.EVAL_HEAVY
    )

    assert found.next.startswith(advice)
    assert ("90 % of it waiting for data" in found.summary) is (waits == 0.9)
    assert ("with what follows" in found.summary) is (waits != 0.9)
    assert found.evidence.get("workers_advised") == (2 if "num_workers=2" in advice else None)
    assert "trains by these calls" not in found.next


def test_workers_of_an_evaluation_save_what_is_promised():
    """On two cores that compute, all of it takes half as long, but for the first batch of each evaluation."""
    parts = EvaluationParts(input_share=0.9, forward_share=0.1, batch_ns=1e8, batches=50.0)
    time = structs.replace(RunTime.of(100.0, {"steps": 40.0, "evaluation": 60.0}, 12), evaluation_parts=parts)
    val = LoaderFacts(dataset="Val", num_workers=0, number=1)
    facts = JobFacts(time=time, loader=LoaderFacts(num_workers=2, number=0), hosts={0: "here"}, cores={"here": 2})
    facts = structs.replace(facts, loaders={0: [facts.loader, val]}, state="finished")

    found = diagnose(window_of(ALONE), facts)[0]

    followed_s = 40.0 + 60.0 * (0.5 + 0.5 / 50)
    assert found.speedup_if_fixed == pytest.approx(100.0 / followed_s, rel=0.02)


@pytest.mark.parametrize(
    ("function", "workers", "advice"),
    [
        ("Texts.__getitem__", 0, "cheaper, or let workers of the DataLoader do it while the model computes (num_work"),
        ("Texts.__getitem__", 2, "Make train.py:7 Texts.__getitem__ cheaper."),
        ("write", 0, "Make train.py:7 write cheaper."),
        (None, 0, "Apply the model to larger batches, without gradients (torch.no_grad()), or in a lower precision."),
    ],
)
def test_a_script_that_only_applies_a_model_is_not_told_to_do_it_less_often(function, workers, advice):
    """There is no training that goes on, nor one that began."""
    time = RunTime.of(100.0, {"evaluation": 60.0, "startup": 40.0}, 1)
    lines = (line_of("outside", function, 80),) if function else ()
    loader = LoaderFacts(dataset="Texts", num_workers=workers)

    facts = JobFacts(time=time, lines=lines, loader=loader, state="finished", accelerator="cuda")
    found = {each.kind: each for each in diagnose(NO_STEPS, facts)}
    verdict, start = found[Kind.EVAL_HEAVY], found[Kind.STARTUP]

    assert advice in verdict.next
    assert "training" not in verdict.summary
    assert "is inference: once 60 s" in verdict.summary
    assert verdict.headline.startswith("60 % of the run's time is inference")
    assert verdict.next.endswith("mark its steps with traceml.trace_step().")  # a zeroth-order method calls it, too
    assert verdict.speedup_if_fixed == 1.0
    assert start.summary.startswith("Inference began 40 s after the start: 40 % of")


@pytest.mark.parametrize(
    ("facts", "advised"),
    [
        ({"accelerator": "cuda"}, True),
        ({"accelerator": "cuda", "autocast": True}, False),
        ({"accelerator": "cuda", "model": ModelFacts(dtype="torch.bfloat16")}, False),
        ({}, False),
    ],
)
def test_a_lower_precision_is_advised_where_it_is_faster(facts: dict[str, Any], advised: bool) -> None:
    """A CPU computes more slowly in 16 bits, as a rule; others may do so already."""
    time = RunTime.of(100.0, {"evaluation": 60.0, "startup": 40.0}, 1)

    found = {each.kind: each for each in diagnose(NO_STEPS, JobFacts(time=time, state="finished", **facts))}

    assert ("or in a lower precision. If" in found[Kind.EVAL_HEAVY].next) is advised


def test_gradients_are_not_advised_against_where_there_are_none():
    """The model is evaluated under `torch.no_grad()` or `torch.inference_mode()` already."""
    time = RunTime.of(100.0, {"steps": 38.0, "evaluation": 60.0, "startup": 2.0}, 12)
    found = diagnose(window_of(ALONE), JobFacts(time=time, plain_evaluation=True))[0]

    assert found.next.endswith("on fewer batches, with larger ones, or in another process.")
    assert "inference" not in found.summary
    assert "steps" not in found.evidence


@pytest.mark.parametrize("needed", [False, True])
def test_gradients_are_not_advised_against_where_they_are_needed(needed):
    """As for forces, which are gradients of the model's inputs."""
    time = RunTime.of(100.0, {"steps": 38.0, "evaluation": 60.0, "startup": 2.0}, 12)
    found = diagnose(window_of(ALONE), JobFacts(time=time, evaluates_gradients=needed))[0]

    assert ("torch.no_grad()" in found.next) is not needed


def test_self_play_is_not_made_half_as_often():
    """Calls with one sample each may be games of which the model learns: less of them gives no promised gain."""
    time = RunTime.of(100.0, {"steps": 38.0, "evaluation": 60.0, "startup": 2.0}, 12)
    found = diagnose(window_of(ALONE), JobFacts(time=time, plays=True))[0]

    assert found.headline == "60 % of the run's time is evaluation or self-play"
    assert "is evaluation or self-play: 12 times 5.0 s" in found.summary
    assert found.next.startswith("The model is called with one sample each time there: call it with several at once")
    assert (found.evidence["samples_per_call"], found.speedup_if_fixed) == (1, 1.0)


def test_a_single_evaluation_is_not_made_half_as_often():
    """It can only be on fewer batches."""
    found = findings(100.0, steps=38.0, evaluation=60.0, startup=2.0, evaluations=1)[0]

    assert found.kind == Kind.EVAL_HEAVY
    assert found.next.startswith("Evaluate on half as many batches: that saves 30 % of the run. Or evaluate with ")
    assert found.headline == "60 % of the run's time is evaluation"
    assert "before_training" not in found.evidence


@pytest.mark.parametrize("function", [None, "write"])
@pytest.mark.parametrize(("times", "plays"), [(1, False), (4, False), (1, True)])
def test_inference_before_the_training_is_no_evaluation(times: int, plays: bool, function: str | None) -> None:
    """Features of a frozen model: with half of them the training would have half of its data."""
    time = RunTime.of(100.0, {"steps": 38.0, "evaluation": 60.0, "startup": 2.0}, times)
    lines = (line_of("outside", function, 80),) if function else ()
    facts = JobFacts(time=structs.replace(time, evaluates_only_first=True), plays=plays, lines=lines, state="finished")
    found = diagnose(window_of(ALONE), facts)[0]

    follows = ", with what follows until it begins" * (function is not None)
    often = "once 60 s" if times == 1 else "4 times 15 s"
    assert found.headline.startswith("60 % of the run's time is inference before the training")
    assert f"is inference before the training{follows}: {often}" in found.summary
    assert found.next.startswith("Make train.py:7 write cheaper." if function else "Use larger batches there, without")
    assert found.next.endswith(
        "If the training gets what the model gives there (features, latents), keep that on disk for the next runs."
    )
    assert "valuat" not in found.headline + found.summary + found.next
    assert found.speedup_if_fixed == 1.0
    assert found.evidence["before_training"] is True


def test_one_rank_that_calls_a_model_before_the_training_can_share_that() -> None:
    """The others wait until it has the features of all data."""
    time = structs.replace(
        RunTime.of(100.0, {"steps": 60.0, "evaluation": 40.0}, 1),
        evaluators=(0,), evaluators_s=40.0, evaluates_only_first=True,
    )  # fmt: skip

    found = diagnose(window_of(Job(ranks=2)), JobFacts(time=time, world_size=2, state="finished"))[0]

    assert "is inference before the training on rank 0, for which the others wait" in found.summary
    assert found.next.startswith("Call the model on all ranks, each on an equal part of the data: that saves 20 % of")
    assert found.speedup_if_fixed == pytest.approx(1 / 0.8)


@pytest.mark.parametrize(
    ("short_s", "said", "saved"),
    [
        (9.0, "once 51 s, and 3 times 3.0 s.", "Evaluate on half as many batches: that saves 30 % of the run."),
        (48.0, "once 12 s, and 3 times 16 s.", "Evaluate half as often: that saves 24 % of the run."),
        (0.4, "once 60 s.", "Evaluate on half as many batches: that saves 30 % of the run."),
    ],
)
def test_short_evaluations_are_not_added_to_a_long_one(short_s: float, said: str, saved: str) -> None:
    """Validation on some batches of each epoch, and all data at the end; a check before them needs no word."""
    parts = {"steps": 38.0, "evaluation": 60.0, "startup": 2.0}
    time = structs.replace(RunTime.of(100.0, parts, 4), short_evaluations=3, short_evaluations_s=short_s)

    found = diagnose(window_of(ALONE), JobFacts(time=time, world_size=1, state="finished"))[0]

    assert found.kind == Kind.EVAL_HEAVY
    assert found.summary.endswith(said)
    assert found.next.startswith(saved)


def test_an_evaluation_that_is_not_over_does_not_count():
    """It has run for 4 s: its time is in the share, and two others took 28 s each."""
    time = structs.replace(RunTime.of(100.0, {"steps": 40.0, "evaluation": 60.0}, 2), evaluating_s=4.0)

    found = diagnose(window_of(ALONE), JobFacts(time=time, world_size=1, state="running"))[0]

    assert found.summary.startswith(
        "60 % of the run's 1:40 is evaluation: 2 times 28 s, and one has run for 4.0 s so far."
    )


@pytest.mark.parametrize(("grouped", "share"), [(True, 0.4), (False, None)])
def test_evaluation_on_one_rank_costs_all_their_time(grouped: bool, share: float | None) -> None:
    """Rank 0 of four evaluates for 40 s of 100: the mean is a tenth. Ranks without a group do not wait."""
    time = structs.replace(
        RunTime.of(100.0, {"steps": 90.0, "evaluation": 10.0}, 8), evaluators=(0,), evaluators_s=40.0
    )

    found = diagnose(window_of(Job(ranks=4, steps=220, grouped=grouped)), JobFacts(time=time, world_size=4))
    heavy = next((each for each in found if each.kind is Kind.EVAL_HEAVY), None)

    assert (heavy and heavy.cost_share) == share
    if heavy is not None:
        assert heavy.ranks == (0,)
        assert heavy.headline == "40 % of the run's time is evaluation on rank 0"
        assert (
            "40 % of the run's 1:40 is evaluation on rank 0, for which the others wait: 8 times 5.0 s" in heavy.summary
        )
        assert "on all ranks, each on an equal part of the data: that saves 30 %" in heavy.next
        assert heavy.speedup_if_fixed == pytest.approx(1 / 0.7)


def test_ranks_that_evaluate_longer_than_the_others_gain_by_even_parts() -> None:
    """Rank 0 evaluates for 40 s and the other one for 16 s: with 28 s each, 12 s are saved and not 20."""
    time = structs.replace(
        RunTime.of(100.0, {"steps": 60.0, "evaluation": 40.0}, 8),
        evaluators=(0,), evaluators_s=40.0, others_evaluate_s=16.0,
    )  # fmt: skip

    found = diagnose(window_of(Job(ranks=2)), JobFacts(time=time, world_size=2))[0]

    assert found.summary.startswith(
        "40 % of the run's 1:40 is evaluation on rank 0, 2.5x as long as on the others, which wait: 8 times 5.0 s"
    )
    assert found.next.startswith("Evaluate on all ranks, each on an equal part of the data: that saves 12 % of")
    assert found.speedup_if_fixed == pytest.approx(1 / 0.88)


def test_what_one_rank_does_after_the_evaluation_is_no_evaluation() -> None:
    """All ranks evaluate; rank 0 then draws a plot: to evaluate on all ranks is no remedy."""
    time = structs.replace(
        RunTime.of(100.0, {"steps": 90.0, "evaluation": 10.0}, 8), evaluators=(0,), evaluators_s=40.0
    )
    lines = [SampledLine(0, "outside", "/train.py", 48, "draw", None, 60)]

    found = diagnose(window_of(Job(ranks=2)), JobFacts(time=time, world_size=2, lines=lines))[0]

    assert found.summary == (
        "40 % of the run's 1:40 is evaluation on rank 0, with what follows until the training continues, for which the "
        "others wait: 8 times 5.0 s, mostly at train.py:48 draw."
    )
    assert found.next.startswith("Share train.py:48 draw evenly among all ranks: that saves 20 % of the run.")


def test_findings_are_in_order_of_wall_time():
    """Other code is 43 % of step time, but steps are a third of the run."""
    found = findings(100.0, adds("other", 10), steps=33.0, evaluation=60.0, startup=7.0, evaluations=3)

    assert [each.kind for each in found[:2]] == [Kind.EVAL_HEAVY, Kind.RESIDUAL_HEAVY]


@pytest.mark.parametrize(
    ("state", "evaluations", "told"), [("running", 1, False), ("running", 2, True), ("failed", 1, True)]
)
def test_one_evaluation_of_a_running_run_is_not_its_usual_share(state: str, evaluations: int, told: bool) -> None:
    """The training that it belongs to goes on, or has not begun."""
    time = RunTime.of(100.0, {"steps": 58.0, "evaluation": 40.0, "startup": 2.0}, evaluations)

    kinds = [each.kind for each in diagnose(window_of(ALONE), JobFacts(time=time, state=state))]

    assert (Kind.EVAL_HEAVY in kinds) is told


@pytest.mark.parametrize(
    ("state", "steps_s", "severity"),
    [("running", 40.0, "info"), ("running", 0.0, "warning"), ("stopped", 40.0, "warning")],
)
def test_the_long_start_up_of_a_running_run_is_a_remark(state: str, steps_s: float, severity: str) -> None:
    """Each further step makes its share less; one that goes on is the verdict."""
    parts = {"startup": 160.0 - steps_s, "steps": steps_s}
    window = window_of(ALONE) if steps_s else NO_STEPS

    found = diagnose(window, JobFacts(time=RunTime.of(160.0, parts), state=state))

    assert [str(each.severity) for each in found if each.kind is Kind.STARTUP] == [severity]
