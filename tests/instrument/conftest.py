"""An installed instrumentation over a real flight file, and its rows as they lie there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from tests.database.info_rows import undeclared
from tests.instrument.fake_cuda import FakeCuda
from traceml.clock import monotonic_ns
from traceml.database.flight.flight import FlightFile
from traceml.database.schema import TABLES, Phase, StepFlag, Table, unpack_bits
from traceml.instrument import Instrumentation, device, install
from traceml.instrument.native.extension import extension, use_time

FEW_ROWS = dict.fromkeys(("steps", "device_steps", "user_phases", "metrics"), 4096)
"""Rows of the largest tables that are enough for a test: to reserve the 13 MB of a usual file takes 4 ms."""


@dataclass
class Traced:
    """An instrumented process and its rows."""

    flight: FlightFile
    instrumentation: Instrumentation
    info: list[dict[str, Any]] = field(default_factory=list)
    started_ns: int = 0

    def table(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a packed table."""
        table = TABLES[name]
        assert isinstance(table, Table)
        ring = self.flight.ring(name)
        names = [column.name for column in table.columns]
        return [
            dict(zip(names, values, strict=True))
            for values in table.struct.iter_unpack(ring.read_from(0, ring.appended).data)
        ]

    def steps(self) -> list[dict[str, Any]]:
        """Return the step rows, with the parts of `bits` as `micro`, `flags` and `sequence`."""
        rows = self.table("steps")
        for row in rows:
            row["micro"], flags, row["sequence"] = unpack_bits(row["bits"])
            row["flags"] = StepFlag(flags)
            row["other_ns"] = row["total_ns"] - sum(row[f"{phase.name.lower()}_ns"] for phase in Phase)

        return rows

    def names(self) -> dict[int, str]:
        """Return the names of user phases by id."""
        log = self.flight.log("names")
        unpacker = msgpack.Unpacker()
        unpacker.feed(log.read(0, log.appended))
        return {row["id"]: row["name"] for row in unpacker}

    def finish(self) -> list[dict[str, Any]]:
        """End the run, check what holds for every run, return the step rows."""
        self.instrumentation.close_open_step()
        ended = monotonic_ns()
        assert self.instrumentation.clock.errors == 0
        steps, evals = self.steps(), self.table("evals")
        assert [row["step"] for row in steps] == list(range(len(steps)))
        for row in steps:
            assert row["other_ns"] >= 0, row
            assert all(row[f"{phase.name.lower()}_ns"] >= 0 for phase in Phase), row

        assert steps == sorted(steps, key=lambda row: row["t_end_ns"])
        spent = sum(row["total_ns"] for row in steps) + sum(row["ns"] for row in evals)
        assert spent <= ended - self.started_ns
        return steps


@pytest.fixture(params=["native", "python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Hooks in C, and in Python; the clock is the real one again afterwards."""
    form: str = request.param
    monkeypatch.setenv("TRACEML_NATIVE", "1" if form == "native" else "0")
    if form == "native" and extension() is None:
        pytest.skip("the hooks in C are not built: install the package with a compiler and Python's headers")

    yield form

    use_time(None)


@pytest.fixture
def traced(form: str, tmp_path: Path) -> Iterator[Traced]:
    """Hooks installed, one compute thread, all of it undone afterwards."""
    gc.collect()  # models and optimizers of the test before are garbage, and found otherwise
    gc.freeze()  # no later collection and no search goes through what torch and the tests have imported
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flight = FlightFile.create(tmp_path / "flight", {}, capacities=FEW_ROWS)
    info: list[dict[str, Any]] = []
    began_ns = monotonic_ns()  # the first step begins while the hooks are installed
    instrumentation = install(flight, on_info=info.append)
    traced = Traced(flight, instrumentation, info, began_ns)
    yield traced

    instrumentation.uninstall()
    flight.close(unlink=True)
    torch.set_num_threads(threads)
    assert undeclared(info) == set()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Devices in place of torch.cuda."""
    fake = FakeCuda()
    monkeypatch.setattr(device, "CudaDevice", lambda: fake)
    return fake
