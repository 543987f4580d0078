"""The time between the cells of a notebook is in no step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.instrument.conftest import Traced
from traceml.clock import monotonic_ns
from traceml.database.flight.flight_header import open_phase
from traceml.database.schema import LINE_OUTSIDE
from traceml.instrument.frameworks.notebook_cells import NotebookCells

Cell = Callable[[], object]
PAUSE_S = 0.1


class Shell:
    """Shell of IPython, as far as its events go."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callable[[object], object]]] = {"pre_run_cell": [], "post_run_cell": []}
        self.events = self
        self.cells: list[tuple[int, int]] = []

    def register(self, event: str, callback: Callable[[object], object]) -> None:
        self.callbacks[event].append(callback)

    def unregister(self, event: str, callback: Callable[[object], object]) -> None:
        self.callbacks[event].remove(callback)

    def run(self, cell: Cell) -> None:
        began_ns = monotonic_ns()
        for callback in self.callbacks["pre_run_cell"]:
            callback(None)

        cell()
        for callback in self.callbacks["post_run_cell"]:
            callback(None)

        self.cells.append((began_ns, monotonic_ns()))


@pytest.fixture
def shell(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """Return a shell whose cells the clock knows."""
    made = Shell()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: made))
    cells = NotebookCells(traced.instrumentation.clock, traced.instrumentation.guard)
    cells.follow()
    yield made
    cells.leave()
    assert not any(made.callbacks.values())


class Training:
    """Cells of a notebook."""

    def __init__(self) -> None:
        self.model = nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.loader = DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=2)
        self.loss = torch.zeros(())

    def forward(self) -> None:
        self.loss = self.model(torch.randn(2, 4)).square().mean()

    def update(self) -> None:
        self.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.forward()
        self.update()

    def on_loader(self) -> None:
        for (x,) in self.loader:
            self.loss = self.model(x).square().mean()
            self.update()

    def without_loader(self) -> None:
        for _ in range(10):
            self.step()

    def left_early(self) -> None:
        for index, (x,) in enumerate(self.loader):
            self.loss = self.model(x).square().mean()
            self.update()
            if index == 5:
                break

    def with_evaluation(self) -> None:
        self.model.train()
        self.on_loader()
        self.model.eval()
        with torch.no_grad():
            for (x,) in self.loader:
                self.model(x)

    def blocks(self, traced: Traced) -> None:
        for _ in range(5):
            with traced.instrumentation.trace_step():
                self.step()


@pytest.mark.parametrize(
    ("name", "count"), [("on_loader", 20), ("without_loader", 20), ("left_early", 12), ("with_evaluation", 20)]
)
def test_no_step_and_no_evaluation_reaches_from_one_cell_into_another(
    traced: Traced, shell: Shell, name: str, count: int
) -> None:
    """Somebody reads the output of a cell for minutes, and then trains again."""
    training = Training()
    for _ in range(2):
        shell.run(getattr(training, name))

    traced.instrumentation.close_open_step()
    rows = traced.steps()

    assert [row["step"] for row in rows] == list(range(count))
    spans = [(row["t_end_ns"] - row["total_ns"], row["t_end_ns"]) for row in rows]
    spans += [(row["t_end_ns"] - row["ns"], row["t_end_ns"]) for row in traced.table("evals")]
    for span in spans:
        assert any(began_ns <= span[0] and span[1] <= ended_ns for began_ns, ended_ns in shell.cells)


def test_a_cell_without_training_is_seen_in_no_step(traced: Traced, shell: Shell) -> None:
    """Samples of its lines would be taken for code of the next step, which may be blamed for it."""
    training, slots, seen = Training(), traced.flight.open_slots, []
    shell.run(training.on_loader)
    shell.run(lambda: seen.append(open_phase(slots, has_steps=True)[0]))
    shell.run(training.on_loader)

    assert seen == [LINE_OUTSIDE]
    assert len(traced.finish()) == 20


def test_blocks_of_two_cells(traced: Traced, shell: Shell) -> None:
    """The time between two blocks belongs to the later step, but not that between two cells."""
    training = Training()
    for _ in range(2):
        shell.run(lambda: training.blocks(traced))

    traced.instrumentation.close_open_step()

    rows = traced.steps()
    assert len(rows) == 10
    assert rows[5]["t_end_ns"] - rows[5]["total_ns"] >= shell.cells[1][0]


def test_a_step_may_be_spread_over_cells(traced: Traced, shell: Shell) -> None:
    """Its forward is in one, and its update in the next."""
    training = Training()
    for cell in (training.without_loader, training.forward, training.update):
        shell.run(cell)
        time.sleep(PAUSE_S)

    traced.instrumentation.close_open_step()

    rows = traced.steps()
    assert [row["forward_ns"] > 0 for row in rows] == [True] * 11
    assert rows[-1]["total_ns"] <= sum(ended_ns - began_ns for began_ns, ended_ns in shell.cells[1:])


@pytest.mark.parametrize("trains", ["on_loader", "without_loader"])
def test_reading_what_a_model_predicts_is_no_training(traced: Traced, shell: Shell, trains: str) -> None:
    """A cell that calls the model, with gradients, may be the begin of a step: the pause after it is none."""
    training = Training()
    for name in (trains, "forward", trains):
        shell.run(getattr(training, name))
        time.sleep(PAUSE_S)

    traced.instrumentation.close_open_step()

    in_cells = sum(ended_ns - began_ns for began_ns, ended_ns in shell.cells)
    rows, evals = traced.steps(), traced.table("evals")
    assert len(rows) == 20
    assert sum(row["total_ns"] for row in rows) + sum(row["ns"] for row in evals) <= in_cells


def test_without_a_shell_nothing_is_followed(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script may have imported IPython."""
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    cells = NotebookCells(traced.instrumentation.clock, traced.instrumentation.guard)
    cells.follow()
    cells.leave()

    assert traced.instrumentation.clock.errors == 0
