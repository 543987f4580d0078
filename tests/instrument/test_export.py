"""A trained model is exported as without tracing: to the same graph, for batches of any size, without a warning."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.instrument.conftest import Traced


def exported(model: nn.Module) -> str:
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model, (torch.ones(6, 4),), dynamic_shapes=sizes, strict=False)
    return str(program.graph)


def scripted(model: nn.Module) -> str:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, torch.ones(6, 4)), file)
    file.seek(0)
    return re.sub(r"___torch_mangle_\d+\.", "", str(torch.jit.load(file).inlined_graph))  # numbers of types


def made(model: nn.Module) -> str:
    return str(make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.ones(6, 4)).graph)


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(torch.randn(2, 4))  # remembered, and looked for in the next batches


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("export", [exported, scripted, made])
def test_a_trained_model_is_exported(
    traced: Traced, caplog: pytest.LogCaptureFixture, export: Callable[[nn.Module], str], trains: bool
) -> None:
    """The graph is that of a model without hooks, and torch warns of no line of ours."""
    model, plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    train(model)
    plain.load_state_dict(model.state_dict())

    with warnings.catch_warnings(), caplog.at_level(logging.WARNING), torch.set_grad_enabled(trains):
        warnings.simplefilter("error", torch.jit.TracerWarning)
        expected, graph = export(plain), export(model)

    traced.finish()
    assert graph == expected
    assert not [record for record in caplog.records if record.name == "traceml"]


def test_a_torch_that_cannot_be_asked_trains(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked is no public name: without an answer batches are not measured, and the training continues."""

    def fail() -> bool:
        raise AttributeError

    monkeypatch.setattr("traceml.instrument.values.inputs._is_fx_tracing", fail)
    train(nn.Linear(4, 3))

    assert [row["samples"] for row in traced.finish()] == [0]
