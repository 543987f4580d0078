"""Run the command line as `python -m traceml`."""

from __future__ import annotations

import sys

from traceml.cli import main

if __name__ == "__main__":
    sys.exit(main())
