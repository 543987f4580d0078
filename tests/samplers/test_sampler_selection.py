"""Samplers of this machine, where one of them cannot be started."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import get_args

import pytest

from traceml.database.schema import SAMPLED_TABLES
from traceml.fail_open import failures
from traceml.samplers import sampler_selection
from traceml.samplers.base import Sampler
from traceml.samplers.gpu import GpuSampler
from traceml.samplers.sampler_selection import open_samplers
from traceml.settings import SamplerName


@pytest.mark.parametrize(
    ("error", "counted", "level"),
    [(OSError("no NVML"), 0, "DEBUG"), (TypeError("a bug of ours"), 1, "WARNING")],
    ids=["the machine lacks it", "our own error"],
)
def test_a_sampler_that_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, counted: int, level: str
) -> None:
    """The others are opened; an error of ours is counted and shown, a part that the machine lacks is neither."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(sampler_selection, "load_nvml", fail)
    caplog.set_level(logging.DEBUG, logger="traceml")
    before = failures().get("samplers", 0)

    opened = open_samplers(local_rank=0)
    for sampler in opened:
        sampler.close()

    assert {"process", "host", "limits"} <= {sampler.name for sampler in opened}
    assert failures().get("samplers", 0) - before == counted
    assert [record.levelname for record in caplog.records if str(error) in record.getMessage()] == [level]


def _all_samplers(base: type[Sampler] = Sampler) -> Iterator[type[Sampler]]:
    for each in base.__subclasses__():
        yield from (each, *_all_samplers(each))


def test_each_table_of_a_sampler_is_sampled() -> None:
    """Its rows are summed over the run, and sent less often in a large job; a new sampler is not left out."""
    own = [each for each in _all_samplers() if each.__module__.startswith("traceml.")]

    assert len(own) >= 7
    assert {each.table.name for each in own} <= {table.name for table in SAMPLED_TABLES}


def test_each_sampler_may_have_an_interval() -> None:
    """The setting names all of them: a name that none has is refused."""
    own = {each.name for each in _all_samplers() if each.__module__.startswith("traceml.")}

    assert GpuSampler.name in own
    assert own == {*get_args(SamplerName)}
