"""Code that runs as that of an installed library, which is not the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["run_installed"]


def run_installed(folder: Path, source: str) -> dict[str, Any]:
    """Run a module below `site-packages` of a folder; return its names."""
    library = folder / "site-packages" / "library.py"
    library.parent.mkdir()
    library.write_text(source)
    names: dict[str, Any] = {}
    exec(compile(source, str(library), "exec"), names)
    return names
