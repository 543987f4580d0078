"""`traceml demo` and its training script."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import pytest

from tests.forked import client as forked
from traceml import cli
from traceml.cli import demo


@pytest.fixture
def started(monkeypatch):
    """Record the arguments of `traceml run`."""
    from traceml.cli import run

    seen: list[list[str]] = []
    monkeypatch.setattr(run, "main", lambda words: seen.append(words) or 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what the demonstration sets would stay for the tests after it
    return seen


def test_demo_is_a_run_with_two_ranks_and_a_slow_one(started):
    """The demonstration goes through `traceml run`, whose status is its own."""
    assert cli.main(["demo"]) == 5

    (words,) = started
    assert words[:4] == ["--run-name", "demo", "--nproc-per-node", "2"]
    assert words[words.index("--fault") + 1 :] == ["forward", "--rank", "1", "--ms", "15"]
    assert Path(words[4]).exists()


def test_options_choose_the_fault(started):
    """Fault, rank, length, ranks and view can be chosen; without a fault no rank is slow."""
    cli.main(["demo", "--fault", "input", "--rank", "0", "--ms", "7.5", "--steps", "9", "--live", "none"])
    cli.main(["demo", "--fault", "none", "--ranks", "4"])

    assert started[0][4:6] == ["--live", "none"]
    assert started[0][7:] == ["--steps", "9", "--fault", "input", "--rank", "0", "--ms", "7.5"]
    assert "--fault" not in started[1]
    assert started[1][3] == "4"


def test_unknown_fault(started, capsys):
    """An unknown fault is a usage error that lists the faults."""
    assert cli.main(["demo", "--fault", "gpu"]) == 2
    assert "'forward', 'input'" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize("missing", ["torch", "sklearn"])
def test_missing_package_is_named(started, capsys, monkeypatch, missing):
    """Without torch or scikit-learn the error says how to install them."""
    monkeypatch.setattr(demo, "find_spec", lambda module: None if module == missing else object())

    assert cli.main(["demo"]) == 3

    error = capsys.readouterr().err
    assert {"torch": "torch", "sklearn": "scikit-learn"}[missing] in error
    assert "pip install 'traceml-torch[demo]'" in error
    assert started == []


def test_nothing_beside_the_script_hides_a_module(started):
    """Python looks in the script's folder first: a `profile.py` there would be the one that torch imports."""
    cli.main(["demo"])

    beside = {path.stem for path in Path(started[0][4]).parent.glob("*.py")}
    assert beside == {"__init__", "_demo_train"}


@pytest.fixture
def demo_train() -> Iterator[ModuleType]:
    """The script, on one thread as in the demonstration; its import of scikit-learn is long, so it comes late."""
    script = import_module("traceml.cli.demonstration._demo_train")
    threads = script.torch.get_num_threads()
    script.torch.set_num_threads(1)
    yield script
    script.torch.set_num_threads(threads)


def test_script_trains(demo_train, capsys):
    """Alone the script learns the digits, and prints loss and accuracy."""
    demo_train.main(["--steps", "100"])

    *steps, last = capsys.readouterr().out.splitlines()
    assert [line.split("loss")[0].split() for line in steps] == [["step", "50/100"], ["step", "100/100"]]
    assert float(last.split()[-1].rstrip("%")) > 60


@pytest.mark.parametrize("fault", get_args(get_type_hints(demo.DemoOptions)["fault"]))
def test_each_fault_costs_its_time(demo_train, fault, monkeypatch):
    """A fault sleeps once per step on the slow rank, and on no other."""
    naps: list[float] = []
    monkeypatch.setattr(demo_train.time, "sleep", naps.append)

    demo_train.main(["--steps", "5", "--fault", fault, "--rank", "0", "--ms", "12"])
    on_slow_rank, naps[:] = list(naps), []
    demo_train.main(["--steps", "5", "--fault", fault, "--rank", "1", "--ms", "12"])

    # The evaluation at the end is one more forward.
    expected = {"none": 0, "forward": 6}.get(fault, 5)
    assert on_slow_rank == [0.012] * expected
    assert naps == []


def test_script_knows_nothing_of_traceml(demo_train):
    """The script, and the example beside it, run where traceml is not installed."""
    for script in (Path(demo_train.__file__), Path(__file__).parents[2] / "examples" / "mnist.py"):
        assert "import traceml" not in script.read_text()


def test_example_trains():
    """The MNIST example runs unchanged, and learns."""
    example = Path(__file__).parents[2] / "examples" / "mnist.py"
    words = ["--epochs", "1", "--train-images", "256", "--test-images", "100", "--batch-size", "32"]

    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = forked.run([sys.executable, example, *words], env=environ, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stderr

    assert "Train Epoch: 1 [0/8 batches]" in done.stdout
    assert "Accuracy: " in done.stdout.splitlines()[-1]
