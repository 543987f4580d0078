"""A rank in a process of its own, for tests that kill it.

`python -m tests.aggregator.ranks PORT JOB RANK WORLD STEPS SENT` appends STEPS rows to a flight file, sends the first
SENT of them, says so on standard output, and then waits in an open backward phase.
"""

from __future__ import annotations

import sys
import time

from tests.aggregator.conftest import TOKEN, step_row, wait_for_acks
from traceml.clock import monotonic_ns
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_header import FlightState
from traceml.database.schema import STEPS, Phase, Slot
from traceml.transport.client import connect
from traceml.transport.hello import Hello


def main(port: int, job: str, rank: int, world_size: int, steps: int, sent: int) -> None:
    identity = {"job": job, "rank": rank, "world_size": world_size, "local_rank": rank, "attempt": 0, "recorder": "r"}
    flight = FlightFile.create(None, identity)
    hello = Hello(role="rank", run=job, rank=rank, world_size=world_size, recorder="r", flight=str(flight.path))
    flight.update_identity(host=hello.host)
    flight.open_slots[Slot.STATE] = FlightState.RUNNING
    ring = flight.ring(STEPS.name)
    for step in range(steps):
        ring.append(*STEPS.struct.unpack(step_row(step)))

    flight.log("info").append({"kind": "process", "t_ns": monotonic_ns(), "torch_threads": 1})
    if port:
        connection = connect("127.0.0.1", port, hello, TOKEN, timeout_s=60)
        connection.send_rows(STEPS.name, 0, sent, ring.read_from(0, sent).data)
        wait_for_acks(connection, STEPS.name, sent)

    flight.open_slots[Slot.STEP] = steps
    flight.open_slots[Slot.STEP_START] = monotonic_ns()
    flight.open_slots[Phase.BACKWARD] = monotonic_ns()
    print(flight.path, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
