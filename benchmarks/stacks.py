"""Time and CPU time of `traceml stacks` for jobs of many simulated ranks, and the size of its answer.

    python benchmarks/stacks.py [--ranks 1000 10000]

The ranks speak the real protocol from one process, and answer with a stack of 20 frames: all but three of them the same
one. Or each has another one (`different`), which is the largest answer that there can be. One in a hundred (at least
one) never answers (`silent`): the aggregator waits 2 s for it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ingest import Generator, cpu_seconds, start_aggregator
from traceml.clock import monotonic_ns
from traceml.database.snapshots.rank_snapshot import FrameSnapshot, GroupSnapshot, RankSnapshot
from traceml.transport.framing import encode

FRAMES = 20
CASES = ("alike", "different", "silent")


class AskedRanks(Generator):
    """Ranks that answer when they are asked for their stacks."""

    case = CASES[0]

    def read(self, timeout_s: float) -> None:
        """Answer what has come, waiting up to `timeout_s` for the first."""
        for key, _ in self.selector.select(timeout_s):
            member = key.data
            for message in member.decoder.feed(member.sock.recv(65536)):
                if message["t"] == "command" and not (self.case == "silent" and member.rank % 100 == 0):
                    result = snapshot(member.rank, member.rank if self.case == "different" else min(member.rank, 3))
                    member.sock.sendall(encode({"t": "reply", "id": message["id"], "result": result}))


def snapshot(rank: int, stack: int) -> dict[str, Any]:
    """Return what a rank answers that waits in a collective."""
    frames = tuple(
        FrameSnapshot(file=f"/home/user/project/module_{stack}.py", line=10 * at + 1, function=f"Trainer.part_{at}",
                      is_user=at > FRAMES // 2)
        for at in range(FRAMES)
    )  # fmt: skip
    group = GroupSnapshot(members=tuple(range(8)), number=61, operation="all_reduce", sizes=(1000,), in_flight=True)
    return RankSnapshot(
        at_ns=monotonic_ns(), rank=rank, quiet_s=13.0, step=120, in_step=True, phase="backward", answered="recorder",
        frames=frames, user_line=frames[-1], process_state="S", wchan="futex_do_wait", cpu_share=0.01,
        io_bytes_per_s=0.0, groups=(group,),
    ).to_row()  # fmt: skip


def asked(ranks: AskedRanks, folder: Path, *, as_json: bool) -> tuple[float, float, str]:
    """Run the command while the ranks answer; return its seconds, its CPU seconds, and what it printed."""
    command = [sys.executable, "-m", "traceml", "stacks", "--runs-dir", str(folder), *(["--json"] if as_json else [])]
    began_s, cpu_s = time.monotonic(), ended_cpu_seconds()
    with (folder / "told").open("w+") as told:
        with subprocess.Popen(command, stdout=told) as process:
            while process.poll() is None:
                ranks.read(0.02)

        took_s = time.monotonic() - began_s
        told.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)} ended with {process.returncode}")

        return took_s, ended_cpu_seconds() - cpu_s, told.read()


def ended_cpu_seconds() -> float:
    """Return the CPU time of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def line(count: int, case: str, ranks: AskedRanks, folder: Path, aggregator: int) -> str:
    """Return a line of the table."""
    ranks.case, before_s = case, cpu_seconds(aggregator)
    took_s, command_s, text = asked(ranks, folder, as_json=False)
    aggregator_s = cpu_seconds(aggregator) - before_s
    _, _, document = asked(ranks, folder, as_json=True)
    found = json.loads(document)
    groups = text.count("\n\n") + 1
    return (
        f"| {count:,} | {case} | {took_s:.1f} s | {command_s:.2f} s | {aggregator_s:.2f} s "
        f"| {len(document) / 1e6:.1f} MB | {groups:,} | {len(found['ranks']):,} of {count:,} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1000])
    print("| ranks | stacks | time | CPU of the command | of the aggregator | JSON | groups | answered |")
    print("|---|---|---|---|---|---|---|---|")
    for count in parser.parse_args().ranks:
        with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0), backlog=4096) as sock:
            folder = Path(name)
            aggregator = start_aggregator(sock, folder)
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
            try:
                ranks = AskedRanks(sock.getsockname()[1], count, "even")
                ranks.connect()
                for case in CASES:
                    print(line(count, case, ranks, folder, aggregator.pid), flush=True)
            finally:
                aggregator.kill()
                aggregator.wait()


if __name__ == "__main__":
    main()
