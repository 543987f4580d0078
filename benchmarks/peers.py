"""Peers, each installed in an environment of its own under .bench/."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["environment"]

ROOT = Path(__file__).resolve().parents[1]


def environment(requirement: str, *more: str) -> Path:
    """Return the `bin` folder of an environment that has `requirement` (`name==version`); made when it is not there."""
    folder = ROOT / ".bench" / requirement.partition("==")[0]
    mark = folder / f"{requirement}.installed"
    if not mark.exists():
        print(f"installing {requirement} into {folder} (once)", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), requirement, *more], check=True)
        mark.touch()

    return folder / "bin"
