"""What large jobs cost an aggregator before their first step: ranks that connect in any order, and a restart.

    python benchmarks/worlds.py [--ranks 1024 10000]

Simulated ranks prove the token by the real handshake. The last rank connects first, the others in random order, each
with the names of 50 user phases. Then the aggregator is killed and another one opens the run again. Printed per job:
time of the first handshake, peak memory after it and after all of them, time to connect all, and CPU time to open the
run again, from which that of starting an aggregator without any run is subtracted.
"""

from __future__ import annotations

import argparse
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgpack

from ingest import Generator, Rank, cpu_seconds, start_aggregator, status
from traceml.transport.framing import rows_frame

PHASES = 50
NAMES = b"".join(msgpack.packb({"id": number, "name": f"phase {number}"}) for number in range(PHASES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1024, 10000])
    print("| ranks | first handshake, of the last rank | peak memory | all connected | peak memory | opened again |")
    print("|---|---|---|---|---|---|")
    for ranks in parser.parse_args().ranks:
        print(line(measure(ranks)), flush=True)

    return 0


def line(result: dict[str, Any]) -> str:
    return (
        f"| {result['ranks']:,} | {1000 * result['first_s']:.0f} ms | {result['first_mb']:+.0f} MB "
        f"| {result['all_s']:.1f} s | {result['all_mb']:+.0f} MB | {result['revive_s']:.2f} s |"
    )


def measure(ranks: int) -> dict[str, Any]:
    """Connect `ranks`, kill the aggregator, start another one; return the figures."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0), backlog=4096) as sock:
        empty_s = stop(*started(sock, Path(folder) / "empty"))
        aggregator, _ = started(sock, Path(folder) / "runs")
        try:
            before_mb = peak_mb(aggregator.pid)
            job = ShuffledJob(sock.getsockname()[1], ranks, "even")
            first_s = job.connect_last()
            first_mb = peak_mb(aggregator.pid)
            all_s = job.connect_others()
            all_mb = peak_mb(aggregator.pid)
        finally:
            aggregator.kill()
            aggregator.wait()

        again, revive_s = started(sock, Path(folder) / "runs")
        streams = status(sock)["streams"]
        stop(again, revive_s)
        if streams != ranks:
            raise RuntimeError(f"{streams} of {ranks} ranks are known after the restart")

        return {
            "ranks": ranks, "first_s": first_s, "first_mb": first_mb - before_mb, "all_s": all_s,
            "all_mb": all_mb - before_mb, "revive_s": revive_s - empty_s,
        }  # fmt: skip


def started(sock: socket.socket, folder: Path) -> tuple[subprocess.Popen[bytes], float]:
    """Start an aggregator; return it with its CPU seconds until it was ready."""
    process = start_aggregator(sock, folder)
    return process, cpu_seconds(process.pid)


def stop(process: subprocess.Popen[bytes], cpu_s: float) -> float:
    process.kill()
    process.wait()
    return cpu_s


def peak_mb(pid: int) -> float:
    status_text = Path(f"/proc/{pid}/status").read_text()
    return int(status_text.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


class ShuffledJob(Generator):
    """Ranks of one job that connect in random order, the last of them first."""

    def connect_last(self) -> float:
        """Connect rank N - 1; return the seconds of its handshake."""
        began_s = time.monotonic()
        self.join([self.count - 1])
        return time.monotonic() - began_s

    def connect_others(self) -> float:
        """Connect all others; return the seconds until their names are stored."""
        began_s = time.monotonic()
        others = list(range(self.count - 1))
        random.Random(1).shuffle(others)
        self.join(others)
        while any(member.acked < PHASES for member in self.ranks):
            self.read(1.0)

        return time.monotonic() - began_s

    def add(self, members: list[Rank]) -> None:
        """Send the names of the phases of ranks whose handshake is over."""
        super().add(members)
        for member in members:
            member.sock.sendall(rows_frame("names", 0, PHASES, NAMES))


if __name__ == "__main__":
    sys.exit(main())
