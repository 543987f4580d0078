"""Samplers of this machine, where one of them cannot be started."""

from __future__ import annotations

import logging

import pytest

from traceml.fail_open import failures
from traceml.samplers import sampler_selection
from traceml.samplers.sampler_selection import open_samplers


@pytest.mark.parametrize(
    ("error", "counted", "level"),
    [(OSError("no NVML"), 0, "DEBUG"), (TypeError("a bug of ours"), 1, "WARNING")],
    ids=["the machine lacks it", "our own error"],
)
def test_a_sampler_that_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, counted: int, level: str
) -> None:
    """The others are opened; an error of ours is counted and shown, a part that the machine lacks is neither."""

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(sampler_selection, "GpuSampler", fail)
    caplog.set_level(logging.DEBUG, logger="traceml")
    before = failures().get("samplers", 0)

    opened = open_samplers(local_rank=0)
    for sampler in opened:
        sampler.close()

    assert {"process", "host", "limits"} <= {sampler.name for sampler in opened}
    assert failures().get("samplers", 0) - before == counted
    assert [record.levelname for record in caplog.records if str(error) in record.getMessage()] == [level]
