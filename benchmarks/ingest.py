"""What an aggregator costs: simulated ranks speak the real protocol from processes of their own.

    python benchmarks/ingest.py [--ranks 8 1000 10000] [--seconds 10] [--pattern even burst]

Each rank sends one frame of 20 step rows a second, over a connection of its own with the full handshake. `even` spreads
the frames over the second, `burst` sends all of them within 100 ms. Printed per case: CPU of the aggregator as a share
of one core, its resident memory, the time from sending a frame to its ack, verdicts per second, bytes per row on the
wire and in the store, and whether every row that was sent is stored.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from traceml.database.schema import STEPS
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
from traceml.transport import auth
from traceml.transport.client import connect
from traceml.transport.framing import WIRE_VERSION, Decoder, encode, rows_frame
from traceml.transport.hello import Hello

ROWS_PER_FRAME = 20
BURST_S = 0.1
WARM_UP_S = 2.0
TOKEN = "benchmark"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 1000, 10000])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--pattern", nargs="+", choices=["even", "burst"], default=["even", "burst"])
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    results = []
    print("| ranks | pattern | CPU of one core | RSS MB | ack p50 / p99 / max ms | verdicts /s "
          "| wire B/row | store B/row | rows sent = stored |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for ranks in options.ranks:
        for pattern in options.pattern:
            result = measure(ranks, pattern, options.seconds)
            results.append(result)
            print(line(result), flush=True)

    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))

    return 0 if all(result["sent"] == result["stored"] for result in results) else 1


def line(result: dict[str, Any]) -> str:
    ack = " / ".join(f"{value:.0f}" for value in result["ack_ms"])
    return (
        f"| {result['ranks']:,} | {result['pattern']} | {result['cpu_pct']:.1f} % | {result['rss_mb']:.0f} | {ack} "
        f"| {result['verdicts_per_s']:.2f} | {result['wire_bytes_per_row']:.1f} | {result['store_bytes_per_row']:.1f} "
        f"| {result['sent']:,} {'=' if result['sent'] == result['stored'] else '!='} {result['stored']:,} |"
    )


def measure(ranks: int, pattern: str, seconds: float) -> dict[str, Any]:
    """Start an aggregator, let `ranks` send for `seconds`, and return the figures."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0), backlog=4096) as sock:
        aggregator = start_aggregator(sock, Path(folder))
        try:
            generator = Generator(sock.getsockname()[1], ranks, pattern)
            generator.connect()
            generator.run(WARM_UP_S)
            before, cpu_before = generator.start_measuring(), cpu_seconds(aggregator.pid)
            verdicts_before = status(sock)["verdicts"]
            generator.run(seconds)
            elapsed_s, cpu_s = time.monotonic() - before, cpu_seconds(aggregator.pid) - cpu_before
            verdicts = status(sock)["verdicts"] - verdicts_before
            rss_mb = resident_mb(aggregator.pid)
            generator.drain()
            aggregator.terminate()
            aggregator.wait()
            stored, store_bytes = stored_rows(Path(folder))
            return {
                "ranks": ranks,
                "pattern": pattern,
                "seconds": elapsed_s,
                "cpu_pct": 100 * cpu_s / elapsed_s,
                "rss_mb": rss_mb,
                "ack_ms": [1000 * quantile(generator.latencies_s, share) for share in (0.5, 0.99, 1.0)],
                "verdicts_per_s": verdicts / elapsed_s,
                "wire_bytes_per_row": generator.bytes_sent / generator.rows_sent,
                "store_bytes_per_row": store_bytes / stored,
                "sent": generator.rows_sent,
                "stored": stored,
            }
        finally:
            aggregator.kill()
            aggregator.wait()


