"""The user's own phases, steps and data."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Self

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.instrument.conftest import Traced
from traceml.database.schema import StepFlag
from traceml.instrument import traced as traced_function
from traceml.instrument.divided_step import DividedStep


def parts() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    model = nn.Linear(4, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(2, 4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()


def burn(milliseconds: float) -> None:
    until = time.perf_counter_ns() + int(milliseconds * 1e6)
    while time.perf_counter_ns() < until:
        pass


def test_phases_of_the_user_are_rows_of_their_own(traced: Traced) -> None:
    """Nested and repeated phases have exclusive time, and add up to the step's user time."""
    model, optimizer, x = parts()
    phase = traced.instrumentation.phase
    for _ in range(4):
        with phase("outer"):
            burn(1)
            with phase("inner"):
                burn(2)

            with phase("inner"):
                train(model, optimizer, x)

    rows = traced.finish()
    names = traced.names()
    assert len(rows) == 4
    for row in rows[1:-1]:  # a step without a loader ends at the next forward: the last one has no augmentation
        of = {names[u["name_id"]]: u for u in traced.table("user_phases") if u["step"] == row["step"]}
        assert of["inner"]["ns"] + of["outer"]["ns"] == row["user_ns"]
        assert of["inner"]["ns"] >= 2_000_000
        assert of["outer"]["ns"] >= 1_000_000
        assert of["inner"]["count"] in (1, 2)
        assert row["forward_ns"] > 0


def test_a_phase_around_the_whole_loop_is_booked_in_each_step(traced: Traced) -> None:
    """A phase that outlives steps gives each of them its share."""
    model, optimizer, x = parts()
    with traced.instrumentation.phase("epoch"):
        for _ in range(5):
            burn(1)
            train(model, optimizer, x)

    rows = traced.finish()
    assert len(rows) == 5
    assert all(row["user_ns"] >= 1_000_000 for row in rows[1:-1])


