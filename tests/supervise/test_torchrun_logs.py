"""`torchrun --logs-specs traceml`, with the real torchrun: files by rank in the run's folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import traceml
from tests.forked import client as forked

_SCRIPT = """
import os, sys, torch
rank = os.environ["RANK"]
print(f"out of {rank}", flush=True)
print(f"err of {rank}", file=sys.stderr, flush=True)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(30):
    optimizer.zero_grad(); model(torch.randn(2, 4)).sum().backward(); optimizer.step()
if len(sys.argv) > 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(3)
"""
_PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def torchrun(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run torchrun with this checkout's entry points, which the installed distribution may be too old for."""
    group = "torchrun.logs_specs"
    entries = tomllib.loads(_PROJECT.read_text())["project"]["entry-points"][group]
    metadata = folder / "path" / "checkout-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: checkout\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
    )
    script = folder / "train.py"
    script.write_text(_SCRIPT)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRACEML")}
    environ = {**kept, "PYTHONPATH": str(metadata.parent), "TRACEML": "1", "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "torch.distributed.run", "--logs-specs", "traceml", *words]
    return forked.run(command, forks=True, env=environ, cwd=folder, capture_output=True, text=True, timeout=240)


def logs(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (run / "logs").glob("rank-*.log")}


def test_each_rank_has_its_files_in_the_traced_run(tmp_path: Path) -> None:
    """Both streams, on the terminal with the rank too, in the folder of the run that the ranks are stored in."""
    ended = torchrun(tmp_path, "--standalone", "--nproc-per-node", "2", "train.py")

    assert ended.returncode == 0, ended.stderr
    (run,) = traceml.runs(runs_dir=tmp_path / "traceml_runs")
    found = logs(tmp_path / "traceml_runs" / run.id)
    assert sorted(found) == ["rank-0.err.log", "rank-0.out.log", "rank-1.err.log", "rank-1.out.log"]
    assert "out of 1\n" in found["rank-1.out.log"]
    assert "out of 0" not in found["rank-1.out.log"]
    assert "err of 1\n" in found["rank-1.err.log"]
    assert "[default1]:out of 1" in ended.stdout
    assert "-train-" in run.id
    assert (tmp_path / "traceml_runs" / ".gitignore").read_text() == "*\n"


def test_a_restart_keeps_the_first_attempts_output(tmp_path: Path) -> None:
    """Its files have its number; with `--redirects 1` standard error is on the terminal alone."""
    words = ["--max-restarts", "1", "--redirects", "1", "--standalone", "--nproc-per-node", "1", "train.py", "fail"]
    ended = torchrun(tmp_path, *words, TRACEML_RUN_ID="mine")

    assert ended.returncode == 0, ended.stderr
    found = logs(tmp_path / "traceml_runs" / "mine")
    assert sorted(found) == ["rank-0.out.log", "rank-0.restart-1.out.log"]
    assert "err of 0" in ended.stderr


@pytest.mark.parametrize("run_id", ["", "shared"])
def test_several_nodes_need_an_id(run_id: str, tmp_path: Path, monkeypatch, caplog) -> None:
    """Without one for all, torchrun's own folder is used, and the warning says what to set."""
    from traceml.supervise.torchrun_logs import RunLogsSpecs

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRACEML_RUN_ID", raising=False)
    if run_id:
        monkeypatch.setenv("TRACEML_RUN_ID", run_id)

    envs = {0: {"RANK": "5", "GROUP_WORLD_SIZE": "2"}}
    found = RunLogsSpecs(log_dir=str(tmp_path / "own")).reify(envs)

    if run_id:
        assert found.stdouts[0] == str(tmp_path / "traceml_runs" / "shared" / "logs" / "rank-5.out.log")
        assert envs[0]["TRACEML_RUN_ID"] == "shared"
    else:
        assert found.stdouts[0].startswith(str(tmp_path / "own"))
        assert "TRACEML_RUN_ID" not in envs[0]
        assert "Set TRACEML_RUN_ID to the same value" in caplog.text
