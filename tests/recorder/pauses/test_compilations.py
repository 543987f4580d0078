"""Compilations as dynamo's own records tell them."""

from __future__ import annotations

import pytest
import torch

from traceml.database.schema import Compiled
from traceml.recorder.pauses.compilations import CompilationReader


class Named(torch.nn.Module):
    """A model whose code depends on a text."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum, times the length of the text."""
        return x.sum() * len(self.name)


@pytest.fixture
def reader():
    torch._dynamo.reset()
    found = CompilationReader()
    found.drain()
    yield found
    torch._dynamo.reset()


def call(module: Named, compiled, texts) -> None:
    for text in texts:
        module.name = text
        compiled(torch.ones(3))


@pytest.mark.filterwarnings("ignore")
def test_other_values_compile_anew_until_the_limit(reader):
    """The first, seven more with their guard, and the call that ran uncompiled; each once, with the function's line."""
    module = Named()
    compiled = torch.compile(module, backend="eager")
    call(module, compiled, "abc")
    first = reader.drain()
    call(module, compiled, "abcdefghij")
    then = reader.drain()

    assert [each.detail for each in first] == [Compiled.FIRST, Compiled.AGAIN, Compiled.AGAIN]
    assert [each.detail for each in then] == [*[Compiled.AGAIN] * 5, *[Compiled.LIMIT] * (len(then) - 5)]
    assert len(then) > 5
    assert first[1].guard == "self.name == 'a'"
    assert all(each.place.startswith(f"{__file__}:") and each.place.endswith(" forward") for each in [*first, *then])
    assert all(each.ns > 0 for each in [*first, *then])
    assert reader.drain() == []


def test_without_torch_there_is_nothing():
    """A script that has not imported dynamo."""
    assert CompilationReader(modules={}).drain() == []
