"""Processes that write flight files and are killed; the name is the module: `python -m … killed_writers WHAT FOLDER`.

Each command prints one JSON line per process that it killed.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path

from traceml.database.flight.flight import FlightFile
from traceml.database.schema import STEPS, Phase, Slot

# Words of the witness, a second mapping that the victim writes around what it does to the flight file.
READY, BEGUN, DONE, PHASE = range(4)
PHASES = (Phase.INPUT_WAIT, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)


def kill_many(folder: Path, times: int, seed: int) -> None:
    """Kill -9 one writer after another, each at a random moment of a tight loop."""
    moments = random.Random(seed)
    for _ in range(times):
        memory = mmap.mmap(-1, 4096)
        witness = memoryview(memory).cast("q")
        child = os.fork()
        if child == 0:
            write_forever(folder, witness)

        while not witness[READY]:
            time.sleep(0.0005)

        time.sleep(moments.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(json.dumps({"pid": child, "begun": witness[BEGUN], "done": witness[DONE], "phase": witness[PHASE]}))


def write_forever(folder: Path, witness: memoryview[int]) -> None:
    """Append rows whose columns follow from their number, with phases open around them, until killed."""
    flight = FlightFile.create(folder, {"rank": 3}, capacities={"steps": 4096})
    ring, info = flight.ring("steps"), flight.log("info")
    pack_into, buffer, offset, mask = ring.pack_into, ring.buffer, ring.offset, ring.mask
    row_bytes, count, slot, open_slots = ring.row_bytes, ring.count, ring.slot, flight.open_slots
    witness[READY] = 1
    n = 0
    while True:
        open_slots[Slot.STEP] = n
        for phase in PHASES:
            open_slots[phase] = time.perf_counter_ns()
            witness[PHASE] = phase + 1
            for _ in range(100):  # most of the time is spent in phases, so that most kills fall into one
                pass

            witness[PHASE] = 0
            open_slots[phase] = 0

        witness[BEGUN] = n + 1
        pack_into(buffer, offset + (n & mask) * row_bytes, n, *[n * 1000 + i for i in range(1, len(STEPS.names))])
        count[slot] = n + 1
        witness[DONE] = n + 1
        n += 1
        if n % 100 == 0:
            info.append({"kind": "note", "number": info.appended, "text": "x" * (n % 7)})


def orphan(folder: Path) -> None:
    """Kill -9 a writer whose forked child (a data loader's worker) lives on until our stdin closes."""
    reading, writing = os.pipe()
    writer = os.fork()
    if writer == 0:
        flight = FlightFile.create(folder, {"rank": 0})
        flight.ring("evals").append(1, 2, 3, 4, 0, 0)
        worker = os.fork()
        if worker == 0:
            sys.stdin.read()
            os._exit(0)

        os.write(writing, f"{worker}\n".encode())
        signal.pause()

    worker = int(os.read(reading, 32))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    print(json.dumps({"writer": writer, "worker": worker}), flush=True)
    sys.stdin.read()


def hold(folder: Path) -> None:
    """Write a flight file, print its path, and keep it until our stdin closes."""
    flight = FlightFile.create(folder, {"rank": 1})
    flight.ring("evals").append(1, 2, 3, 4, 0, 0)
    child = os.fork()
    if child == 0:  # a worker that ends as workers do, all its descriptors closed, must not end the lock
        flight.close(unlink=True)
        os.closerange(3, 64)
        os._exit(0)

    os.waitpid(child, 0)
    print(json.dumps({"path": str(flight.path)}), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    command, where, *numbers = sys.argv[1:]
    if command == "kill_many":
        kill_many(Path(where), *map(int, numbers))
    else:
        {"orphan": orphan, "hold": hold}[command](Path(where))
