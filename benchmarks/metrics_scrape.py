"""Time of a scrape by Prometheus, beside running jobs of several sizes.

Every rank has 30 new steps since the scrape before, as with a scrape each 15 s and steps of half a second.

python benchmarks/metrics_scrape.py [--repeat 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.display.monitoring.running import running_run

from traceml.display.monitoring.active_runs import ActiveRuns
from traceml.display.monitoring.metrics_server import metrics_app

RANKS = (8, 64, 1_000)
FIRST, NEW = 150, 30
REQUEST = {"PATH_INFO": "/metrics", "HTTP_HOST": "localhost", "REQUEST_METHOD": "GET", "QUERY_STRING": ""}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    print(f"{'ranks':>6} {'series':>7} {'bytes':>7} {'first scrape':>13} {'scrape':>8}")
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            first_s, later_s, answer = measure(Path(folder), ranks, repeat)

        series = sum(not line.startswith(b"#") for line in answer.splitlines())
        print(f"{ranks:>6,} {series:>7,} {len(answer):>7,} {1e3 * first_s:>10.0f} ms {1e3 * later_s:>5.0f} ms")

    return 0


def measure(folder: Path, ranks: int, repeat: int) -> tuple[float, float, bytes]:
    """Return seconds of the first scrape and of a later one, and the answer."""
    now_s = [0.0]
    app = metrics_app(ActiveRuns(folder, clock=lambda: now_s[0]), None)

    def scrape() -> tuple[float, bytes]:
        now_s[0] += 15.0
        began = time.perf_counter()
        answer = b"".join(app(dict(REQUEST), lambda *_: None))
        return time.perf_counter() - began, answer

    slow = adds("forward", 20, (1,))
    with running_run(folder / "run", slow, ranks=ranks, steps=FIRST) as writer:
        rows = rows_of(Job(ranks=ranks, steps=FIRST + repeat * NEW), slow)
        first_s, answer = scrape()
        later = []
        for start in range(FIRST, FIRST + repeat * NEW, NEW):
            for rank, of_rank in enumerate(rows):
                part = of_rank[start : start + NEW]
                writer.append(rank + 1, "steps", start, NEW, part.tobytes(), start, start + NEW - 1)

            writer.commit()
            taken_s, answer = scrape()
            later.append(taken_s)

    return first_s, statistics.median(later), answer


if __name__ == "__main__":
    raise SystemExit(main())
