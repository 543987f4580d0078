"""Profile windows on real trainings: opened between steps, without an effect on numbers or on the script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.instrument.conftest import Traced
from tests.instrument.test_install import train
from tests.instrument.test_step_clock import net, sgd
from tests.instrument.test_step_clock import train as train_step
from traceml.database.profile_states import ProfileState
from traceml.database.schema import StepFlag
from traceml.instrument.profile_window import ProfileWindow


def _window(traced: Traced, first_step: int, steps: int, **options: Any) -> ProfileWindow:
    window = ProfileWindow(traced.instrumentation.clock, first_step=first_step, steps=steps, **options)
    window.ask()
    return window


def _marks(window: ProfileWindow, folder: Path) -> list[str]:
    """Return the profiled steps, as the trace has them."""
    window.save(folder / "trace.json")
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return sorted(each["name"] for each in events if each["name"].startswith("ProfilerStep#"))


def test_the_chosen_steps_are_recorded(traced: Traced, tmp_path: Path) -> None:
    """And flagged, with the step of the set-up before them, and those until the trace is written."""
    window = _window(traced, first_step=6, steps=3)
    train(20)

    assert (window.state, window.first_step, window.why) == (ProfileState.RECORDED, 6, "")
    assert _marks(window, tmp_path) == ["ProfilerStep#6", "ProfilerStep#7", "ProfilerStep#8"]
    flagged = [row["step"] for row in traced.finish() if StepFlag.PROFILED in row["flags"]]
    assert flagged == list(range(5, 20))  # the trace was not written meanwhile


def test_losses_are_the_same(traced: Traced) -> None:
    """To the last bit, and the steps return to their usual path afterwards."""
    expected = train(20)
    window = _window(traced, first_step=traced.instrumentation.clock.step + 4, steps=5)

    window.release()
    assert train(20) == expected
    assert window.state is ProfileState.RECORDED
    flagged = [row["step"] for row in traced.steps() if StepFlag.PROFILED in row["flags"]]
    assert flagged == list(range(window.first_step - 1, window.first_step + 6))
    assert traced.instrumentation.clock.at_boundary is None
    assert not traced.instrumentation.clock.needs_slow_commit


def test_a_profiler_of_the_script_is_left_alone(traced: Traced) -> None:
    """The window is refused, and the script's trace is complete."""
    window = _window(traced, first_step=4, steps=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as own:
        train(10)

    assert window.state is ProfileState.FAILED
    assert window.why == "the script runs a profiler of its own"
    assert sum(each.count for each in own.key_averages() if each.key == "Optimizer.step#Adam.step") == 10


def test_a_profiler_of_the_script_that_warms_up_is_left_alone(traced: Traced) -> None:
    """It is prepared but records nothing yet; torch has one session per process."""
    schedule = torch.profiler.schedule(wait=0, warmup=8, active=2, repeat=1)
    model = net()
    optimizer = sgd(model)
    loader = DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=2)
    window = _window(traced, first_step=4, steps=2)
    counts = []

    def count(own: torch.profiler.profile) -> None:
        counts.append(sum(each.count for each in own.key_averages() if each.key == "Optimizer.step#SGD.step"))

    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, schedule=schedule, on_trace_ready=count) as own:
        for (x,) in loader:
            train_step(model, optimizer, x)
            own.step()

    assert window.why == "a profiler of the script warms up"
    assert counts == [2]


def test_a_window_gives_way_to_the_script(traced: Traced) -> None:
    """A second profiler would raise in the script: the window ends instead."""
    model = net()
    optimizer = sgd(model)
    window = _window(traced, first_step=3, steps=100)
    counts = []
    for number, (x,) in enumerate(DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=2)):
        if number == 10:
            assert window.state is ProfileState.OPEN
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as own:
                train_step(model, optimizer, x)

            counts.append(sum(each.count for each in own.key_averages() if each.key == "Optimizer.step#SGD.step"))
        else:
            train_step(model, optimizer, x)

    assert counts == [1]
    assert window.why == "the script started a profiler of its own meanwhile"
    assert torch.autograd.profiler._enable_profiler is torch._C._autograd._enable_profiler
    assert len(traced.finish()) == 20


def test_a_window_that_is_cancelled_ends(traced: Traced) -> None:
    """At the next boundary, where it is open; one that waits never opens."""
    model = net()
    optimizer = sgd(model)
    window = _window(traced, first_step=3, steps=100)
    for number, (x,) in enumerate(DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=2)):
        train_step(model, optimizer, x)
        if number == 10:
            window.cancel("enough")

    waiting = _window(traced, first_step=10_000, steps=1)
    waiting.cancel("enough")

    assert (window.state, window.why) == (ProfileState.FAILED, "enough")
    assert (waiting.state, waiting.why) == (ProfileState.FAILED, "enough")
    assert not torch.autograd._profiler_enabled()


def test_a_window_ends_with_the_training(traced: Traced) -> None:
    """The profiler is stopped before the process ends."""
    window = _window(traced, first_step=3, steps=100)
    train(10)
    window.abandon("the training ended")

    assert (window.state, window.why) == (ProfileState.FAILED, "the training ended")
    assert not torch.autograd._profiler_enabled()


def test_an_error_of_torch_ends_the_window_only(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training goes on, and the reason is kept."""

    def broken(*_args: object) -> None:
        raise RuntimeError("no profiler here")

    window = _window(traced, first_step=3, steps=2)
    monkeypatch.setattr(torch.profiler.profile, "start_trace", broken)
    assert len(train(10)) == 10

    assert window.state is ProfileState.FAILED
    assert "no profiler here" in window.why
    assert len(traced.finish()) == 10
