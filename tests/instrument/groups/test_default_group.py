"""Training under `with Join(...)`."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from tests.instrument.conftest import Traced


def test_the_step_at_which_a_rank_leaves_join_is_reported(traced: Traced, tmp_path: Path) -> None:
    """Of each epoch: the wait for ranks with more batches is in that step or in the next one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            with Join([model]):
                for x in torch.utils.data.DataLoader(torch.randn(20, 8), batch_size=4):
                    optimizer.zero_grad()
                    model(x).sum().backward()
                    optimizer.step()

        steps = traced.finish()
    finally:
        dist.destroy_process_group()

    assert len(steps) == 10
    assert [row["step"] for row in traced.info if row["kind"] == "joined"] in ([4, 9], [5, 9], [5, 10])
