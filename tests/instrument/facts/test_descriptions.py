"""Facts about the objects of the script."""

from __future__ import annotations

import pytest
import torch

from traceml.instrument.facts.descriptions import optimizer_facts


class OwnOptimizer:
    """One that is none of torch's."""

    def __init__(self, params):
        self.params = list(params)


@pytest.mark.parametrize(
    ("make", "options", "fused"),
    [
        (torch.optim.AdamW, {}, False),
        (torch.optim.AdamW, {"fused": True}, True),
        (torch.optim.LBFGS, {}, None),
        (torch.optim.RMSprop, {}, None),
        (OwnOptimizer, {}, None),
    ],
)
def test_whether_an_optimizer_is_fused(make, options, fused):
    """None is one that has no such form."""
    assert optimizer_facts(make(torch.nn.Linear(2, 2).parameters(), **options))["fused"] is fused
