"""Random loops over a build of the hooks that checks each access to memory: `python -m ... LIBRARY FOLDER SEED...`.

The checks end the process at the first error.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import itertools
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

from tests.instrument.conftest import Traced
from tests.instrument.native.test_same_rows import Loop
from traceml.database.flight.flight import FlightFile
from traceml.database.schema import METRICS, Slot
from traceml.instrument import install
from traceml.instrument.native import extension as native
from traceml.track.rank.logger import usual_writer


def use(library: Path) -> None:
    """Use a library in place of the one that is installed."""
    spec = importlib.util.spec_from_file_location(native._NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[native._NAME] = module
    assert native.extension() is module
    assert hasattr(ctypes.CDLL(None), "__asan_report_store8"), "AddressSanitizer is not loaded"


def run(folder: Path, seed: int) -> int:
    """Run a loop; return the number of its rows."""
    torch.manual_seed(seed)
    flight = FlightFile.create(folder, {})
    instrumentation = install(flight, device_types=frozenset())
    try:
        Loop(Traced(flight, instrumentation), seed).run()
        instrumentation.close_open_step()
        assert instrumentation.clock.errors == 0
        return flight.ring("steps").appended
    finally:
        instrumentation.uninstall()
        flight.close(unlink=True)


def call_with_many_arguments(folder: Path) -> None:
    """Call a model with as many arguments as fit on the stack, and with more."""
    flight = FlightFile.create(folder, {})
    instrumentation = install(flight)
    try:
        model = _Sum()
        torch.optim.SGD(model.parameters(), lr=0.01)
        for count in range(1, 12):
            assert int(model(*[torch.ones(())] * count, last=torch.ones(()))) == count + 1
    finally:
        instrumentation.uninstall()
        flight.close(unlink=True)


def leave_a_phase_open(folder: Path) -> None:
    """Let the collector take a clock with a user phase that never ended."""
    flight = FlightFile.create(folder, {})
    instrumentation = install(flight)
    instrumentation.phase("open").__enter__()
    clock = weakref.ref(instrumentation.clock)
    instrumentation.uninstall()
    flight.close(unlink=True)
    del instrumentation
    gc.collect()
    assert clock() is None


def log_values(folder: Path) -> int:
    """Log values of every kind through a ring that wraps around; return the number of rows."""
    flight = FlightFile.create(folder, {})
    entries = {"loss": [7, 0]}
    flight.open_slots[int(Slot.STEP)] = -1
    writer = usual_writer(flight, entries, 3)
    assert writer is not None
    values: tuple[Any, ...] = (0.5, 3, True, None, "x", 10**400, -1, float("nan"))
    steps: tuple[Any, ...] = (None, 4, -1, True, 2**63, "x")
    for name, value, step in itertools.product(("loss", "new", b"loss", None), values, steps):
        assert writer(name, value, step) is (
            name == "loss" and type(value) in (int, float) and value != 10**400 and step in (4, -1) and step is not True
        )

    before = flight.metrics.appended
    for step in range(3 * flight.metrics.capacity):
        if not writer("loss", step, step):
            flight.metrics.append(0, step, 7, step, 0, 3)  # makes room for more

    assert flight.metrics.appended == before + 3 * flight.metrics.capacity
    last = METRICS.struct.unpack(flight.metrics.read_from(flight.metrics.appended - 1).data)
    assert last[1:] == (3 * flight.metrics.capacity - 1, 7, 3.0 * flight.metrics.capacity - 1, 0, 3)
    flight.close(unlink=True)
    return flight.metrics.appended


class _Sum(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, *args: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return self.weight * (sum(args) + last)


def main() -> None:
    """Run the loops, and print the number of rows of each."""
    library, folder, seeds = Path(sys.argv[1]), Path(sys.argv[2]), [int(seed) for seed in sys.argv[3:]]
    use(library)
    torch.set_num_threads(1)
    call_with_many_arguments(folder / "arguments")
    leave_a_phase_open(folder / "open")
    log_values(folder / "values")
    print(*(run(folder / str(seed), seed) for seed in seeds))


if __name__ == "__main__":
    main()
