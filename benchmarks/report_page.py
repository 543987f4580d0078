"""What `report.html` adds to the end of a run: time beside the JSON report, and its size.

python benchmarks/report_page.py [--repeat 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import store_run

from traceml.database.store.reader import StoreReader
from traceml.renderers.html.report_page import report_page
from traceml.run_folder import STORE_NAME
from traceml.runs.about import about_run
from traceml.runs.report.report import full_report
from traceml.runs.rows.run_summary_reader import read_run_summary
from traceml.runs.rows.series import SeriesFollower

JOBS = (Job(ranks=2, steps=400), Job(ranks=8, steps=5_000), Job(ranks=4, steps=50_000), Job(ranks=1_000, steps=600))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    print(f"{'ranks':>6} {'steps':>7} {'rows':>9} {'report.json':>12} {'page adds':>10} {'page':>8}")
    for job in JOBS:
        with tempfile.TemporaryDirectory() as folder:
            run = store_run(Path(folder) / "run", job, adds("forward", 15, (1,)))
            measured = [measure(run) for _ in range(repeat)]

        report_s, page_s = (statistics.median(each[place] for each in measured) for place in (0, 1))
        rows, size = job.ranks * job.steps, measured[0][2]
        print(
            f"{job.ranks:>6,} {job.steps:>7,} {rows:>9,} {1e3 * report_s:>9.0f} ms {1e3 * page_s:>7.0f} ms "
            f"{size / 1e3:>5.0f} kB"
        )

    return 0


def measure(run: Path) -> tuple[float, float, int]:
    """Return seconds for the JSON report, seconds more for the page, and the page's bytes."""
    began = time.perf_counter()
    with closing(StoreReader(run / STORE_NAME)) as reader:
        summary = read_run_summary(reader)
        report = full_report(summary, reader, run)
        reported = time.perf_counter()
        follower = SeriesFollower()
        follower.take(summary, reader)
        page = report_page(report, follower.series(summary), about_run(reader))

    return reported - began, time.perf_counter() - reported, len(page.encode())


if __name__ == "__main__":
    sys.exit(main())
