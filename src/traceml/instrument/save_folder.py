"""Folder into which checkpoints are written, from the arguments of the functions that save them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from traceml.fail_open import fail_open
from traceml.instrument.values.saves import target_path

__all__ = ["SaveFolder"]

_log = logging.getLogger("traceml")


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

    def watch(self, save: Callable[..., Any], position: int, *names: str) -> Callable[..., Any]:
        """Return a function that notes the target of a save, and calls `save`.

        Args:
            save: the function.
            position: of the argument with the path or file; -1 if it has only a name.
            names: keywords of that argument.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            with fail_open(_log, "instrument", "the folder of checkpoints is not known", once=True):
                target = args[position] if 0 <= position < len(args) else None
                self.note(next((kwargs[name] for name in names if kwargs.get(name) is not None), target))

            return save(*args, **kwargs)

        return call

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
