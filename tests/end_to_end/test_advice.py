"""Advice on real runs: followed, it gives the promised gain; where it would gain nothing, it is not given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Traceml

READS = """
import sys, time, torch
from torch.utils.data import DataLoader, Dataset

class Remote(Dataset):
    def __len__(self): return 8 * 70
    def __getitem__(self, i):
        time.sleep(0.01)
        return torch.randn(64), i % 10

torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
opt = torch.optim.SGD(model.parameters(), lr=0.01)
for x, y in DataLoader(Remote(), batch_size=8, num_workers=int(sys.argv[1])):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    opt.zero_grad(); loss.backward(); opt.step()
    time.sleep(0.02)
"""


LOGS = """
import sys, time, torch

def log_images(step):
    if step % int(sys.argv[1]) == 0:
        time.sleep(0.4)

torch.set_num_threads(1)
model = torch.nn.Linear(64, 10)
opt = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(161):
    model(torch.randn(8, 64)).sum().backward()
    opt.step(); opt.zero_grad()
    time.sleep(0.015)
    log_images(step)
"""


OPENS = """
import resource, sys, time, torch
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
kept = []

torch.set_num_threads(1)
model = torch.nn.Linear(64, 10)
opt = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(150):
    model(torch.randn(8, 64)).sum().backward()
    opt.step(); opt.zero_grad()
    file = open(__file__)
    kept.append(file) if sys.argv[2] == "keeps" else file.close()
    time.sleep(0.02)
"""


def report(traceml: Traceml, script: Path, *words: str, **environ: str) -> dict[str, Any]:
    ended = traceml("run", script, *words, **environ)
    assert ended.status == 0, ended.stderr
    return ended.report


def test_workers_as_advised_give_the_promised_gain(traceml: Traceml, tmp_path: Path) -> None:
    """A dataset that waits for a server: more workers than cores."""
    script = tmp_path / "reads.py"
    script.write_text(READS)
    before = report(traceml, script, "0")
    verdict = before["verdict"]
    assert verdict["kind"] == "INPUT_BOUND"
    assert verdict["evidence"]["fetch_cpu_share"] < 0.3
    workers = verdict["evidence"]["workers_advised"]
    assert f"num_workers={workers}" in verdict["next"]

    after = report(traceml, script, str(workers))

    gain = before["steps"]["p50_ms"] / after["steps"]["p50_ms"]
    assert gain == pytest.approx(verdict["speedup_if_fixed"], rel=0.3)


def test_long_steps_half_as_often_give_the_promised_gain(traceml: Traceml, tmp_path: Path) -> None:
    """Every 10th step logs: it is named with its line, and is no jitter."""
    script = tmp_path / "logs.py"
    script.write_text(LOGS)
    before = report(traceml, script, "10")
    verdict = before["verdict"]
    assert (verdict["kind"], verdict["evidence"]["every_n_steps"]) == ("RESIDUAL_HEAVY", 10)
    assert verdict["evidence"]["function"] == "log_images"
    assert "JITTER" not in {finding["kind"] for finding in before["findings"]}

    after = report(traceml, script, "20")

    gain = before["steps"]["mean_ms"] / after["steps"]["mean_ms"]
    assert gain == pytest.approx(verdict["speedup_if_fixed"], rel=0.3)


def test_files_that_are_closed_come_to_no_limit(traceml: Traceml, tmp_path: Path) -> None:
    """A file that is opened in each step, and never closed; a higher limit is further away."""
    script = tmp_path / "opens.py"
    script.write_text(OPENS)

    def found(*words: str) -> dict[str, Any] | None:
        findings = report(traceml, script, *words, TRACEML_SAMPLER_INTERVALS='{"limits": 0.2}')["findings"]
        return next((each for each in findings if each["kind"] == "LIMIT_NEAR"), None)

    near = found("400", "keeps")
    assert near is not None
    assert near["evidence"]["resource"] == "open_files"
    assert "never closed" in near["next"]
    assert found("400", "closes") is None
    assert found("4096", "keeps") is None
