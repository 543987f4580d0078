"""What a timed module still is, and which calls are timed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.instrument.conftest import Traced
from traceml.instrument.facts.descriptions import model_facts
from traceml.instrument.forward import is_instrumented


class Net(nn.Module):
    """A model whose parts are called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def made(traced: Traced) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert is_instrumented(model)
    return model, optimizer


def test_only_roots_with_parameters_are_timed(traced: Traced) -> None:
    """A child is part of its parent's call; a loss has nothing to train."""
    loss = nn.MSELoss()
    model, _ = made(traced)

    assert not is_instrumented(model.inner)
    assert not is_instrumented(loss)


def test_a_copy_is_a_module_of_its_own(traced: Traced) -> None:
    """deepcopy, copy and pickle give modules that run their own weights."""
    model, _ = made(traced)
    x = torch.randn(2, 4)

    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is Net
        assert other.__dict__.get("_compiled_call_impl") is None
        assert torch.equal(other(x), model(x))

    clone = copy.deepcopy(model)
    nn.init.zeros_(clone.inner.weight)
    assert not torch.equal(clone(x), model(x))


def test_a_timed_module_looks_like_before(traced: Traced) -> None:
    """Type, state dict, repr and torch.save do not notice."""
    model, _ = made(traced)

    assert type(model) is Net
    assert list(model.state_dict()) == ["inner.weight", "inner.bias"]
    assert repr(model) == repr(copy.deepcopy(model))
    torch.save(model, io.BytesIO())


def test_a_deleted_model_is_freed_at_once(traced: Traced) -> None:
    """The timer keeps no module alive: its memory comes back without the garbage collector."""
    model, optimizer = made(traced)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model, optimizer
        assert alive() is None
    finally:
        gc.enable()


def clone_module(module: nn.Module) -> nn.Module:
    """Clone a module by its `__dict__`, as learn2learn does and many scripts of meta learning."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {name: each.clone() for name, each in module._parameters.items() if each is not None}
    clone._modules = {name: clone_module(each) for name, each in module._modules.items() if each is not None}
    return clone


@pytest.mark.parametrize("stage", ["both alive", "original gone", "tracing ended"])
def test_a_clone_by_its_dict_calls_its_own_weights(traced: Traced, stage: str) -> None:
    """It has a copy of our timer, which belongs to the original."""
    model, optimizer = made(traced)
    x = torch.randn(2, 4)
    clone = clone_module(model)
    with torch.no_grad():
        clone.inner.weight.zero_()  # type: ignore[union-attr,operator]

    bias = model.inner.bias
    if stage == "original gone":
        del model, optimizer
        gc.collect()
    elif stage == "tracing ended":
        traced.instrumentation.uninstall()

    for _ in range(2):
        assert torch.equal(clone(x), bias.expand(2, 4))

    if stage == "both alive":
        assert not torch.equal(model(x), bias.expand(2, 4))


def test_the_forward_of_a_clone_is_timed(traced: Traced) -> None:
    """Steps on the clone of a model, as in meta learning, have its forward passes."""
    model, optimizer = made(traced)
    x = torch.randn(2, 4)
    for _ in range(3):
        clone = clone_module(model)
        clone(x).sum().backward()
        optimizer.step()

    assert all(row["forward_ns"] for row in traced.finish())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("as_list", [True, False])
def test_a_model_in_checkpointed_parts(traced: Traced, as_list: bool, reentrant: bool) -> None:
    """Its parts are called in its place: that is the forward, which separates the steps, too."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = list(model) if as_list else model
    for _ in range(5):
        x = torch.randn(2, 4, requires_grad=True)
        torch.utils.checkpoint.checkpoint_sequential(parts, 2, x, use_reentrant=reentrant).sum().backward()
        optimizer.step()

    rows = traced.finish()
    assert len(rows) == 5
    assert all(row["forward_ns"] > 0 for row in rows)
    assert {row["samples"] for row in rows} == {2}


