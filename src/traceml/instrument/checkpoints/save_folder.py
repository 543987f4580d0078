"""Folder into which checkpoints are written, from the arguments of the functions that save them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from traceml.instrument.checkpoints.save_log import target_path

__all__ = ["SaveFolder"]


class SaveFolder:
    """Folder into which checkpoints are written.

    Args:
        report: called with the folder when it is another one.

    Attributes:
        path: absolute, and common to the checkpoints so far where they have a folder each; None before the first.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.path: str | None = None
        self._report = report

    def note(self, target: Any) -> None:
        """Note a path, or an open file; anything else has no folder."""
        path = target_path(target)
        if path is None or "://" in path:
            return

        folder = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120 - a link stays one, and it costs less
        if self.path is not None and folder != self.path:
            common = os.path.commonpath([self.path, folder])
            folder = common if common.count("/") > 1 else folder

        if folder != self.path:
            self.path = folder
            self._report(folder)
