"""The option `--runs-dir`, which most commands have, and the settings with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from traceml.cli.options.parsing import Metavar

if TYPE_CHECKING:
    from traceml.settings import Config

__all__ = ["RunsDirOptions"]


@dataclass(frozen=True, kw_only=True)
class RunsDirOptions:
    """Options of a command about the runs of a folder."""

    runs_dir: Annotated[str | None, Metavar("DIR")] = None
    """Folder of the runs (default: the setting runs_dir)."""

    @property
    def config(self) -> Config:
        """The settings in force, with another folder of runs where one is given."""
        from traceml.settings import load  # `--help` does not pay for it

        return load() if self.runs_dir is None else load(runs_dir=self.runs_dir)
