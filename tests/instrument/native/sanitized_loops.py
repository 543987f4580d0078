"""Random loops over a build of the hooks that checks each access to memory: `python -m ... LIBRARY FOLDER SEED...`.

The checks end the process at the first error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import torch

from tests.instrument.conftest import Traced
from tests.instrument.native.test_same_rows import Loop
from traceml.database.flight.flight import FlightFile
from traceml.instrument import install
from traceml.instrument.native import extension as native


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
    print(*(run(folder / str(seed), seed) for seed in seeds))


if __name__ == "__main__":
    main()
