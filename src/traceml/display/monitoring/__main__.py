"""Entry point of the processes for monitoring systems: `python -m traceml.display.monitoring`.

The configuration comes as JSON on stdin, because every user of the host can read a command line.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from traceml.display.monitoring.active_runs import ActiveRuns
from traceml.helper_programs import lower_priority
from traceml.process_ends import StopRequest


def main() -> None:
    """Answer Prometheus on the inherited socket, or send to a collector."""
    config = json.loads(sys.stdin.readline())
    lower_priority(config.pop("nice"))
    if "fd" in config:
        _serve(config)
    else:
        _send(config)


def _serve(config: dict[str, Any]) -> None:
    from traceml.display.monitoring.metrics_server import serve_metrics

    serve_metrics(ActiveRuns(Path(config["runs_dir"])), socket.socket(fileno=config["fd"]), config["token"])


def _send(config: dict[str, Any]) -> None:
    """Send until SIGTERM; then the last spans, for a few seconds at most."""
    ended = StopRequest()
    signal.signal(signal.SIGTERM, ended)
    from traceml.display.monitoring.otlp_exporter import OtlpConfig, OtlpExporter

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # each failed try would be a line; we log changes
    mask = tuple(config["mask"])
    known = OtlpConfig(runs_dir=Path(config["runs_dir"]), owner=config["owner"], endpoint=config["endpoint"], mask=mask)
    OtlpExporter(known).run(ended.wait)


if __name__ == "__main__":
    main()
