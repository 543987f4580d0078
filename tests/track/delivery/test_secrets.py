"""Secrets planted wherever a run can carry them are in nothing that it leaves behind, nor in a process list."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.eventually import eventually
from tests.recorder.conftest import environ
from tests.track.fabricated import state_of
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
from traceml.track.tracker_state import DeliveryPhase

# Each in its place; cut in two, so that neither this file nor its own diff holds one.
PLANTED = {
    "param": "planted-param-" + "7Hq2",
    "nested": "planted-nested-" + "8Jw3",
    "token": "ghp_" + "Zx9Wv8Ut7Sr6Qp5On4Ml3Kj2Ih1Gf0EdCbA",
    "tag": "planted-tag-" + "9Kx4",
    "text": "planted-text-" + "0Ly5",
    "diff": "planted-diff-" + "1Mz6",
    "environment": "planted-environment-" + "2Na7",
    "argument": "planted-argument-" + "3Ob8",
    "wandb": "planted0wandb0key0" + "4Pc90000000000000000000",
    "remote": "planted-remote-" + "5Qd0",
    "error": "planted-error-" + "6Re1",
    "email": "planted.person@" + "example.org",
    "phone": "+49 170 " + "5550123",
}
# Texts rest in the store as they were logged, on the machine where they were logged; what is delivered is masked.
IN_STORE = {"text", "email", "phone"}

SCRIPT = """
    import json, os, sys, time
    from pathlib import Path
    import traceml

    planted = json.loads(os.environ.pop("PLANTED"))
    lists = set()

    def look():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lists.add(path.read_bytes())
            except OSError:
                pass

    backends, tags = ["jsonl", "tensorboard"], {"api_key": planted["tag"], "owner": planted["email"]}
    config = {"password": planted["param"], "ask": planted["phone"]}
    with traceml.Experiment("planted", backend=backends, tags=tags, config=config) as experiment:
        experiment.log_params({"lr": 0.1, "db": {"password": planted["nested"]}, "note": "with " + planted["token"]})
        experiment.set_tags({"client_secret": planted["tag"]})
        experiment.log_text("note", f"password={planted['text']}\\nmail {planted['email']}, call {planted['phone']}", 1)
        for step in range(100):
            experiment.log_metric("loss", step * 0.5, step)
            look()
            time.sleep(0.01)

    print(json.dumps({"own": [line.decode(errors="replace") for line in lists if b"traceml" in line]}))
    raise RuntimeError("cannot log in with password=" + planted["error"])
"""


def _bytes_of(path: Path) -> bytes:
    return b"" if path.suffix in {".db", ".png"} or path.name.startswith(STORE_NAME) else path.read_bytes()


def _stored(run_dir: Path) -> str:
    with StoreReader(run_dir / STORE_NAME) as reader:
        frames = [frame for table in reader.tables for frame in reader.frames(table)]
        return "".join(frame.data.decode("utf-8", "replace") for frame in frames) + repr(reader.meta())


def _script(tmp_path: Path) -> Path:
    """Put the script into a repository with a password in its remote and another in an uncommitted change."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org"]
    script, settings = folder / "train.py", folder / "config.py"
    settings.write_text("lr = 0.1\n")
    script.write_text(textwrap.dedent(SCRIPT))
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["commit", "-q", "-m", "first"],
        ["remote", "add", "origin", f"https://bob:{PLANTED['remote']}@git.example.org/a.git"],
    ):
        subprocess.run([*git, *arguments], cwd=folder, check=True)

    settings.write_text(f'lr = 0.1\nDB_PASSWORD = "{PLANTED["diff"]}"\n')
    return script


def test_planted_secrets_are_nowhere(tmp_path: Path) -> None:
    """Neither files of the run, nor rows of its store, nor command lines of its processes hold one."""
    script = _script(tmp_path)
    own = {
        "PLANTED": json.dumps(PLANTED),
        "HF_TOKEN": PLANTED["environment"],
        "WANDB_API_KEY": PLANTED["wandb"],
        "TRACEML_PORT": "0",
        "TRACEML_RUN_ID": "planted",
    }
    from tests.aggregator.conftest import TOKEN, Serving

    server = Serving(tmp_path / "runs", tmp_path / "log")
    try:
        own |= {"TRACEML_PORT": str(server.port), "TRACEML_TOKEN": TOKEN}
        done = subprocess.run(
            [sys.executable, str(script), "--api-key", PLANTED["argument"]],
            env=environ(tmp_path, **own), cwd=script.parent, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert "cannot log in" in done.stderr
        run_dir = tmp_path / "runs" / "planted"
        eventually(
            lambda: all(state_of(run_dir, name).phase is DeliveryPhase.DONE for name in ("jsonl", "tensorboard"))
        )
    finally:
        server.stop()
        server.close()

    left = b"".join(_bytes_of(path) for path in [*run_dir.rglob("*"), tmp_path / "log"] if path.is_file())
    stored = _stored(run_dir)
    assert b"loss" in left  # it is there that was logged
    assert b"[masked:secret]" in left
    assert "[masked:secret]" in stored
    assert {name for name, secret in PLANTED.items() if secret.encode() in left} == set()
    assert {name for name, secret in PLANTED.items() if secret in stored} <= IN_STORE

    lines = json.loads(done.stdout.splitlines()[-1])["own"]
    started = [line for line in lines if str(script) not in line]
    assert any("traceml" in line for line in started)
    assert {name for name, secret in PLANTED.items() if secret in "".join(started)} == set()
    assert os.environ.get("PLANTED") is None