def test_checkpointed_functions_are_no_model(traced: Traced) -> None:
    """Functions without a module are called as they are."""
    model, _ = made(traced)
    x = torch.randn(2, 4, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint_sequential([torch.sin, torch.cos], 2, x, use_reentrant=False)
    assert torch.equal(y, x.sin().cos())
    assert not traced.instrumentation.clock.errors
    assert model(y).shape == (2, 4)


def test_replicas_call_themselves(traced: Traced) -> None:
    """DataParallel's copies do not call the original module."""
    model, _ = made(traced)
    replica: Any = model._replicate_for_data_parallel()
    replica._modules["inner"] = nn.Identity()
    x = torch.randn(2, 4)

    assert replica(x) is x


def test_a_timed_model_can_be_scripted(traced: Traced) -> None:
    """`torch.jit.script` takes what is in a module's `__dict__` for its data; the model is timed afterwards."""
    model, _ = made(traced)
    x = torch.randn(2, 4)

    scripted = torch.jit.script(model)

    assert torch.equal(scripted(x), model(x))
    assert is_instrumented(model)


@pytest.mark.parametrize("is_part", [False, True])
def test_scripted_modules_are_timed(traced: Traced, *, is_part: bool) -> None:
    """Also as part of a model; they are named as the class, and copied and saved as without a timer."""
    scripted: Any = torch.jit.script(Net())
    model = nn.Sequential(scripted) if is_part else scripted
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()

    copied = copy.deepcopy(scripted)
    torch.jit.save(scripted, io.BytesIO())
    assert "_compiled_call_impl" not in vars(copied)
    # torch makes them without its hooks: the first backward pass looks for models.
    assert [row["forward_ns"] > 0 for row in traced.finish()] == [is_part, True, True]
    assert model_facts(model).items() >= {"model": "Sequential" if is_part else "Net", "parameters": 20}.items()


class OwnCall(Net):
    """A model that torch's `__call__` never sees, as those of GPyTorch."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)


def test_a_call_of_the_class_s_own_is_timed(traced: Traced) -> None:
    """It is the model's forward in training, and evaluation in `eval()`; afterwards the class is as before."""
    own = OwnCall.__call__
    model = OwnCall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 4))

    rows = traced.finish()
    assert len(rows) == 3
    assert [row["forward_ns"] > 0 for row in rows] == [True] * 3
    assert len(traced.table("evals")) == 1
    traced.instrumentation.uninstall()
    assert OwnCall.__call__ is own


class _OwnImplementation(Net):
    """A class that changes what a call of its modules does."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return super()._call_impl(*args, **kwargs) + 1


def _of_the_module(model: Net, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "_call_impl", lambda x: nn.Module._call_impl(model, x) + 1)


def _of_all_modules(model: Net, patch: pytest.MonkeyPatch) -> None:
    original = nn.Module._call_impl
    patch.setattr(nn.Module, "_call_impl", lambda own, x: original(own, x) + (own is model))


def _of_another_class(model: Net, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "__class__", _OwnImplementation)


@pytest.mark.parametrize("change", [_of_the_module, _of_all_modules, _of_another_class])
def test_a_call_that_is_changed_later_is_called(
    change: Callable[[Net, pytest.MonkeyPatch], None], traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilers and monitors of models replace `_call_impl`: a timed model calls what it has by then."""
    model, optimizer = made(traced)
    x = torch.randn(2, 4)
    before = model(x)
    change(model, monkeypatch)

    after = model(x)
    after.sum().backward()
    optimizer.step()

    assert torch.equal(after, before + 1)
    assert traced.finish()[0]["forward_ns"] > 0


def test_an_exception_passes_through(traced: Traced) -> None:
    """A failing forward raises its own error, and the phase is closed."""
    model, _ = made(traced)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, 5))

    assert traced.flight.open_slots[2] == 0
    assert traced.instrumentation.clock.current == 8


@pytest.mark.parametrize("call", [lambda model: model.inner, lambda model: model.forward])
def test_parts_called_directly_are_found(traced: Traced, call: Callable[[Net], Callable[..., torch.Tensor]]) -> None:
    """A script that calls the parts of its model gets forward time after the first step."""
    model, optimizer = made(traced)
    x = torch.randn(2, 4)
    for _ in range(5):
        optimizer.zero_grad()
        call(model)(x).sum().backward()
        optimizer.step()

    assert [row["forward_ns"] > 0 for row in traced.finish()] == [False, True, True, True, True]


def test_parts_of_models_without_a_forward_are_timed_from_the_first_step(traced: Traced) -> None:
    """A flow has a method for its density, which calls those of its layers, which call networks."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def inverse(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.net(x)

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def log_prob(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer.inverse(x)

            return x

    flow, x = Flow(), torch.randn(2, 4)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        flow.log_prob(x).sum().backward()
        optimizer.step()

    assert [row["forward_ns"] > 0 for row in traced.finish()] == [True] * 3


def test_a_model_that_is_called_keeps_its_parts_untimed(traced: Traced) -> None:
    """Their calls are a part of its own."""
    model, optimizer = made(traced)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()

    assert not is_instrumented(model.inner)


class _OwnState(nn.Module):
    """A module that pickles and copies its whole `__dict__`, as DDP and compiled modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_module_that_copies_its_dict_copies_and_pickles_clean(traced: Traced) -> None:
    """The copy calls itself, not the module that it was copied from."""
    model = _OwnState()
    torch.optim.SGD(model.parameters(), lr=0.1)
    assert is_instrumented(model)

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.inner.weight.data.zero_()
        copied.inner.bias.data.zero_()
        assert copied(torch.ones(1, 4)).item() == 0
