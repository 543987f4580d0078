"""Pages that are followed from top to bottom, as a reader does: files are saved, commands run, and claims checked."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.documentation.pages import ROOT, blocks
from tests.forked.commands import Commands

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]  # on a loaded machine a start alone takes 10 s


@pytest.fixture
def follow(tmp_path):
    """Return a function that saves the files of a page, runs a line of the shell, and returns what it printed."""

    def follow(page: str, *lines: str) -> list[str]:
        for block in blocks("python"):
            if block.page == page and block.file:
                (tmp_path / block.file).write_text(block.text)

        return [_run(line, tmp_path) for line in lines]

    return follow


def _run(line: str, folder: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRACEML_", "MLFLOW_"))}
    kept |= {"OMP_NUM_THREADS": "1", "TRACEML_DELIVERY_NICE": "0", "XDG_CACHE_HOME": str(folder / "cache")}
    with closing(Commands(folder / "bin")) as commands:
        done = subprocess.run(
            ["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False, timeout=240,
            env=kept | {"PATH": commands.path()},
        )  # fmt: skip

    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout + done.stderr


def _lines(page: str) -> list[str]:
    return [line for block in blocks("sh") if block.page == page for line in block.shell_lines()]


def test_the_quick_start_finds_the_bottleneck(follow, tmp_path):
    """The first run waits for data in the line that the page shows, and the comparison is with that run."""
    lines = _lines("docs/quickstart.md")

    before, _, after, compared = follow("docs/quickstart.md", *lines)

    place = "train.py:12 Photos.__getitem__"
    assert place in before or "CPU_CONTENTION" in before  # the verdict where other programs take the cores
    assert "num_workers" in (tmp_path / "train.py").read_text()
    assert "─ traceml ─" in after
    assert "-before-" in compared
    found = _run("traceml report $(ls traceml_runs | grep before) --json", tmp_path)
    assert [place in each["summary"] for each in json.loads(found)["findings"] if each["kind"] == "INPUT_BOUND"] == [
        True
    ]


def test_values_arrive_in_mlflow(follow, tmp_path):
    """The script of the page logs into the database that the page opens, with every step and parameter."""
    line = next(line for line in _lines("docs/guides/mlflow.md") if line.endswith("python logged.py"))
    opened = next(line for line in _lines("docs/guides/mlflow.md") if line.startswith("mlflow ui"))

    follow("docs/guides/mlflow.md", line.partition(" ")[2], "traceml sync --wait")

    with sqlite3.connect(tmp_path / opened.partition("sqlite:///")[2]) as database:
        losses = database.execute("SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step").fetchall()
        params = dict(database.execute("SELECT key, value FROM params WHERE key IN ('lr', 'batch_size')").fetchall())

    assert losses == [(step, 1 / (step + 1)) for step in range(100)]
    assert params == {"lr": "0.1", "batch_size": "64"}


def test_the_trace_is_analyzed(follow):
    """Each command of the page works on the trace that the page's script writes."""
    lines = [line for line in _lines("docs/guides/analyze-a-trace.md") if "export" not in line]

    _, overview, groups, reads, as_json = follow("docs/guides/analyze-a-trace.md", *lines)

    assert "compute" in overview
    assert "read" in groups
    assert "409,600" in reads or "400 KiB" in reads
    assert json.loads(as_json)["schema"].startswith("traceml.analysis/")


def test_the_template_of_slurm_is_the_file():
    """The page shows the file as it is, and bash can parse it."""
    template = ROOT / "examples" / "slurm" / "train.sbatch"
    (shown,) = [block.text for block in blocks("sh") if "#SBATCH --requeue" in block.text and "#!/" in block.text]

    assert shown.strip() == template.read_text().strip()
    assert subprocess.run(["bash", "-n", str(template)], check=False).returncode == 0
