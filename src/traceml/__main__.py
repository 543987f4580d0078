"""Run the command line as `python -m traceml`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # `-m` has put the working directory first on the path, where the user's modules are, and the installed command has
    # its own folder there. They must not shadow modules of Python. Programs of ours have `-P` (`helper_programs`).
    if not sys.flags.safe_path:
        sys.path[0] = sys.executable.rpartition("/")[0]

    from traceml.cli import run_program

    run_program()
