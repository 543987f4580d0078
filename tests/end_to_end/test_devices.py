"""A script that uses, or could use, an accelerator: tracing leaves the driver and the training alone."""

from __future__ import annotations

import sys

import pytest

from tests.end_to_end.conftest import TINY, Traceml
from tests.forked import client as forked

# torch calls this at the end of its import, before our hooks, as it does with backends of other vendors.
SPY = """
import sys, torch

asked = []

def refused(name, original):
    def call(*arguments, **options):
        if "traceml" not in sys._getframe(1).f_code.co_filename:
            return original(*arguments, **options)  # torch's optimizers ask, too

        asked.append(name)
        raise RuntimeError(f"{name} asks the driver")

    return call

def install():
    torch._C._has_cuda = True  # as in a build for CUDA
    torch._C._cuda_getCurrentRawStream = None
    for module, names in {
        torch.cuda: ("is_available", "device_count", "current_device", "current_stream", "init", "_lazy_init",
                     "get_device_properties", "memory_stats", "is_current_stream_capturing"),
        torch.accelerator: ("is_available", "device_count", "current_accelerator", "current_stream"),
        torch._C: ("_cuda_getDeviceCount", "_cuda_init", "_cuda_getDevice", "_accelerator_getAccelerator"),
    }.items():
        for name in names:
            setattr(module, name, refused(f"{module.__name__}.{name}", getattr(module, name, None)))
"""
TRAIN = """
import os, sys
if "--init" in sys.argv:
    import traceml
    traceml.init(local=True)

import torch
import spy

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(70):
    optimizer.zero_grad()
    model(torch.randn(2, 4).to(torch.float32)).sum().backward()
    optimizer.step()

if "--init" in sys.argv:
    traceml.shutdown()

print("asked", sorted(set(spy.asked)), "built", torch.backends.cuda.is_built())
"""
FLAKY = """
import itertools, runpy, sys, torch
from traceml.instrument import backward, forward, optimizer, phase_timer
from traceml.instrument.native.extension import use_time

calls = itertools.count()
original = phase_timer.monotonic_ns

def flaky():
    if next(calls) == 2000:
        raise RuntimeError("the clock fails")

    return original()

for module in (backward, forward, optimizer, phase_timer):
    module.monotonic_ns = flaky

use_time(flaky)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def spied(traceml: Traceml) -> Traceml:
    """The command and a script, with a torch for CUDA that refuses to ask the driver."""
    folder = traceml.folder
    (folder / "spy.py").write_text(SPY)
    (folder / "train.py").write_text(TRAIN)
    installed = folder / "spy-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: spy\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[torch.backends]\nspy = spy:install\n")
    traceml.environ["PYTHONPATH"] = str(folder)
    return traceml


def test_run_never_asks_the_driver(spied: Traceml) -> None:
    """Hooks and samplers of a CPU job ask for no device, so later forks and `CUDA_VISIBLE_DEVICES` work as before."""
    ended = spied("run", "train.py", TRACEML_SAMPLE_INTERVAL="0.05")

    assert (ended.status, ended.stdout) == (0, "asked [] built True\n"), ended.stderr
    assert ended.report["steps"]["count"] == 70
    assert ended.report["telemetry"]["failures"] == {}


def test_init_never_asks_the_driver(spied: Traceml) -> None:
    """Nor does `traceml.init()`."""
    ended = forked.run(
        [sys.executable, "train.py", "--init"],
        cwd=spied.folder,
        env=spied.environ,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (0, "asked [] built True\n"), ended.stderr


def test_a_failing_clock_does_not_reach_training(traceml: Traceml) -> None:
    """Loss and status are those of the plain script, and the report counts the failure."""
    (traceml.folder / "flaky.py").write_text(FLAKY)
    words = [sys.executable, TINY, "--steps", "400"]
    plain = forked.run(words, env=traceml.environ, capture_output=True, text=True, check=True)

    ended = traceml("run", "flaky.py", TINY, "--steps", "400")

    assert (ended.status, ended.stdout) == (0, plain.stdout), ended.stderr
    assert ended.report["telemetry"]["failures"] == {"instrument": 1}
    assert 0 < ended.report["steps"]["count"] < 400
