"""Steps at which another model is trained."""

from __future__ import annotations

import pytest

from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder


def model(step: int, parameters: int, trainable: int | None = None, name: str = "Net") -> dict[str, object]:
    return {"kind": "model", "model": name, "parameters": parameters, "trainable": trainable, "step": step}


def optimizer(step: int, tensors: int) -> dict[str, object]:
    return {"kind": "optimizer", "optimizer": "Adam", "tensors": tensors, "step": step}


def steps_of(*rows: dict[str, object]) -> tuple[int, ...]:
    facts = JobFactsBuilder()
    for row in rows:
        facts.info(0, row)

    return facts.build().other_models


def model_of(*rows: dict[str, object]) -> tuple[str | None, int | None]:
    facts = JobFactsBuilder()
    for row in rows:
        facts.info(0, row)

    described = facts.build().model
    return described.model, described.trainable


def test_models_of_other_sizes_and_more_of_a_model_are_noted() -> None:
    """A sweep, and a training that adds layers to its optimizer."""
    assert steps_of(model(0, 10), optimizer(0, 4), model(200, 1000), optimizer(200, 4)) == (200,)
    assert steps_of(model(0, 10), optimizer(0, 2), optimizer(150, 8)) == (150,)


def test_equal_models_and_the_first_ones_are_no_others() -> None:
    """Folds train the same model again; a generator and its critic come before the first step."""
    assert steps_of(model(0, 10), optimizer(0, 4), model(100, 10), optimizer(100, 4)) == ()
    assert steps_of(model(0, 10), model(0, 20), model(100, 20), model(100, 10)) == ()
    assert steps_of({"kind": "model", "model": "Net", "parameters": 5}) == ()


def test_a_model_that_is_not_trained_begins_no_training() -> None:
    """A frozen network that judges samples from step 300 on: the steps after it are of the same training."""
    assert steps_of(model(0, 10, 10), optimizer(0, 4), model(300, 2000, 0)) == ()
    assert steps_of(model(0, 10, 10), optimizer(0, 4), model(300, 2000, 5)) == (300,)


def test_the_model_is_one_that_is_trained() -> None:
    """A library's loss with constants, found first, is not; without another one the first is told."""
    frozen, trained, other = (model(0, 5, 0, "Loss"), model(0, 900, 900), model(0, 700, 700, "Other"))
    assert model_of(frozen, trained, other) == ("Net", 900)
    assert model_of(trained, frozen) == ("Net", 900)
    assert model_of(frozen, model(0, 50, 0, "Teacher")) == ("Loss", 0)


def test_models_that_are_trained_again_are_told() -> None:
    """A search that trains two models on each fold; the second optimizer is like the first one."""
    facts = JobFactsBuilder()
    for step in range(0, 400, 100):
        facts.info(0, model(step, 10 if step % 200 == 0 else 1000))
        facts.info(0, optimizer(step, 4))

    assert facts.build().other_models == (100, 200, 300)
    assert facts.build().same_models == {200: 0, 300: 100}


@pytest.mark.parametrize(
    ("looks", "is_left_on"), [([True], True), ([True, False], False), ([True, False, True], False)]
)
def test_a_profiler_is_left_on_if_it_never_was_off(looks: list[bool], is_left_on: bool) -> None:
    """One with a schedule is on now and then."""
    facts = JobFactsBuilder()
    for on in looks:
        facts.info(0, {"kind": "profiler", "on": on})

    assert facts.build(latest=(100,)).profiles is is_left_on


@pytest.mark.parametrize(
    ("steps", "begins"),
    [
        ([40, 80, 120], (40, 80, 120)),
        ([40, 41, 80], (40, 80)),  # two optimizers of a model, of which one steps later
        (list(range(1, 100)), ()),  # a new one for each step
        ([], ()),
    ],
)
def test_trainings_begin_with_a_new_optimizer(steps: list[int], begins: tuple[int, ...]) -> None:
    """Folds train equal models."""
    facts = JobFactsBuilder()
    for step in steps:
        facts.info(0, {"kind": "training_begins", "step": step})

    assert facts.build().trainings_begin == begins
