"""Process groups of a training: `with Join(...)`, and what steps of a group with several ranks have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from tests.instrument.conftest import Traced


def test_the_step_at_which_a_rank_leaves_join_is_reported(traced: Traced, tmp_path: Path) -> None:
    """Of each epoch: the wait for ranks with more batches is in that step or in the next one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            with Join([model]):
                for x in torch.utils.data.DataLoader(torch.randn(20, 8), batch_size=4):
                    optimizer.zero_grad()
                    model(x).sum().backward()
                    optimizer.step()

        steps = traced.finish()
    finally:
        dist.destroy_process_group()

    assert len(steps) == 10
    assert [row["step"] for row in traced.info if row["kind"] == "joined"] in ([4, 9], [5, 9], [5, 10])


@pytest.fixture
def train() -> Callable[[int], None]:
    """Return a function that trains a model for some steps."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()

    return run


def test_the_first_steps_of_a_resumed_group_measure_own_backward(traced: Traced, train: Callable[[int], None]) -> None:
    """The group is formed before the checkpoint is loaded, which says how many steps there were."""
    traced.instrumentation.clock.join_group(lambda: 7)
    traced.instrumentation.set_step(1000)
    train(30)
    traced.instrumentation.close_open_step()

    rows = traced.steps()
    assert [row["step"] for row in rows if row["backward_own_ns"] >= 0][:17] == list(range(1000, 1017))
    assert {row["sequence"] for row in rows} == {7}


def test_steps_end_in_c_again_after_a_group(
    traced: Traced, train: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured any more."""
    clock = traced.instrumentation.clock
    slow: list[int] = []
    original = type(clock).commit_slow
    monkeypatch.setattr(type(clock), "commit_slow", lambda self, t: (slow.append(self.rows), original(self, t))[1])
    clock.join_group(lambda: 7)
    train(40)
    traced.instrumentation.events.group._drop()
    slow.clear()
    train(100)

    assert len(slow) < 10
    assert {row["sequence"] for row in traced.finish()[45:]} == {0}


def test_ctrl_c_while_collectives_are_counted_loses_nothing(traced: Traced, train: Callable[[int], None]) -> None:
    """The number is read by a function in Python; the step is not closed twice by halves."""
    interrupts = iter([KeyboardInterrupt])

    def issued() -> int:
        if traced.instrumentation.clock.rows == 40 and (interrupt := next(interrupts, None)) is not None:
            raise interrupt

        return 7

    traced.instrumentation.clock.join_group(issued)
    train(40)
    with pytest.raises(KeyboardInterrupt):
        train(3)

    train(20)
    rows = traced.finish()
    assert len(rows) == 61  # closed with the next loop's first forward: 40, the interrupted one, and 20
    assert {row["micro"] for row in rows} == {1}
    assert traced.instrumentation.clock.errors == 0


def test_a_group_without_a_configuration_of_its_backends_is_known(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that the script put there itself: torch raises, and its size and number are known all the same."""

    def raises() -> str:
        raise TypeError("value was None")

    known = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "get_backend_config": raises}
    for name, value in known.items():
        monkeypatch.setattr(dist, name, value)

    traced.instrumentation.events.group.find()
    clock = traced.instrumentation.clock
    assert clock.is_grouped
    traced.instrumentation.events.group._drop()