def test_steps_with_phases_close_as_usual_ones(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a step inside of a phase takes the rules for unusual steps."""
    model, optimizer, x = parts()
    phase, step = traced.instrumentation.phase, DividedStep.append_step
    closed: list[int] = []

    def append_step(clock: DividedStep, *args: Any) -> None:
        closed.append(clock.step)
        step(clock, *args)

    def steps(number: int) -> None:
        for _ in range(number):
            train(model, optimizer, x)
            with phase("log"):
                burn(0.1)

    steps(3)
    with monkeypatch.context() as patch:
        patch.setattr(DividedStep, "append_step", append_step)
        steps(4)
        assert not closed

        with phase("epoch"):
            steps(3)

        assert len(closed) == 3

    rows = traced.finish()
    assert len(rows) == 10
    for row in rows:
        phases = [each["ns"] for each in traced.table("user_phases") if each["step"] == row["step"]]
        assert len(phases) == (2 if row["step"] in (6, 7, 8, 9) else 1)
        assert sum(phases) == row["user_ns"] >= 100_000


def test_phases_of_other_threads_do_not_count(traced: Traced) -> None:
    """Only the training thread has a step."""
    model, optimizer, x = parts()
    train(model, optimizer, x)

    def elsewhere() -> None:
        with traced.instrumentation.phase("loading"):
            model(x)

    for _ in range(3):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        train(model, optimizer, x)

    rows = traced.finish()
    assert all(row["user_ns"] == 0 for row in rows)
    assert traced.table("user_phases") == []


class Waits(Dataset[torch.Tensor]):
    """A data set with a phase of the same name as the loop's."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        with self.traced.instrumentation.phase("data"):
            burn(1)

        return torch.randn(4)


def test_a_phase_of_a_data_set_is_a_part_of_the_wait(traced: Traced) -> None:
    """Its end leaves the loop's phase of that name open, and the steps after it are timed as before."""
    model, optimizer, _ = parts()
    batches = iter(DataLoader(Waits(traced), batch_size=2))
    for _ in range(4):
        with traced.instrumentation.phase("data"):
            x = next(batches)

        train(model, optimizer, x)

    rows = traced.finish()
    assert all(row["input_wait_ns"] >= 2e6 and row["user_ns"] >= 0 for row in rows)
    assert any(row["user_ns"] < row["input_wait_ns"] for row in rows)  # not all: a busy host may interrupt a phase


def test_a_phase_ends_when_the_training_leaves_its_thread(traced: Traced) -> None:
    """Its end comes in a thread that no longer trains; it is not open in all later steps."""
    model, optimizer, x = parts()

    async def steps() -> None:
        for _ in range(6):
            with traced.instrumentation.phase("step"):
                await asyncio.to_thread(train, model, optimizer, x)

    asyncio.run(steps())
    train(model, optimizer, x)

    assert traced.finish()[-1]["user_ns"] == 0


def test_a_block_whose_work_moves_to_another_thread(traced: Traced) -> None:
    """A step that waits for `asyncio.to_thread` is one, with the phases of that thread."""
    model, optimizer, x = parts()

    async def steps() -> None:
        for _ in range(10):
            with traced.instrumentation.trace_step():
                await asyncio.to_thread(train, model, optimizer, x)

    asyncio.run(steps())

    rows = traced.finish()
    assert len(rows) == 10
    assert all(row["backward_ns"] > 0 for row in rows)


def test_a_block_whose_work_a_pool_does(traced: Traced) -> None:
    """A worker without the context is not the training thread; the steps are counted all the same."""
    model, optimizer, x = parts()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(10):
            with traced.instrumentation.trace_step():
                pool.submit(train, model, optimizer, x).result()

    assert len(traced.finish()) == 10


def test_blocks_of_two_threads_at_once(traced: Traced) -> None:
    """One of the two trainings is counted. Neither ends the other's block, nor leaves one open."""
    at_once = threading.Barrier(2)

    def steps() -> None:
        for _ in range(10):
            at_once.wait()
            with traced.instrumentation.trace_step():
                at_once.wait()  # both are inside
                burn(1)

    threads = [threading.Thread(target=steps) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    rows = traced.finish()
    assert len(rows) == 10
    assert all(row["total_ns"] >= 1_000_000 for row in rows)


def test_blocks_of_a_thread_after_one_of_another(traced: Traced) -> None:
    """A block that warms up on the main thread does not make that the training thread forever."""
    model, optimizer, x = parts()
    with traced.instrumentation.trace_step():
        burn(1)

    def steps() -> None:
        for _ in range(10):
            with traced.instrumentation.trace_step():
                train(model, optimizer, x)

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()

    assert len(traced.finish()) == 11


def test_a_phase_nests_as_deep_as_its_function(traced: Traced) -> None:
    """A phase in a function that calls itself is counted at each level; a step that ends inside gives it its time."""
    model, optimizer, x = parts()
    train(model, optimizer, x)

    def descend(levels: int) -> None:
        with traced.instrumentation.phase("walk"):
            if levels > 1:
                descend(levels - 1)
            else:
                train(model, optimizer, x)
                train(model, optimizer, x)
                burn(1)

    descend(100)
    train(model, optimizer, x)
    rows = traced.finish()
    counts = {user["step"]: user["count"] for user in traced.table("user_phases")}
    assert len(rows) == 4
    assert traced.instrumentation.clock.errors == 0
    assert sum(counts.values()) == 100
    assert rows[2]["user_ns"] >= 1_000_000
    assert all(0 <= row["user_ns"] <= row["total_ns"] for row in rows)
    assert rows[3]["user_ns"] == 0


def test_phases_may_end_in_another_order(traced: Traced) -> None:
    """A generator's phase that outlives the phase around it breaks nothing."""
    model, optimizer, x = parts()
    phase = traced.instrumentation.phase

    def items() -> Iterator[int]:
        with phase("generator"):
            yield from range(3)

    with phase("around"):
        iterator = items()
        next(iterator)

    train(model, optimizer, x)
    list(iterator)
    train(model, optimizer, x)
    assert len(traced.finish()) == 2


def test_a_traced_function_stays_what_it_was(traced: Traced) -> None:
    """Functions, generators and coroutines keep their kind, name, values and exceptions."""

    def phase() -> object:
        return traced.instrumentation.phase("f")

    def plain(a: int, *, b: int = 1) -> int:
        """Add."""
        return a + b

    def generator(n: int) -> Iterator[int]:
        got = yield n
        try:
            yield got
        except KeyError:
            yield -1

        return "end"

    async def coroutine(n: int) -> int:
        await asyncio.sleep(0)
        return n

    wrapped = traced_function(plain, phase)
    assert (wrapped(1, b=2), wrapped.__name__, wrapped.__doc__) == (3, "plain", "Add.")

    made = traced_function(generator, phase)
    assert inspect.isgeneratorfunction(made)
    running = made(1)
    assert (next(running), running.send(5), running.throw(KeyError())) == (1, 5, -1)
    with pytest.raises(StopIteration, match="end"):
        next(running)

    waited = traced_function(coroutine, phase)
    assert inspect.iscoroutinefunction(waited)
    assert asyncio.run(waited(7)) == 7


def test_explicit_steps_turn_inference_off(traced: Traced) -> None:
    """Each block is one step; the time between two belongs to the later one."""
    model, optimizer, x = parts()
    for _ in range(6):
        burn(1)
        with traced.instrumentation.trace_step(model):
            for _ in range(3):
                train(model, optimizer, x)

    rows = traced.finish()
    assert len(rows) == 6
    assert all(row["flags"] & StepFlag.EXPLICIT and row["micro"] == 3 for row in rows)
    assert all(row["other_ns"] >= 1_000_000 for row in rows[1:])


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"model": 5}, ["trace_step(model=...) takes a torch.nn.Module, not int: it is not timed"]),
        (
            {"optimizer": "adam"},
            ["trace_step(optimizer=...) takes an object with the method step(), not str: it is not timed"],
        ),
        ({"model": None, "optimizer": None}, []),
    ],
)
def test_what_is_no_model_and_no_optimizer_is_told_once(
    traced: Traced, caplog: pytest.LogCaptureFixture, named: dict[str, Any], told: list[str]
) -> None:
    """The steps go on without it; a warning with a traceback in each of them would fill the log."""
    for _ in range(3):
        with traced.instrumentation.trace_step(**named):
            burn(1)

    assert len(traced.finish()) == 3
    assert [record.getMessage() for record in caplog.records] == told
    assert all(record.exc_info is None for record in caplog.records)


