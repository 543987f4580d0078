"""Descriptions of models, as the rules read them."""

from __future__ import annotations

import torch
from torch import nn

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, net, sgd, train
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.instrument.facts.descriptions import model_facts


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


def test_detection_of_anomalies_is_reported_while_it_is_on(traced: Traced) -> None:
    """It is told at the first backward pass, and when it has ended."""
    model = net()
    optimizer = sgd(model)
    with torch.autograd.set_detect_anomaly(True):
        for (x,) in data(3):
            train(model, optimizer, x)

    rows = [row["on"] for row in traced.info if row["kind"] == "anomaly_detection"]
    for (x,) in data(130):
        train(model, optimizer, x)

    assert rows == [True]
    assert [row["on"] for row in traced.info if row["kind"] == "anomaly_detection"] == [True, False]


def test_usual_trainings_report_no_detection_of_anomalies(traced: Traced) -> None:
    """Nothing is told of what is off."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(70):
        train(model, optimizer, x)

    assert "anomaly_detection" not in {row["kind"] for row in traced.info}


def test_models_and_optimizers_have_their_step(traced: Traced) -> None:
    """A second training in the same process has other sizes from its first step on."""
    for width, batches in ((8, 3), (16, 4)):
        model = torch.nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))
        optimizer = sgd(model)
        for (x,) in data(batches):
            train(model, optimizer, x)

    builder = JobFactsBuilder()
    for row in traced.info:
        builder.info(0, row)

    assert len(builder.build().other_models) == 1
    assert 2 <= builder.build().other_models[0] <= 3
