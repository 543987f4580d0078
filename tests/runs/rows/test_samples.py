"""Samples that are kept of a long run."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.database.schema import GPU, PROCESS
from traceml.runs.rows.samples import Samples


@pytest.mark.parametrize("at_once", [1, 50, 20_000])
def test_a_long_run_is_covered_from_its_beginning(at_once):
    """Of 20,000 samples a bounded number is kept, the newest whole, the others at even distances."""
    samples = Samples()
    for first in range(0, 20_000, at_once):
        rows = np.zeros(at_once, PROCESS.dtype)
        rows["t_ns"] = np.arange(first, first + at_once)
        samples.add(PROCESS.name, 0, rows)
        samples.of(PROCESS.name, 0)

    times = samples.of(PROCESS.name, 0)["t_ns"]

    assert len(times) <= samples.max_rows
    assert times[0] == 0
    assert times[-samples.max_rows // 2 :].tolist() == list(range(20_000 - samples.max_rows // 2, 20_000))
    assert np.diff(times).max() < 64


@pytest.mark.parametrize("devices", [2, 8])
def test_each_device_keeps_samples_of_the_same_times(devices):
    """A host's GPUs are sampled one after another, and none of them has fewer samples than the others."""
    samples = Samples()
    for second in range(4_000):
        rows = np.zeros(devices, GPU.dtype)
        rows["t_ns"], rows["index"] = second, np.arange(devices)
        samples.add(GPU.name, 0, rows)

    rows = samples.of(GPU.name, 0)
    times = [rows["t_ns"][rows["index"] == index] for index in range(devices)]

    assert max(np.diff(each, prepend=0).max() for each in times) < 100
    assert max(map(len, times)) - min(map(len, times)) <= 1