def test_a_block_that_raises_is_no_step(traced: Traced) -> None:
    """Its time belongs to the step that comes after."""
    model, optimizer, x = parts()
    for index in range(4):
        try:
            with traced.instrumentation.trace_step():
                train(model, optimizer, x)
                if index == 1:
                    raise MemoryError
        except MemoryError:
            continue

    assert len(traced.finish()) == 3


def test_explicit_steps_know_evaluation(traced: Traced) -> None:
    """Evaluation between two blocks is in no step."""
    model, optimizer, _ = parts()
    loader = DataLoader(torch.randn(6, 4), batch_size=2)
    for _ in range(3):
        for batch in loader:
            with traced.instrumentation.trace_step():
                train(model, optimizer, batch)

        with torch.no_grad():
            for batch in DataLoader(torch.randn(4, 4), batch_size=2):
                burn(3)
                model(batch)

    rows = traced.finish()
    assert len(rows) == 9
    assert sum(row["batches"] for row in traced.table("evals")) == 6
    evals = {row["step"]: row["ns"] for row in traced.table("evals")}
    assert set(evals) == {3, 6, 9}
    assert all(ns >= 2 * 3_000_000 for ns in evals.values())
    for before, row in pairwise(rows):
        assert row["total_ns"] + evals.get(row["step"], 0) <= row["t_end_ns"] - before["t_end_ns"]