def start_aggregator(sock: socket.socket, folder: Path) -> subprocess.Popen[bytes]:
    ready, tell = os.pipe()
    command = [sys.executable, "-m", "traceml", "serve", "--fd", str(sock.fileno()), "--ready-fd", str(tell)]
    process = subprocess.Popen(
        [*command, "--runs-dir", str(folder)],
        env={**os.environ, "TRACEML_TOKEN": TOKEN, "TRACEML_LOG_LEVEL": "warning"},
        pass_fds=(sock.fileno(), tell),
        preexec_fn=lambda: pin(1),
    )
    pin(0)
    os.close(tell)
    os.read(ready, 16)
    os.close(ready)
    return process


def pin(core: int) -> None:
    """Keep generator and aggregator from each other's cores."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > core:
        os.sched_setaffinity(0, {cores[core]})


class Rank:
    """One simulated rank: a connection, and how far it is."""

    __slots__ = ("acked", "decoder", "rank", "sent", "sent_at_s", "sock", "unsent")

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank, self.sock = rank, sock
        self.decoder = Decoder()
        self.sent = self.acked = 0
        self.sent_at_s: dict[int, float] = {}
        self.unsent = b""


@dataclass
class Generator:
    """All ranks, in one thread."""

    port: int
    count: int
    pattern: str
    latencies_s: list[float] = field(default_factory=list)
    bytes_sent: int = 0
    rows_sent: int = 0

    def __post_init__(self) -> None:
        self.ranks: list[Rank] = []
        self.selector = selectors.DefaultSelector()
        self.measuring = False
        self.durations = [make_durations(random.Random(seed)) for seed in range(50)]

    def connect(self) -> None:
        """Connect all."""
        self.join(range(self.count))

    def join(self, ranks: Sequence[int]) -> None:
        """Connect ranks in this order, a few hundred at a time: the aggregator reads many connections at once."""
        for start in range(0, len(ranks), 256):
            socks = {rank: self.open(rank) for rank in ranks[start : start + 256]}
            for rank, sock in socks.items():
                self.greet(sock, rank)

            members = [Rank(rank, sock) for rank, sock in socks.items()]
            for member in members:
                welcome = wait_for(member.sock, member.decoder)
                assert welcome["t"] == "welcome", welcome

            self.add(members)

    def open(self, rank: int) -> socket.socket:
        """Return a connection from one of many source addresses: one has too few ports."""
        sock = socket.socket()
        sock.bind((f"127.{1 + rank // 200 // 250}.{1 + rank // 200 % 250}.1", 0))
        sock.connect(("127.0.0.1", self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def add(self, members: list[Rank]) -> None:
        """Take ranks whose handshake is over."""
        for member in members:
            member.sock.setblocking(False)
            self.selector.register(member.sock, selectors.EVENT_READ, member)
            self.ranks.append(member)

    def greet(self, sock: socket.socket, rank: int) -> None:
        """Prove the token as a rank does."""
        challenge = wait_for(sock, Decoder())
        hello = Hello(role="rank", run="benchmark", rank=rank, world_size=self.count, name="benchmark",
                      recorder=str(rank), command="benchmark", start_ticks=1)  # fmt: skip
        proof = auth.mac(TOKEN, challenge["nonce"], hello.role, hello.run, hello.rank)
        sock.sendall(encode(hello.to_message(WIRE_VERSION, auth.client_nonce(), proof)))

    def start_measuring(self) -> float:
        """Note latencies from now on; return the time."""
        self.measuring = True
        return time.monotonic()

    def run(self, seconds: float) -> None:
        """Send a frame per rank and second, and read the acks."""
        began_s = time.monotonic()
        width_s = 1.0 if self.pattern == "even" else BURST_S
        for second in range(math.ceil(seconds)):
            for index, member in enumerate(self.ranks):
                due_s = began_s + second + width_s * index / self.count
                while (left_s := due_s - time.monotonic()) > 0:
                    self.read(left_s)

                self.send(member)
                if index % 64 == 0:
                    self.read(0)

            while (left_s := began_s + second + 1 - time.monotonic()) > 0:
                self.read(left_s)

    def drain(self) -> None:
        """Wait until everything is acknowledged, and leave."""
        deadline_s = time.monotonic() + 30
        while any(member.acked < member.sent for member in self.ranks) and time.monotonic() < deadline_s:
            self.read(0.1)

        for member in self.ranks:
            member.sock.close()

    def send(self, member: Rank) -> None:
        """Send a rank's next frame."""
        frame = rows_frame(STEPS.name, member.sent, ROWS_PER_FRAME, self.rows(member))
        member.sent += ROWS_PER_FRAME
        if self.measuring:
            member.sent_at_s[member.sent] = time.monotonic()

        self.rows_sent += ROWS_PER_FRAME
        self.bytes_sent += len(frame)
        sent = member.sock.send(frame)
        assert sent == len(frame), "a frame of 2 kB does not fit the socket's buffer: the aggregator does not read"

    def rows(self, member: Rank) -> bytes:
        """Return rows as a trainer at 20 steps a second would have them: 50 ms steps that vary by a few percent."""
        table = self.durations[(member.rank + member.sent // ROWS_PER_FRAME) % len(self.durations)]
        step = member.sent
        return b"".join(
            [HEAD.pack(step + i, 1_000_000_000 + (step + i) * 50_000_000) + rest for i, rest in enumerate(table)]
        )

    def read(self, timeout_s: float) -> None:
        """Take the acks that have come, waiting up to `timeout_s` for the first."""
        for key, _ in self.selector.select(timeout_s):
            member = key.data
            data = member.sock.recv(4096)
            assert data, "the aggregator closed a connection"
            now_s = time.monotonic()
            for message in member.decoder.feed(data):
                member.acked = max(self.stored(message), member.acked)
                for number in [each for each in member.sent_at_s if each <= member.acked]:
                    self.latencies_s.append(now_s - member.sent_at_s.pop(number))

    def stored(self, message: dict[str, Any]) -> int:
        """Return the number up to which a message of the aggregator says that all is stored."""
        assert message["t"] == "ack", message
        number: int = message["seq"]
        return number


HEAD = struct.Struct("<2q")
PARTS = ("input_wait_ns", "h2d_ns", "forward_ns", "backward_ns", "optimizer_ns", "comm_ns", "checkpoint_ns", "user_ns")
ROW = STEPS.partial_struct("step", "t_end_ns", "total_ns", *PARTS, "backward_own_ns", "bits")


def make_durations(chance: random.Random) -> list[bytes]:
    """Return the durations of 20 steps: seven parts that are not zero, 5 % of noise, log-normal."""
    rows = []
    for _ in range(ROWS_PER_FRAME):
        parts = [int(mean * math.exp(chance.gauss(0, 0.05))) for mean in MEANS_NS]
        total = sum(parts) + int(1_000_000 * math.exp(chance.gauss(0, 0.05)))
        rows.append(ROW.pack(0, 0, total, *parts, parts[3] * 8 // 10, 1)[HEAD.size :])

    return rows


# Of each of PARTS.
MEANS_NS = (3_000_000, 1_000_000, 14_000_000, 24_000_000, 5_000_000, 1_500_000, 0, 500_000)


def wait_for(sock: socket.socket, decoder: Decoder) -> dict[str, Any]:
    while True:
        messages = decoder.feed(sock.recv(4096))
        if messages:
            return messages[0]


def status(sock: socket.socket) -> dict[str, Any]:
    connection = connect("127.0.0.1", sock.getsockname()[1], Hello(), TOKEN)
    reply = connection.request("status", timeout_s=10)
    connection.close("done")
    run: dict[str, Any] = reply["runs"][0]
    return run


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def stored_rows(folder: Path) -> tuple[int, int]:
    run = (folder / "latest").resolve()
    with StoreReader(run / STORE_NAME) as reader:
        stored = reader.stored(STEPS.name)
        size = sum(path.stat().st_size for path in run.glob(f"{STORE_NAME}*") if not path.name.endswith("-shm"))

    return stored, size


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


if __name__ == "__main__":
    sys.exit(main())
