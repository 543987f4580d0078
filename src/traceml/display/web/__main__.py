"""Entry point of the page's process: `python -m traceml.display.web FD`, with its configuration as JSON on stdin.

The token is not an argument because every user of the host can read a command line.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from traceml.display.web.page_server import serve
from traceml.helper_programs import lower_priority


def main() -> None:
    """Serve the page on the inherited socket."""
    config = json.loads(sys.stdin.readline())
    lower_priority(config["nice"])
    serve(Path(config["runs_dir"]), socket.socket(fileno=int(sys.argv[1])), config["token"])


if __name__ == "__main__":
    main()
