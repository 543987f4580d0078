"""Alerts of real jobs of two ranks under `traceml run`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forked import client as forked
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME

pytestmark = pytest.mark.process

TRAINING = """
import os, signal, sys, time, torch, torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")
rank = dist.get_rank()
model = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 400

    def __getitem__(self, index):
        time.sleep(DELAY)
        return torch.ones(8)


for number, x in enumerate(torch.utils.data.DataLoader(Slow(), batch_size=1)):
    if number == LAST and rank == 1:
        END
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def _run(folder: Path, code: str, after_s: float, *targets: str, **settings: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(code)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRACEML_")}
    environ |= {
        "OMP_NUM_THREADS": "1",
        "TRACEML_ON_FINDING": json.dumps(targets),
        "TRACEML_ON_FINDING_AFTER": str(after_s),
        **settings,
    }
    command = [sys.executable, "-m", "traceml", "run", "--nproc-per-node", "2", "--live", "none", "--runs-dir", "runs"]
    return forked.run(
        [*command, "train.py"], forks=True, cwd=folder, env=environ, capture_output=True, text=True, timeout=180
    )


def _alerts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(each.read_text()) for each in sorted(folder.glob("alert-*.json"))]


def _to_file(folder: Path) -> str:
    return f"cat > {folder}/part-$$ && mv {folder}/part-$$ {folder}/alert-$$.json"


def test_a_finding_that_stands_is_reported_while_the_job_runs(tmp_path: Path) -> None:
    """Once; the run keeps when it was told, also to whom it could not be told."""
    code = TRAINING.replace("DELAY", "0.03").replace("LAST", "-1").replace("END", "pass")
    done = _run(tmp_path, code, 2.0, _to_file(tmp_path), "exit 7")
    assert done.returncode == 0, done.stderr

    (alert,) = [each for each in _alerts(tmp_path) if each["finding"]["kind"] == "INPUT_BOUND"]
    (run_dir,) = [each for each in (tmp_path / "runs").glob("2*") if each.is_dir()]
    assert alert["run"]["id"] == run_dir.name
    with StoreReader(run_dir / STORE_NAME) as reader:
        told = [each.data for each in reader.events(kind="alert")]

    events = [each for each in told if each["kind"] == "INPUT_BOUND"]
    assert sorted((each["target"], bool(each["error"])) for each in events) == [
        ("command cat", False), ("command exit", True)
    ]  # fmt: skip
    report = json.loads((run_dir / "report.json").read_text())
    # On a busy machine another finding may stand as long.
    assert report["telemetry"]["failures"] == {"aggregator": sum(bool(each["error"]) for each in told)}


def test_a_lost_rank_is_reported_at_the_end(tmp_path: Path) -> None:
    """At once, and before the command ends."""
    code = TRAINING.replace("DELAY", "0").replace("LAST", "60").replace("END", "os.kill(os.getpid(), signal.SIGKILL)")
    done = _run(tmp_path, code, 1000.0, _to_file(tmp_path))

    assert done.returncode == 128 + signal.SIGKILL
    (alert,) = _alerts(tmp_path)
    assert (alert["finding"]["kind"], alert["finding"]["ranks"]) == ("RANK_LOST", [1])
    assert "SIGKILL" in alert["text"]


def test_a_hang_is_reported_at_the_end(tmp_path: Path) -> None:
    """Of a job that is ended because it hangs."""
    code = TRAINING.replace("DELAY", "0").replace("LAST", "60").replace("END", "time.sleep(600)")
    _run(tmp_path, code, 1000.0, _to_file(tmp_path), TRACEML_HANG_TIMEOUT="5", TRACEML_ON_HANG="abort")

    (alert,) = [each for each in _alerts(tmp_path) if each["finding"]["kind"] == "HANG"]
    assert alert["finding"]["ranks"] == [1]


COMPUTING = """
import time, torch, torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")
torch.set_num_threads(1)


class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x):
        for _ in range(1 + 40 * dist.get_rank()):
            x = torch.sin(x)
            time.sleep(0.001)
        return self.inner(x)


model = nn.parallel.DistributedDataParallel(Uneven())
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
for _ in range(500):
    model(torch.ones(16, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_job_that_computes_is_profiled_by_itself(tmp_path: Path) -> None:
    """Once; the finding has the operators with their lines, and the run has the file."""
    done = _run(tmp_path, COMPUTING, 0.0, TRACEML_PROFILE_ON_FINDING="3")
    assert done.returncode == 0, done.stderr

    (run_dir,) = [each for each in (tmp_path / "runs").glob("2*") if each.is_dir()]
    with StoreReader(run_dir / STORE_NAME) as reader:
        (event,) = reader.events(kind="profile")

    assert (run_dir / event.data["file"]).exists()
    assert (event.data["kind"], event.data["ranks"]) == ("COMPUTE_STRAGGLER", [1])
    verdict = json.loads((run_dir / "report.json").read_text())["verdict"]
    assert verdict["kind"] == "COMPUTE_STRAGGLER"
    assert verdict["evidence"]["profile"] == "profile.json.gz"
    assert any("train.py:17 Uneven.forward" in each for each in verdict["evidence"]["operators"])
