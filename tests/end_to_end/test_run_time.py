"""The run's time, of real runs: its parts are what the script did, and they add up to the wall time."""

from __future__ import annotations

import time

import pytest

from tests.end_to_end.conftest import Ended, Traceml

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch.utils.data import DataLoader, Dataset

class Items(Dataset):
    def __len__(self): return 80
    def __getitem__(self, i): return torch.randn(8)

def train(model, optimizer, epochs, workers=0):
    loader = DataLoader(Items(), batch_size=4, num_workers=workers)
    for _ in range(epochs):
        for x in loader:
            optimizer.zero_grad(); model(x).mean().backward(); optimizer.step(); time.sleep(0.01)

def evaluate(model):
    model.eval()
    with torch.no_grad():
        for x in DataLoader(Items(), batch_size=40):
            model(x); time.sleep(0.4)
    model.train()

torch.set_num_threads(1)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
what = sys.argv[1]
while not list(Path("traceml_runs").glob("*/store.db")):  # a rank that is killed before it connects tells no start
    time.sleep(0.01)
time.sleep(1)
if what == "epochs":
    train(model, optimizer, 3, workers=1)
elif what == "evaluation":
    train(model, optimizer, 2); evaluate(model); torch.save(model.state_dict(), "model.pt"); train(model, optimizer, 2)
    time.sleep(1)
elif what == "ctrl-c":
    train(model, optimizer, 3); os.kill(os.getpid(), signal.SIGINT); time.sleep(5)
elif what == "kill":
    train(model, optimizer, 3); os.kill(os.getpid(), signal.SIGKILL)
elif what == "restart":
    train(model, optimizer, 2)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise RuntimeError("once")
"""
SHAPES = {
    "epochs": {"startup": 1.0, "steps": 0.6},
    "evaluation": {"startup": 1.0, "steps": 0.8, "evaluation": 0.8, "idle": 1.0},
    "ctrl-c": {"startup": 1.0, "steps": 0.6},
    "kill": {"startup": 1.0, "steps": 0.6},
    "restart": {"startup": 1.0, "steps": 0.8, "restart": 1.0},
    "no steps": {"unexplained": 1.0},
}
OTHERS = {"unexplained", "idle", "between_epochs", "checkpoint"}


def run(traceml: Traceml, shape: str) -> tuple[Ended, float]:
    """Run the script; return it, and the seconds that the whole command took."""
    script = traceml.folder / "train.py"
    script.write_text(SCRIPT)
    options = ("--nproc-per-node", "1", "--max-restarts", "1") if shape == "restart" else ()
    began = time.monotonic()
    return traceml("run", "--live", "none", *options, script, shape), time.monotonic() - began


@pytest.mark.parametrize("shape", SHAPES)
def test_the_parts_are_those_of_the_script(traceml: Traceml, shape: str) -> None:
    """Each takes at least what the script sleeps in it, and all add up; only without steps is time unexplained."""
    ended, took_s = run(traceml, shape)

    section = ended.report["time"]
    parts = {part["part"]: part["seconds"] for part in section["parts"]}
    assert sum(parts.values()) == pytest.approx(section["wall_s"], rel=0.01)
    if "unexplained" not in SHAPES[shape]:
        assert parts.get("unexplained", 0.0) <= 0.01 * section["wall_s"]

    assert section["wall_s"] == pytest.approx(ended.report["run"]["duration_s"], rel=0.01)
    assert section["wall_s"] < took_s
    for part, least_s in SHAPES[shape].items():
        assert parts[part] >= 0.95 * least_s, parts

    assert set(parts) - OTHERS == set(SHAPES[shape]) - OTHERS
