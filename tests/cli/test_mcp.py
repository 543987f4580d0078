"""`traceml mcp` with the client of the `mcp` package, on a real run."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.eventually import eventually
from tests.forked import client as forked
from traceml import cli
from traceml.cli.assistants.json_documents import document_schema

TRAIN = """
import time
import torch
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, at):
        time.sleep(0.02)
        return torch.randn(8)

model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for batch in DataLoader(Slow(), batch_size=1):
    optimizer.zero_grad()
    model(batch).sum().backward()
    optimizer.step()
"""
WAIT = "\nimport sys\nprint('trained', flush=True)\nsys.stdin.readline()\n"


def environ() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("TRACEML_")} | {
        "OMP_NUM_THREADS": "1"
    }


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "traceml", *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real run whose data set is slow."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "train.py").write_text(TRAIN)
    done = forked.run(
        command("run", "--live", "none", "train.py"),
        forks=True,
        cwd=folder,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder


async def _asked(folder: Path, calls: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    from mcp import Client, StdioServerParameters  # a second of CPU in each worker that collects this file

    server = StdioServerParameters(
        command=sys.executable, args=command("mcp", "--runs-dir", "traceml_runs")[1:], env=environ(), cwd=str(folder)
    )
    async with Client(server) as client:
        assert sorted(tool.name for tool in (await client.list_tools()).tools) == [
            "analyze", "compare", "explain_kind", "findings", "list_runs", "report", "stacks",
        ]  # fmt: skip
        return [await client.call_tool(name, arguments) for name, arguments in calls]


def asked(folder: Path, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    return asyncio.run(asyncio.wait_for(_asked(folder, list(calls)), 100))


def test_why_a_training_is_slow(folder: Path) -> None:
    """An assistant finds the run, its cause, the meaning of the kind, and the line."""
    runs, findings, explained, lines = asked(
        folder,
        ("list_runs", {}),
        ("findings", {}),
        ("explain_kind", {"kind": "INPUT_BOUND"}),
        ("report", {"sections": ["lines", "phases"]}),
    )

    assert len(runs.structured_content["runs"]) == 1
    assert runs.content[0].text == json.dumps(runs.structured_content, indent=2)  # as the bound counts it
    found = findings.structured_content["findings"]
    (finding,) = [each for each in found if each["kind"] == "INPUT_BOUND"]  # the first, where the cores are free
    assert finding["cost_share"] > 0.5
    assert [each["next"] for each in json.loads(findings.content[0].text)["findings"]] == [
        each["next"] for each in found
    ]
    assert "data" in explained.structured_content["raised"]
    assert lines.structured_content["phases"][0]["phase"] == "input_wait"


def test_the_report_of_a_real_run_is_as_published(folder: Path) -> None:
    """The file that the run left, by the schema."""
    (path,) = (folder / "traceml_runs").glob("2*-train-*/report.json")
    report = json.loads(path.read_text())

    jsonschema.validate(report, document_schema("report"))
    assert len(report["step_times"]["ms"]) == report["step_times"]["of_steps"] > 40


def test_errors_reach_the_assistant(folder: Path) -> None:
    """With the text that says what to do; the server goes on."""
    missing, outside, alone, unknown, bad, fine = asked(
        folder,
        ("findings", {"run": "nosuch"}),
        ("analyze", {"paths": ["/etc/hosts"]}),
        ("compare", {}),
        ("compare", {"a": "one", "b": "another"}),
        ("list_runs", {"limit": "many"}),
        ("list_runs", {}),
    )

    for result, what in (
        (missing, "no run 'nosuch'"),
        (outside, "--traces DIR"),
        (alone, "last-healthy"),
        (unknown, "compare has no argument 'a'; it has run, baseline"),
        (bad, "limit"),
    ):
        assert result.is_error
        assert what in result.content[0].text
    assert not fine.is_error


def test_the_stacks_of_a_running_job(tmp_path: Path) -> None:
    """While the job waits; it ends as it would have."""
    (tmp_path / "wait.py").write_text(TRAIN + WAIT)
    words = command("run", "--live", "none", "wait.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with forked.Popen(words, forks=True, cwd=tmp_path, env=environ(), **pipes) as job:
        assert job.stdout is not None
        assert "trained" in job.stdout.readline()

        def told() -> Any:
            (stacks,) = asked(tmp_path, ("stacks", {}))
            ranks = [] if stacks.is_error else stacks.structured_content["ranks"]
            return stacks if any(rank["user_line"] for rank in ranks) else None  # one that has no core tells none

        stacks = eventually(told, "the rank to be connected")
        job.communicate("\n", timeout=240)

    assert job.returncode == 0
    jsonschema.validate(stacks.structured_content, document_schema("stacks"))
    (rank,) = stacks.structured_content["ranks"]
    assert rank["user_line"]["file"].endswith("wait.py")


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As in an installation without the extra."""
    for name in [name for name in sys.modules if name.split(".")[0] == "mcp"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mcp", None)

    assert cli.main(["mcp"]) == 3
    assert (
        capsys.readouterr().err
        == "traceml mcp: mcp needs the package mcp, version 2: pip install 'traceml-torch[mcp]'\n"
    )
