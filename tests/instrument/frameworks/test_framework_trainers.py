"""Calls of frameworks that are not installed with the tests, by packages that look like them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, net, sgd

OPACUS = """
import time
from torch.optim import Optimizer


class DPOptimizer(Optimizer):
    def __init__(self, optimizer):
        self.original_optimizer, self.skipped = optimizer, False

    @property
    def param_groups(self):
        return self.original_optimizer.param_groups

    def pre_step(self):
        time.sleep(0.002)
        return not self.skipped

    def step(self, closure=None):
        return self.original_optimizer.step() if self.pre_step() else None


class AdaClipDPOptimizer(DPOptimizer):
    def pre_step(self):
        time.sleep(0.002)
        return super().pre_step()
"""


@pytest.mark.parametrize(("name", "clip_ns"), [("DPOptimizer", 2_000_000), ("AdaClipDPOptimizer", 4_000_000)])
def test_a_private_step_has_the_batches_whose_gradients_are_only_clipped(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, clip_ns: int
) -> None:
    """Opacus splits a batch that is too large, and skips the steps of all parts but the last."""
    (tmp_path / "opacus").mkdir()
    (tmp_path / "opacus" / "__init__.py").touch()
    (tmp_path / "opacus" / "optimizers.py").write_text(OPACUS)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        optimizers = importlib.import_module("opacus.optimizers")
        model = net()
        optimizer = getattr(optimizers, name)(sgd(model))
        for number, (x,) in enumerate(data(6), 1):
            model(x).square().mean().backward()
            optimizer.skipped = number % 3 > 0
            optimizer.step()

        rows = traced.finish()
    finally:
        for module in ("opacus.optimizers", "opacus"):
            sys.modules.pop(module, None)

    assert [row["micro"] for row in rows] == [3, 3]
    assert all(row["optimizer_ns"] > 3 * clip_ns for row in rows)
