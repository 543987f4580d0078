"""How a keeper starts the page: `python -m traceml.display.web FD`, with its configuration as JSON on stdin.

The token comes that way because everybody on the host can read a command line.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from traceml.display.web.page_server import PageConfig, serve
from traceml.priority import step_back


def main() -> None:
    """Serve the page on the inherited socket."""
    told = json.loads(sys.stdin.readline())
    step_back(told["nice"])
    serve(PageConfig(told["token"], Path(told["runs_dir"])), socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
