"""Descriptions of models, as the rules read them."""

from __future__ import annotations

import torch
from torch import nn

from traceml.diagnosis.facts.job_facts import JobFactsBuilder
from traceml.instrument.facts import model_facts


def test_the_threads_of_torch_reach_the_rules():
    """Advice on OMP_NUM_THREADS compares them with the cores."""
    before = torch.get_num_threads()
    builder = JobFactsBuilder()
    try:
        torch.set_num_threads(3)
        builder.info(0, model_facts(nn.Linear(2, 2)))
    finally:
        torch.set_num_threads(before)

    assert builder.build().threads == 3
