"""Entry point of the process for monitoring systems: `python -m traceml.display.monitoring`.

Its configuration comes as JSON on stdin, because every user of the host can read a command line.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from traceml.display.monitoring.active_runs import ActiveRuns
from traceml.priority import lower_priority


def main() -> None:
    """Answer Prometheus on the inherited socket."""
    from traceml.display.monitoring.metrics_server import serve_metrics

    config = json.loads(sys.stdin.readline())
    lower_priority(config["nice"])
    serve_metrics(ActiveRuns(Path(config["runs_dir"])), socket.socket(fileno=config["fd"]), config["token"])


if __name__ == "__main__":
    main()
