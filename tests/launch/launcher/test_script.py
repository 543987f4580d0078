"""Whole launches: what workers write and return reaches the launcher, from this host and through ssh."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import traceml
from tests.launch.hosts import Hosts
from traceml.errors import PayloadError, WorkerFailedError

HERE: dict[str, Any] = {"hostnames": ["localhost"], "backend": None}

SCRIPT = """
import ctypes, json, logging, os, sys
import numpy, torch
import traceml

def chat(lines):
    for i in range(lines):
        print(i, "x" * 60)
    ctypes.CDLL(None).puts(b"from C")
    os.write(2, b"no newline")
    logging.getLogger("my.module").warning("logged %d", 3)

def change(model, array):
    with torch.no_grad():
        model.weight.add_(array.sum())
    array[:] = int(os.environ["RANK"])
    return model, array, b"b" * 3_000_000

if __name__ == "__main__":
    hosts = {"hostnames": ["node1", "alias2"], "ssh_config_file": sys.argv[1], "workers_per_host": 1, "backend": None}
    traceml.launch(chat, (100_000,), **hosts)
    model, array = torch.nn.Linear(1000, 1000), numpy.ones(500_000)
    before = model.weight.detach().clone()
    result = traceml.launch(change, func_kwargs={"model": model, "array": array}, log_handlers=None, **hosts)
    told = []
    for rank in (0, 1):
        changed, filled, raw = result.rank(rank)
        filled += 1
        right = torch.equal(changed.weight, before + 500_000) and changed.weight.requires_grad
        told.append([right, filled.sum(), len(raw)])
    told.append([array.sum(), torch.equal(model.weight, before)])
    print(json.dumps(told))
"""


def messages(path: Path) -> list[str]:
    """The lines of a log file without their time."""
    return [line[20:] for line in path.read_text().splitlines()]


def test_through_ssh_every_line_arrives_and_large_values_travel_both_ways(hosts: Hosts, tmp_path: Path) -> None:
    """100,000 lines of each worker are in its file; models and arrays come back changed, and ours are as before."""
    done = hosts.launcher.python(SCRIPT, hosts.ssh_config, env={"TRACEML_LOG_DIR": str(tmp_path)})
    *shown, told = done.stdout.splitlines()

    assert json.loads(told) == [
        [True, 500_000.0, 3_000_000],
        [True, 1_000_000.0, 3_000_000],
        [500_000.0, True],
    ]
    (folder,) = tmp_path.iterdir()
    for name in ("node1[0].log", "alias2[0].log"):
        written = messages(folder / name)
        assert [line for line in written if line.endswith("x")] == [f"INFO: {i} {'x' * 60}" for i in range(100_000)]
        assert [line for line in written if not line.endswith("x")].count("INFO: from C") == 1
        assert {"ERROR: no newline", "WARNING: logged 3"} <= set(written)

    assert len(shown) == 100_003
    assert all("node1[0]" in line for line in shown)


def _crash() -> None:
    import ctypes

    for i in range(2000):
        print("word", i)

    ctypes.string_at(0)


def test_the_last_words_of_a_crash_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line before a segmentation fault, and where it happened; the error shows the end of it."""
    monkeypatch.setenv("TRACEML_LOG_DIR", str(tmp_path))
    with pytest.raises(WorkerFailedError) as caught:
        traceml.launch(_crash, workers_per_host=1, **HERE)

    (path,) = tmp_path.glob("*/localhost[[]0].log")
    written = messages(path)

    assert [line for line in written if "word" in line] == [f"INFO: word {i}" for i in range(2000)]
    assert any("Fatal Python error: Segmentation fault" in line for line in written)
    assert any("in _crash" in line for line in written)
    assert caught.value.signal == 11
    assert any("Segmentation fault" in line for line in caught.value.log_tail)


def _share(array: np.ndarray[Any, Any], tensor: torch.Tensor) -> tuple[float, torch.Tensor]:
    total = float(array.sum()) + float(tensor.sum())
    tensor += int(os.environ["RANK"])
    return total, tensor


def test_large_values_of_this_host_are_each_launchs_own() -> None:
    """They are handed over in memory, but what a worker changes is its own, and so is what we change."""
    array, tensor = np.ones(400_000), torch.zeros(400_000, requires_grad=False)
    result = traceml.launch(_share, (array, tensor), workers_per_host=2, log_handlers=None, **HERE)
    (first, zeros), (second, ones) = result.results["localhost"]
    zeros += 5

    assert first == second == 400_000
    assert (ones == 1).all()
    assert (tensor == 0).all()
    assert (zeros == 5).all()

    del result, zeros, ones
    gc.collect()
    files = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [name for name in files if "memfd:traceml" in name and "stacks" not in name]  # those are of all tests


def test_what_cannot_be_sent_is_named() -> None:
    """An argument, before anything starts; and a result, with its worker."""
    with pytest.raises(PayloadError, match=r"argument 'func': cannot pickle '_thread.lock'"):
        traceml.launch(_call, (threading.Lock(),), workers_per_host=1, **HERE)

    with pytest.raises(PayloadError, match=r"the result: cannot pickle '_thread.lock'") as caught:
        traceml.launch(_call, (threading.Lock,), workers_per_host=1, log_handlers=None, **HERE)

    assert "rank 0" in "".join(caught.value.__notes__)


def _call(func: Any) -> Any:
    return func()


class Slow(logging.Handler):
    """A handler that takes a while, as one that mails would."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        time.sleep(0.0005)
        self.lines.append(record.getMessage())


def _talk(lines: int) -> None:
    for i in range(lines):
        print(i)


def test_a_slow_handler_gets_everything() -> None:
    """`launch` returns once it has."""
    slow = Slow()
    traceml.launch(_talk, (3000,), workers_per_host=1, log_handlers=[slow], **HERE)

    assert slow.lines == [str(i) for i in range(3000)]


def test_a_script_that_ends_by_exit_0_has_succeeded(tmp_path: Path) -> None:
    """It need not return to us: `os._exit` leaves without a message, and a daemon's code closes the connection."""
    (tmp_path / "job.py").write_text(
        "import os\n"
        "print(os.environ['RANK'], flush=True)\n"
        "os._exit(0) if os.environ['RANK'] == '0' else os.closerange(3, 1 << 16)\n"
    )
    words = ["--hostnames", "localhost", "--workers-per-host", "2", "job.py"]
    done = subprocess.run(
        [sys.executable, "-m", "traceml", "launch", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    report = json.loads((tmp_path / "traceml_runs" / "latest" / "report.json").read_text())

    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert report["run"]["state"] == "finished"
    assert [rank["state"] for rank in report["ranks"]] == ["finished", "finished"]