def test_any_iterable_can_be_waited_for(traced: Traced) -> None:
    """trace_data times an iterable, keeps its length and attributes, and bounds steps."""
    model, optimizer, _ = parts()

    class Source:
        name = "source"

        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[torch.Tensor]:
            for _ in range(5):
                burn(1)
                yield torch.randn(2, 4)

    source = traced.instrumentation.trace_data(Source())
    assert (len(source), source.name) == (5, "source")
    for x in source:
        train(model, optimizer, x)

    rows = traced.finish()
    assert len(rows) == 5
    assert all(row["input_wait_ns"] >= 1_000_000 for row in rows)
    assert not any(row["flags"] & StepFlag.NO_LOADER for row in rows)


def test_a_traced_iterable_can_do_what_it_could(traced: Traced) -> None:
    """An iterator is read by next(), with its waits timed; others are indexed, asked, copied, set, closed as before."""
    model, optimizer, _ = parts()

    def stream() -> Iterator[torch.Tensor]:
        while True:
            burn(1)
            yield torch.randn(2, 4)

    batches = traced.instrumentation.trace_data(stream())
    assert iter(batches) is batches
    for _ in range(3):
        train(model, optimizer, next(batches))

    rows = traced.finish()
    assert all(row["input_wait_ns"] >= 1_000_000 for row in rows[:3])

    numbers = traced.instrumentation.trace_data([1, 2])
    assert (numbers[1], 2 in numbers, bool(numbers)) == (2, True, True)
    assert copy.copy(numbers) == pickle.loads(pickle.dumps(numbers)) == [1, 2]
    assert bool(batches)
    assert not hasattr(numbers, "__next__")
    assert not hasattr(batches, "__len__")

    class Reader:
        epoch = 0
        is_closed = False

        def __iter__(self) -> Iterator[Any]:
            yield self.epoch

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.is_closed = True

    reader = Reader()
    with traced.instrumentation.trace_data(reader) as epochs:
        epochs.epoch = 3
        assert list(epochs) == [3]

    assert reader.is_closed

    async def stream_later() -> AsyncIterator[int]:
        yield 1

    later = stream_later()
    assert traced.instrumentation.trace_data(later) is later


def test_a_model_inside_the_dataset_is_input(traced: Traced) -> None:
    """Code that runs during a wait for a batch is part of the wait."""
    encoder = nn.Linear(4, 4)
    model, optimizer, _ = parts()

    class Encoded(Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> torch.Tensor:
            with traced.instrumentation.phase("augment"):
                burn(1)
                return encoder(torch.ones(4)).detach()

    for batch in DataLoader(Encoded(), batch_size=2):
        train(model, optimizer, batch)

    rows = traced.finish()
    assert len(rows) == 3
    assert all(row["input_wait_ns"] >= 2_000_000 and row["user_ns"] == 0 for row in rows)


def test_steps_of_a_resumed_training_count_on(traced: Traced) -> None:
    """All tables have the number that was given, and the steps after it; numbers never go back."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(steps: int) -> None:
        for _ in range(steps):
            with traced.instrumentation.phase("mine"):
                model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert traced.instrumentation.set_step(40) == 40
    train(3)
    assert traced.instrumentation.set_step(43) == 40  # as after each step of a loop
    assert traced.instrumentation.set_step(2) is None
    train(2)
    assert traced.instrumentation.set_step(100) == 95
    train(1)
    traced.instrumentation.close_open_step()

    wanted = [40, 41, 42, 43, 99, 100]
    assert [row["step"] for row in traced.table("steps")] == wanted
    assert [row["step"] for row in traced.table("user_phases")] == wanted


def test_a_phase_that_is_new_between_two_steps_that_become_one_or_two(traced: Traced) -> None:
    """Until L-BFGS steps again, its first step may be a part of SGD's last one."""
    model, first, x = parts()
    second = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        second.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(15):
        train(model, first, x)

    second.step(closure)
    with traced.instrumentation.phase("log"):
        burn(1)

    second.step(closure)

    rows = traced.finish()
    assert len(rows) == 17
    assert [row["step"] for row in rows if row["user_ns"] >= 1_000_000] == [16]
