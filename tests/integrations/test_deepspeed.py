"""DeepSpeed's real engine on CPU ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.integrations.conftest import jobs_in


@pytest.mark.frameworks
@pytest.mark.timeout(400)  # the first start of DeepSpeed compiles an extension
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_on_two_ranks(tmp_path: Path, stage: int) -> None:
    """A step is one of the engine's, with its micro-batches; its collectives are communication."""
    with jobs_in(tmp_path, timeout_s=380) as job:
        ended = job("deepspeed_job.py", str(stage), ranks=2)

    steps = ended.run.steps()

    assert ended.said == {"steps": 20}
    assert Counter(steps["rank"].tolist()) == {0: 20, 1: 20}
    assert steps["micro_batches"].tolist() == [2] * 40
    for phase in ("forward", "backward", "comm", "optimizer"):
        assert (steps[f"{phase}_ns"] > 0).all(), phase
