"""A fault put into a real training is named: its kind, its rank, its phase. A healthy one is left in peace."""

from __future__ import annotations

from pathlib import Path

import pytest

import traceml as package
from tests.end_to_end.conftest import Traceml

DEMO = Path(package.__file__).parent / "cli" / "demonstration" / "_demo_train.py"
MNIST = Path(package.__file__).parents[2] / "examples" / "mnist.py"
BLAMING = {"INPUT_STRAGGLER", "COMPUTE_STRAGGLER", "H2D_STRAGGLER", "STRAGGLER", "RANK_LOST"}


@pytest.mark.parametrize(
    ("fault", "kind", "phase"),
    [
        ("input", "INPUT_STRAGGLER", "input_wait"),
        ("forward", "COMPUTE_STRAGGLER", "forward"),
        ("backward", "COMPUTE_STRAGGLER", "backward"),
        ("optimizer", "COMPUTE_STRAGGLER", "optimizer"),
        ("other", "STRAGGLER", "other"),
    ],
)
def test_a_slow_rank_is_named(traceml: Traceml, fault: str, kind: str, phase: str) -> None:
    """Rank 1 is 20 ms late in one phase."""
    ended = traceml("demo", "--fault", fault, "--ms", "20", "--steps", "100")

    assert ended.status == 0, ended.stderr
    verdict = ended.report["verdict"]
    assert (verdict["kind"], verdict["ranks"], verdict["phase"]) == (kind, [1], phase)
    assert verdict["cost_share"] > 0.25
    assert verdict["severity"] == "critical"
    assert verdict["speedup_if_fixed"] > 1.3
    assert "ank 1" in verdict["summary"]


def test_a_slow_rank_among_four_is_named(traceml: Traceml) -> None:
    """Also with more ranks than cores."""
    ended = traceml("demo", "--fault", "forward", "--rank", "2", "--ms", "40", "--steps", "80", "--ranks", "4")

    assert ended.status == 0, ended.stderr
    verdict = ended.report["verdict"]
    assert (verdict["kind"], verdict["ranks"], verdict["phase"]) == ("COMPUTE_STRAGGLER", [2], "forward")


def test_a_healthy_run_blames_nobody(traceml: Traceml) -> None:
    """No fault, no culprit."""
    ended = traceml("demo", "--fault", "none", "--steps", "150")

    assert ended.status == 0, ended.stderr
    assert ended.report["verdict"]["kind"] not in BLAMING, ended.report["verdict"]


SLOW = """
import time, torch
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self): return 2000
    def __getitem__(self, i):
        time.sleep({item})
        return torch.randn(64), i % 10

model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
opt = torch.optim.SGD(model.parameters(), lr=0.01)
for n, (x, y) in enumerate(DataLoader(Slow(), batch_size=8)):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    opt.zero_grad(); loss.backward(); opt.step()
    time.sleep({after})
    if n == 80: break
"""


@pytest.mark.parametrize(
    ("item", "after", "kind", "phase"),
    [(0.002, 0.0, "INPUT_BOUND", "input_wait"), (0.0, 0.02, "RESIDUAL_HEAVY", "other")],
)
def test_what_one_process_waits_for_is_named(
    traceml: Traceml, tmp_path: Path, item: float, after: float, kind: str, phase: str
) -> None:
    """A slow dataset, and slow code beside the training."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(item=item, after=after))

    ended = traceml("run", script)

    assert ended.status == 0, ended.stderr
    verdict = ended.report["verdict"]
    assert (verdict["kind"], verdict["ranks"], verdict["phase"]) == (kind, [], phase)


BESIDE = """
import time, torch

def update_metric():
    until = time.perf_counter() + 0.03
    while time.perf_counter() < until: sum(range(100))

model = torch.nn.Linear(64, 64)
opt = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(200):
    model(torch.randn(8, 64)).sum().backward()
    opt.step(); opt.zero_grad()
    update_metric()
"""


def test_the_line_that_takes_the_time_is_named(traceml: Traceml, tmp_path: Path) -> None:
    """Python code that holds the GIL, in one process."""
    script = tmp_path / "beside.py"
    script.write_text(BESIDE)

    ended = traceml("run", script)

    assert ended.status == 0, ended.stderr
    verdict = ended.report["verdict"]
    evidence = verdict["evidence"]
    assert verdict["kind"] == "RESIDUAL_HEAVY"
    assert (evidence["file"], evidence["line"], evidence["function"]) == (str(script), 6, "update_metric")
    assert evidence["line_share"] > 0.8
    assert "beside.py:6 update_metric" in verdict["summary"]


THREAD = """
import threading, time, torch

def keep_statistics():
    number = 0
    while True:
        for i in range(1000): number = (number * 31 + i) % 1000003

model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
opt = torch.optim.Adam(model.parameters())
step, end_s = 0, time.monotonic() + 6  # of 10 to 40 ms each: a short run has too few samples of the thread
while step < 220 or time.monotonic() < end_s:
    model(torch.randn(8, 64)).sum().backward()
    opt.step(); opt.zero_grad()
    step += 1
    if step == 9: threading.Thread(target=keep_statistics, daemon=True).start()  # not while modules are imported
"""


@pytest.mark.alone  # ranks that wait for a core do not wait for the lock
def test_a_thread_that_holds_the_interpreters_lock_is_named(traceml: Traceml, tmp_path: Path) -> None:
    """Each operation of torch releases the lock, and gets it back 5 ms later."""
    script = tmp_path / "thread.py"
    script.write_text(THREAD)

    ended = traceml("run", script)

    assert ended.status == 0, ended.stderr
    found = [each for each in ended.report["findings"] if each["kind"] == "GIL_CONTENTION"]
    assert len(found) == 1, ended.report["findings"]
    assert found[0]["evidence"]["function"] == "keep_statistics"
    assert "keep_statistics into another process" in found[0]["next"]


# At least 32 steps of each rank, half of them in each epoch.
@pytest.mark.parametrize(("ranks", "images"), [(1, 2048), (2, 2048), (4, 4096)])
def test_an_example_as_pytorch_writes_them(traceml: Traceml, ranks: int, images: int) -> None:
    """Unmodified, with evaluation between epochs: every training step is counted, nobody is blamed."""
    many = ("--nproc-per-node", str(ranks)) if ranks > 1 else ()
    ended = traceml("run", *many, MNIST, "--epochs", "2", "--train-images", str(images))

    assert ended.status == 0, ended.stderr
    report = ended.report
    assert report["verdict"]["kind"] not in BLAMING | {"INSUFFICIENT_DATA"}, report["verdict"]
    assert {rank["steps"] for rank in report["ranks"]} == {report["steps"]["count"]}
    parts = sum(phase["mean_ms"] for phase in report["phases"])
    assert parts == pytest.approx(report["steps"]["mean_ms"], rel=0.01)
