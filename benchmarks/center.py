"""Cost of a center: simulated hosts of 8 ranks send it merged messages, as `traceml serve --upstream` does.

    python benchmarks/center.py [--ranks 1000 10000] [--seconds 10]

Each host has a connection and sends one message a second: the steps of one typical rank at 10 steps a second, its
samples of process and host at the interval that the center asks for, and what is known of the 7 others. The center is
a real `traceml serve`, with connections, store and a verdict a second. Printed per case: its CPU as a share of one
core, and in microseconds per message; its resident memory, the time until a message is confirmed to be on disk (the
center answers for some seconds at once), verdicts per second, and the bytes that a host sends in a second.
"""

from __future__ import annotations

import argparse
import math
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from ingest import (
    HEAD,
    TOKEN,
    WARM_UP_S,
    Generator,
    Rank,
    cpu_seconds,
    quantile,
    resident_mb,
    start_aggregator,
    status,
    wait_for,
)
from traceml.database.schema import HOST, PROCESS, STEPS, Table
from traceml.database.store.frame_compression import encode as compress
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.steps.representatives import ExcessWork, HostChoice, packed_ms
from traceml.run_folder import STORE_NAME
from traceml.transport import auth
from traceml.transport.framing import WIRE_VERSION, Decoder, encode
from traceml.transport.hello import Hello

PER_HOST, STEPS_PER_S = 8, 10
STEP_NS = 100_000_000
ABOVE = packed_ms(np.full(STEPS_PER_S, 2e6, np.float32))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    print("| ranks | hosts | CPU of one core, us per message | RSS MB | stored p50 / p99 / max ms | verdicts /s "
          "| B/s of a host | rows sent = stored |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    results = [measure(ranks, options.seconds) for ranks in options.ranks]
    return 0 if all(results) else 1


def measure(ranks: int, seconds: float) -> bool:
    """Start a center, let hosts send for some seconds, and print the figures; return whether all rows are stored."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0), backlog=4096) as sock:
        center = start_aggregator(sock, Path(folder))
        try:
            hosts = HostGenerator(sock.getsockname()[1], ranks // PER_HOST, "even")
            hosts.connect()
            hosts.run(WARM_UP_S)
            before_s, cpu_before = hosts.start_measuring(), cpu_seconds(center.pid)
            verdicts, bytes_before = status(sock)["verdicts"], hosts.bytes_sent
            hosts.run(seconds)
            elapsed_s, cpu_s = time.monotonic() - before_s, cpu_seconds(center.pid) - cpu_before
            verdicts, rss_mb = status(sock)["verdicts"] - verdicts, resident_mb(center.pid)
            sent_bytes = (hosts.bytes_sent - bytes_before) / hosts.count / elapsed_s
            messages = hosts.count * math.ceil(seconds)
            hosts.drain()
            center.terminate()
            center.wait()
            with StoreReader((Path(folder) / "latest").resolve() / STORE_NAME) as reader:
                stored = reader.stored(STEPS.name)
        finally:
            center.kill()
            center.wait()

    confirmed = " / ".join(f"{1000 * quantile(hosts.latencies_s, share):.0f}" for share in (0.5, 0.99, 1.0))
    print(
        f"| {ranks:,} | {hosts.count:,} | {100 * cpu_s / elapsed_s:.1f} %, {1e6 * cpu_s / messages:.0f} | {rss_mb:.0f} "
        f"| {confirmed} | {verdicts / elapsed_s:.2f} | {sent_bytes:.0f} "
        f"| {hosts.rows_sent:,} {'=' if stored == hosts.rows_sent else '!='} {stored:,} |", flush=True,
    )  # fmt: skip
    return stored == hosts.rows_sent


class HostGenerator(Generator):
    """All hosts, in one thread; a `Rank` is a host here, and `sent` the number of its last message."""

    sample_every = 1

    def greet(self, sock: socket.socket, rank: int) -> None:
        """Prove the token as the aggregator of a host does."""
        challenge = wait_for(sock, Decoder())
        hello = Hello(role="relay", run="benchmark", host=f"gpu-{rank:05}", recorder=str(rank), start_ticks=1)
        proof = auth.mac(TOKEN, challenge["nonce"], hello.role, hello.run, hello.rank)
        sock.sendall(encode(hello.to_message(WIRE_VERSION, auth.client_nonce(), proof)))

    def add(self, members: list[Rank]) -> None:
        """Have the ranks of hosts admitted."""
        for member in members:
            hellos = [self.hello_of(member.rank, rank) for rank in range(PER_HOST)]
            frames = [encode({"t": "rank", "id": rank, "hello": hello}) for rank, hello in enumerate(hellos)]
            member.sock.sendall(b"".join(frames))

        for member in members:
            joined = 0
            while joined < PER_HOST:
                for message in member.decoder.feed(member.sock.recv(65536)):
                    joined += 1
                    self.sample_every = max(round(message["sample_interval_s"]), 1)

        super().add(members)

    def hello_of(self, host: int, rank: int) -> dict[str, Any]:
        """Return the hello of a rank of a host."""
        return asdict(Hello(
            role="rank", run="benchmark", rank=PER_HOST * host + rank, world_size=PER_HOST * self.count,
            host=f"gpu-{host:05}", local_rank=rank, recorder=f"{host} {rank}", name="benchmark", schemas={},
            start_ticks=1,
        ))  # fmt: skip

    def send(self, member: Rank) -> None:
        """Send a host's next message."""
        number, first = member.sent + 1, member.sent * STEPS_PER_S
        ranks = tuple(range(PER_HOST * member.rank, PER_HOST * (member.rank + 1)))
        choice = HostChoice(host="", typical=ranks[0], ordinary=ranks, sent=ranks[:1])
        frame = encode({
            "t": "update", "number": number, "rows": list(self.packed(member, first)),
            "choice": choice.to_row() if number == 1 else None, "above": ExcessWork(first, ABOVE).to_row(), "ends": [],
        })  # fmt: skip
        member.sent = number
        if self.measuring:
            member.sent_at_s[number] = time.monotonic()

        self.rows_sent += STEPS_PER_S
        self.bytes_sent += len(frame)
        assert member.sock.send(frame) == len(frame), "the center does not read"

    def packed(self, member: Rank, first: int) -> Iterator[list[Any]]:
        """Yield the rows of a typical rank of a second."""
        table = self.durations[(member.rank + member.sent) % len(self.durations)][:STEPS_PER_S]
        steps = b"".join(HEAD.pack(first + i, 10**9 + (first + i) * STEP_NS) + rest for i, rest in enumerate(table))
        yield frame_of(STEPS, first, steps)
        every = self.sample_every
        if member.sent % every == member.rank % every:
            for sampled in (PROCESS, HOST):
                rows = np.zeros(every, sampled.dtype)
                rows["t_ns"] = 10**9 * (member.sent + np.arange(every))
                yield frame_of(sampled, member.sent, rows.tobytes())

    def drain(self) -> None:
        """Ask for the last confirmations, wait for them, and leave."""
        for member in self.ranks:
            member.sock.sendall(encode({"t": "confirm"}))

        super().drain()

    def stored(self, message: dict[str, Any]) -> int:
        """Return the number of the last message that is confirmed; 0 if the center says something else."""
        return message["number"] if message["t"] == "stored" else 0


def frame_of(table: Table, seq: int, data: bytes) -> list[Any]:
    codec, packed = compress(table, data)
    return [0, table.name, seq, len(data) // table.row_bytes, int(codec), packed]


if __name__ == "__main__":
    sys.exit(main())
