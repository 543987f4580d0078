"""torch.compile sees the same graphs with and without hooks: no break, no recompile, and calls are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import traceml
from tests.instrument.conftest import Traced
from traceml.recorder.current_recorder import state


class Net(nn.Module):
    """A model of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Dynamo's caches and counters empty before, empty after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def whole(model: nn.Module, backend: str) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    return model, torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: str) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    model.compile(backend=backend)
    return model, model


def inner_function(model: nn.Module, backend: str) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    return model, torch.compile(lambda x: model(x).square(), backend=backend)


def fullgraph(model: nn.Module, backend: str) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    return model, torch.compile(model, backend=backend, fullgraph=True)


FORMS = (whole, in_place, inner_function, fullgraph)


def train(call: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer, steps: int = 6) -> list[float]:
    losses = []
    x = torch.ones(4, 8)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = call(x).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return losses


def counted() -> tuple[int, int, int]:
    """Graph breaks, graphs, and frames that dynamo looked at."""
    counters = torch._dynamo.utils.counters
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"], counters["frames"]["total"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ["optimizer first", "compile first"])
def test_no_graph_break_and_no_recompile(traced: Traced, form: Callable[..., object], order: str) -> None:
    """One graph, no break, whether the hooks came before or after."""
    model = Net()
    if order == "optimizer first":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # this is when the model is found
        _, call = form(model, "eager")
    else:
        _, call = form(model, "eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    train(call, optimizer)

    breaks, graphs, _ = counted()
    assert (breaks, graphs) == (0, 1)
    rows = traced.finish()
    if form is not inner_function:  # there the function of the user is outermost: its time is `other`
        assert all(row["forward_ns"] > 0 for row in rows[1:])


@pytest.mark.process
@pytest.mark.needs("compiler")
@pytest.mark.parametrize("form", FORMS)
def test_inductor_trains_to_the_same_losses(traced: Traced, form: Callable[..., object]) -> None:
    """Losses are equal to the last bit with hooks and without."""
    from torch._inductor import config  # imports dynamo

    def losses() -> list[float]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, call = form(Net(), "inductor")
        with config.patch({"cpp.vec_isa_ok": False, "compile_threads": 1}):  # compile nothing else, and here
            return train(call, torch.optim.SGD(model.parameters(), lr=0.01))

    with_hooks = losses()
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    traced.instrumentation.uninstall()

    assert with_hooks == losses()


class WithPhases(Net):
    """A model with marks in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with traceml.phase("first"):
            hidden = self.first(x).relu()

        return self.last(hidden)

    @traceml.trace
    def last(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x)


def test_phases_in_compiled_code_do_nothing(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """They neither break the graph nor fail with `fullgraph`; where the model is not compiled, they are timed."""
    monkeypatch.setattr(state, "instrumentation", traced.instrumentation)
    model = WithPhases()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    train(torch.compile(model, backend="eager", fullgraph=True), optimizer)
    assert counted()[:2] == (0, 1)
    train(model, optimizer)

    rows = traced.finish()
    assert [row["user_ns"] > 0 for row in rows] == [False] * 6 + [True] * 6


def test_hooks_that_come_later_do_not_recompile(traced: Traced) -> None:
    """A model that was compiled and called before it is found is not compiled again."""
    model = Net()
    call = torch.compile(model, backend="eager")
    call(torch.ones(4, 8)).sum().backward()
    before = counted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    train(call, optimizer)

    assert counted() == before


def test_a_compiled_optimizer_step_has_no_more_breaks(traced: Traced) -> None:
    """The patched step is traced through."""

    def breaks() -> tuple[int, int, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(torch.ones(4, 8)).sum().backward()

        @torch.compile(backend="eager")
        def step() -> None:
            optimizer.step()

        for _ in range(4):
            step()

        return counted()

    with_hooks = breaks()
    traced.instrumentation.uninstall()

    assert with_hooks[:2] == breaks()[:2]


def test_a_compiled_training_step_has_no_more_breaks(traced: Traced) -> None:
    """Forward, backward and step in one compiled function: hooks add no break and no graph."""

    def breaks() -> tuple[int, int, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        @torch.compile(backend="eager")
        def step(x: torch.Tensor) -> None:
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

        for _ in range(4):
            step(torch.ones(4, 8))

        return counted()

    with_hooks = breaks()
    traced.instrumentation.uninstall()

    assert with_hooks[:2] == breaks()[:2]


def blocks(model: Net) -> None:
    model.first = torch.compile(model.first, backend="eager")


def blocks_in_place(model: Net) -> None:
    model.first.compile(backend="eager")


def own_forward(model: Net) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def itself(model: Net) -> None:
    model.compile(backend="eager")


def left_out(model: Net) -> None:
    model.first.forward = torch.compiler.disable(model.first.forward)


def nothing(_model: Net) -> None:
    """Leave it as it is."""


@pytest.mark.parametrize(
    ("compiles", "is_late", "compiled"),
    [
        (blocks, False, True),
        (blocks_in_place, False, True),
        (blocks_in_place, True, True),
        (own_forward, False, True),
        (itself, False, True),
        (itself, True, True),
        (nothing, False, False),
        (left_out, False, False),
    ],
)
def test_what_is_compiled_of_a_model_is_reported(
    traced: Traced, compiles: Callable[[Net], None], is_late: bool, compiled: bool
) -> None:
    """Before or after its optimizer is made; of `is_late`, the model is reported twice."""
    model = Net()
    if not is_late:
        compiles(model)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if is_late:
        compiles(model)
        model.second.compile(backend="eager")

    train(model, optimizer)

    traced.finish()
    reported = [row["compiled"] for row in traced.info if row["kind"] == "model"]
    assert reported == [False, True] if is_late else reported == [compiled]
