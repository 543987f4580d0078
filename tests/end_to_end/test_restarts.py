"""Two ranks that are killed and restarted twice, with checkpoints and without: what was repeated, and the goodput."""

from __future__ import annotations

import pytest

from tests.end_to_end.conftest import Traceml

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
torch.set_num_threads(1)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
path, done, dies = Path(f"saved/{rank}.pt"), 0, {0: 25, 1: 45}.get(attempt)
if path.exists():
    done = torch.load(path)["steps"]
for step, (x,) in enumerate(DataLoader(TensorDataset(torch.randn(240, 8)), batch_size=4)):
    if step < done:
        continue
    optimizer.zero_grad(); model(x).mean().backward(); optimizer.step(); time.sleep(0.03)
    if step == dies and rank == 1:
        while not Path(f"waits-{attempt}").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if dies is not None and step == dies + 4 and rank == 0:
        Path(f"waits-{attempt}").touch()
        signal.pause()
    if sys.argv[1] == "saves" and step % 10 == 9:
        path.parent.mkdir(exist_ok=True)
        torch.save({"model": model.state_dict(), "steps": step + 1}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
"""


# Rank 1 makes 26, 26 and 20 steps with checkpoints. Each time it is killed before its last step has a row; rank 0 makes
# at most four steps more, and waits for torchrun to end it.
@pytest.mark.parametrize(("how", "repeated", "second"), [("saves", 12, 45), ("starts_over", 72, 45)])
def test_steps_after_the_last_checkpoint_are_repeated(traceml: Traceml, how: str, repeated: int, second: int) -> None:
    """With checkpoints those since the last one, without them all."""
    script = traceml.folder / "train.py"
    script.write_text(SCRIPT)

    ended = traceml("run", "--nproc-per-node", "2", "--max-restarts", "2", script, how)

    assert ended.status == 0, ended.stderr
    report = ended.report
    time = report["time"]
    assert time["productive_steps"] == 60
    assert repeated - 2 <= time["repeated_steps"] <= repeated + 8
    assert time["failures"] == 2
    assert time["mtbf_s"] == pytest.approx(time["productive_s"] / 2, rel=1e-3)
    assert time["goodput"] == pytest.approx(time["productive_s"] / time["wall_s"], rel=1e-3)
    assert [restart["step"] for restart in report["run"]["restarts"]] == [25, second]
    assert "2 failures" in " ".join(ended.stderr.split())
