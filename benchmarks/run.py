"""Run the benchmarks one after another; name some to run only those.

python benchmarks/run.py [NAME ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# In the order of docs/benchmarks.md, with the arguments that its figures were taken with.
BENCHMARKS: dict[str, list[str]] = {
    "step_overhead": [],
    "compile_overhead": [],
    "device_times": [],
    "startup": ["--peer"],
    "ingest": [],
    "worlds": [],
    "tree": [],
    "center": [],
    "store_bytes": [],
    "retention": [],
    "tracking": [],
    "diagnosis_accuracy": ["--runs", "150"],
    "hang_times": [],
    "stacks": [],
    "compare_runs": [],
    "fleet": [],
    "report_page": [],
    "long_runs": [],
    "export": [],
    "integrations": [],
    "tasks": [],
    "launch": [],
    "delivery": [],
    "page": [],
    "metrics_scrape": [],
    "traces": [],
    "traces_cluster": [],
    "trace_writer": [],
    "whatif": [],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")

    failed = []
    for name in names:
        print(f"\n== {name}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), *BENCHMARKS[name]]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)

    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)

    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
