"""Trainings one of whose loader workers is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Traceml

SCRIPT = """
import os, signal, sys, torch
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self): return 640
    def __getitem__(self, i):
        if i == 600: os.kill(os.getpid(), signal.SIGKILL)
        return i

model = torch.nn.Linear(64, 64)
opt = torch.optim.SGD(model.parameters(), lr=0.01)
try:
    for x in DataLoader(Data(), batch_size=8, num_workers=2, collate_fn=list):
        model(torch.randn(len(x), 64)).sum().backward()
        opt.step(); opt.zero_grad()
except RuntimeError:
    if sys.argv[1] == "raises": raise
"""


@pytest.mark.parametrize(("mode", "kind", "status"), [("raises", "RANK_LOST", 1), ("catches", "WORKER_LOST", 0)])
def test_the_worker_and_its_signal_are_the_verdict(traceml: Traceml, tmp_path: Path, mode, kind, status) -> None:
    """Also where the script catches the exception and ends well."""
    script = tmp_path / "dies.py"
    script.write_text(SCRIPT)

    ended = traceml("run", script, mode)

    verdict = ended.report["verdict"]
    assert (ended.status, verdict["kind"]) == (status, kind), ended.stderr
    evidence = verdict["evidence"]
    assert (evidence["worker"], evidence["workers"], evidence["worker_signal"]) == (1, 2, 9)
    assert "killed by signal 9 (SIGKILL)" in verdict["summary"]
