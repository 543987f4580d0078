"""The tokens of a job are in no command line, log, store, report or tracker that it leaves behind."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest

from tests.forked import client as forked
from tests.recorder.conftest import environ
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME

SCRIPT = """
    import json, os, sys, time
    from pathlib import Path
    import torch, traceml

    def look(name):
        found = []
        for path in Path("/proc").glob(f"[0-9]*/{name}"):
            try:
                found.append(path.read_bytes())
            except OSError:
                pass
        return b"".join(found).decode(errors="replace")

    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folder = Path(os.environ["XDG_RUNTIME_DIR"], "traceml")
    lines, step, until = "", 0, time.monotonic() + 120

    def are_served():
        kinds = {path.name.partition("-")[0] for path in folder.glob("*.json")}
        return kinds >= {"aggregator", "metrics", "page"} and "traceml.display.web" in lines

    with traceml.Experiment("tokens", backend="jsonl") as experiment:
        while step < 60 or not are_served() and time.monotonic() < until:
            loss = model(torch.randn(2, 4)).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            experiment.log_metric("loss", loss.item(), step)
            lines += look("cmdline")
            step += 1
            time.sleep(0.02)

    tokens = {path.name: json.loads(path.read_text())["token"] for path in folder.glob("*.json")}
    Path(os.environ["FOUND"]).write_text(json.dumps({"tokens": tokens, "lines": lines}))
    raise RuntimeError("the end")
"""


def _stored(run_dir: Path) -> str:
    with StoreReader(run_dir / STORE_NAME) as reader:
        frames = [frame for table in reader.tables for frame in reader.frames(table)]
        events = repr([event.data for event in reader.events()])
        streams = repr([stream.facts for stream in reader.streams()])
        return (
            "".join(frame.data.decode("utf-8", "replace") for frame in frames) + repr(reader.meta()) + events + streams
        )


@pytest.mark.process
def test_tokens_are_nowhere(tmp_path: Path) -> None:
    """Those of aggregator, page and metrics; the page's is in the one line that tells its address, and only there."""
    script, found = tmp_path / "train.py", tmp_path / "found.json"
    script.write_text(textwrap.dedent(SCRIPT))
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    options = ["--live", "web", "--prometheus", "0.0.0.0:0", "--runs-dir", str(tmp_path / "runs")]
    given = "kitten-of-the-user"  # looks like no secret
    own = {"XDG_RUNTIME_DIR": str(runtime), "TRACEML_TOKEN": given, "FOUND": str(found), "TRACEML_DEBUG": "1"}
    done = forked.run(
        [sys.executable, "-m", "traceml", "run", *options, str(script)],
        forks=True, env=environ(tmp_path, **own), cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip

    assert "the end" in done.stderr, done.stderr
    told = json.loads(found.read_text())
    tokens = {**told["tokens"], "given": given}
    assert sorted(name.partition("-")[0] for name in tokens) == ["aggregator", "given", "metrics", "page"], tokens
    assert "traceml.display.web" in told["lines"]
    assert {name for name, token in tokens.items() if token in told["lines"]} == set()

    run_dir = (tmp_path / "runs" / "latest").resolve()
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    left = b"".join(path.read_bytes() for path in files) + _stored(run_dir).encode()
    assert b"loss" in left
    assert any(path.suffix == ".jsonl" for path in files)
    assert (run_dir / "report.html").is_file()
    assert {name for name, token in tokens.items() if token.encode() in left} == set()

    lines = [
        line for line in (done.stdout + done.stderr).splitlines() if any(token in line for token in tokens.values())
    ]
    assert len(lines) == 1, lines
    assert "the page is at http://127.0.0.1:" in lines[0]
