"""A line that calls a trainer is no cause; a line of the user's own loop is."""

from __future__ import annotations

import pytest

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)
GAME = "/lib/gymnasium/envs/classic_control/cartpole.py:160 CartPoleEnv.step"


def seen(
    part: str, number: int, samples: int, library: str | None = "/lib/torch/autograd/graph.py:966 run"
) -> SampledLine:
    return SampledLine(0, part, "/home/me/train.py", number, "<module>", library, samples)


TRAINER = tuple(seen(part, 12, 30) for part in ("backward", "optimizer"))
LOOP = (seen("backward", 14, 30), seen("optimizer", 15, 30))


def residual(*lines: SampledLine) -> Finding:
    window = window_of(ALONE, adds("other", 10))
    found = diagnose(window, JobFacts(lines=lines))
    return next(each for each in found if each.kind is Kind.RESIDUAL_HEAVY)


def test_the_call_of_a_trainer_is_not_blamed_but_the_library() -> None:
    """`PPO(...).learn(...)` has all phases; the game takes the time."""
    finding = residual(seen("other", 12, 40, GAME), seen("other", 12, 3), seen("forward", 12, 15), *TRAINER)

    assert "line" not in finding.evidence
    assert "most of it in CartPoleEnv.step" in finding.summary
    assert "train.py:12" not in finding.next


def test_a_trainer_whose_optimizer_is_not_known() -> None:
    """Its forward passes are in the same line."""
    finding = residual(seen("other", 12, 40, GAME), seen("forward", 12, 15), seen("backward", 12, 15))

    assert "line" not in finding.evidence


def test_a_trainer_whose_optimizer_was_seen_too_seldom() -> None:
    """Its forward passes stand for it, but not where the optimizer's few samples are in another line."""
    rest = [seen("other", 12, 40), seen("forward", 12, 15), seen("backward", 12, 15)]

    assert "line" not in residual(*rest, seen("optimizer", 12, 1)).evidence
    assert residual(*rest, seen("optimizer", 13, 1)).evidence["line"] == 12


@pytest.mark.parametrize(("optimizer", "is_call"), [(12, True), (13, False)])
def test_a_trainer_that_calls_the_scripts_own_code_for_forward(optimizer: int, is_call: bool) -> None:
    """Lightning's `training_step`: a short run has few samples of the trainer's own phases, all in one line."""
    rest = [seen("other", 12, 40), seen("forward", 12, 1), seen("forward", 8, 20), seen("backward", 12, 8)]
    finding = residual(*rest, seen("optimizer", optimizer, 1), seen("checkpoint", 12, 1))

    assert ("line" not in finding.evidence) is is_call


def test_the_loop_is_said_to_be_inside_the_call_of_a_trainer() -> None:
    """The script's author has no loop to look at."""
    spread = [seen("other", 12, 5, f"/lib/skorch/net.py:{number} f{number}") for number in range(8)]
    of_trainer = residual(*spread, seen("forward", 12, 15), *TRAINER)
    of_loop = residual(*spread, seen("forward", 12, 15), *LOOP)

    assert "The training loop is inside train.py:12" in of_trainer.next
    assert "environments" not in of_trainer.next
    assert "line" not in of_trainer.evidence
    assert "inside" not in of_loop.next


def test_a_trainer_of_reinforcement_learning_steps_environments() -> None:
    """They take little in this one, beside its buffer and its callbacks."""
    spread = [
        seen("other", 12, 5, f"/lib/stable_baselines3/common/buffers.py:{number} f{number}") for number in range(8)
    ]
    window = window_of(ALONE, adds("other", 10))
    found = diagnose(window, JobFacts(lines=(*spread, seen("forward", 12, 15), *TRAINER), collects=True))
    finding = next(each for each in found if each.kind is Kind.RESIDUAL_HEAVY)

    assert "(environments, a buffer of their steps, loss function" in finding.next


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(("busy", "starved", "waits"), [(0.1, 0.0, True), (0.4, 0.36, True), (0.9, 0.0, False)])
def test_a_trainer_whose_environments_are_in_processes_already(
    every: int, busy: float, starved: float, waits: bool
) -> None:
    """They are not advised to be there, in each step or in every n-th one, also where they take all cores."""
    second = 1_000_000_000
    answers = SampledLine(
        0, "other", "/home/me/train.py", 12, "<module>", "/lib/multiprocessing/connection.py:390 Connection._recv", 80,
        watched_ns=second, cpu_ns=int(busy * second),
    )  # fmt: skip
    facts = JobFacts(
        lines=(answers, seen("forward", 12, 15), *TRAINER),
        collects=True,
        wait_of_ready_time={0: starved},
        wait_of_wall_time={0: starved},
    )
    found = diagnose(window_of(ALONE, adds("other", 30 * every, every=every)), facts)
    finding = next(each for each in found if each.kind is Kind.RESIDUAL_HEAVY)

    assert finding.next.startswith("train.py:12 waits there for answers from other processes") is waits
    assert not (waits and "AsyncVectorEnv" in finding.next)


def test_a_line_of_the_loop_is_blamed() -> None:
    """Also where the loss, and its backward pass, are in the same line: the optimizer steps in another."""
    rest = [seen("forward", 12, 15), seen("backward", 12, 20), seen("optimizer", 13, 20)]
    finding = residual(seen("other", 12, 43), *rest)

    assert finding.evidence["line"] == 12
    assert "train.py:12" in finding.next


def test_a_line_that_does_something_itself_calls_no_trainer() -> None:
    """A loop in one line, as `loss.backward(); optimizer.step(); time.sleep(0.01)`: a trainer is a library's."""
    finding = residual(seen("other", 12, 43, None), seen("forward", 12, 15), *TRAINER)

    assert finding.evidence["line"] == 12


def test_heavy_computation_is_in_the_library_then() -> None:
    """The line of the loop is named with the function that it calls."""
    linear = "/lib/torch/nn/modules/linear.py:134 Linear.forward"
    called = diagnose(window_of(ALONE), JobFacts(lines=(seen("forward", 12, 30, linear), *TRAINER)))[0]
    own = diagnose(window_of(ALONE), JobFacts(lines=(seen("forward", 12, 30, linear), *LOOP)))[0]

    assert "most of forward is in Linear.forward" in called.summary
    assert "train.py" not in called.summary
    assert "of forward is in train.py:12" in own.summary


def test_an_evaluation_by_a_trainer_has_no_line() -> None:
    """Its own code has one."""
    time = RunTime.of(100.0, {"steps": 50.0, "evaluation": 45.0}, 4)

    def evaluated(*lines: SampledLine) -> Finding:
        found = diagnose(window_of(ALONE), JobFacts(lines=(seen("outside", 12, 40), *lines), time=time))
        return next(each for each in found if each.kind is Kind.EVAL_HEAVY)

    assert "train.py" not in evaluated(*TRAINER).summary
    assert "mostly at train.py:12" in evaluated(*LOOP).summary
