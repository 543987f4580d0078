"""Entry points of the distribution `traceml-torch`, in a package that no other distribution has.

The folder or module that Python finds as `traceml` may be another product's, or a file of the user. Nothing here fails
because of that: `import torch` must succeed, and the command says what is wrong.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["autostart", "main"]

_ADVICE = """\
traceml: {what}: Python finds another `traceml` in {place} ({error}).
If pip has installed it: pip uninstall traceml traceml-ai, then install traceml-torch again as before, \
with --force-reinstall --no-deps. Else rename it, or start Python in another folder.
"""


def autostart() -> None:
    """Trace this process if `TRACEML=1` is set or a rank of `traceml run` has started it, and name us to frameworks.

    torch calls it at the end of its import, unless `TORCH_DEVICE_BACKEND_AUTOLOAD=0` is set. Raises nothing.
    """
    if not any(isinstance(finder, _NameGiver) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NameGiver())

    if not (os.environ.get("TRACEML") or os.environ.get("TRACEML_PARENT")):
        return

    try:
        from traceml.session.autostart import start_if_wanted
    except Exception as error:  # noqa: BLE001 - another product may raise anything, and torch would not be imported
        _explain("this process is not traced", error)
    else:
        start_if_wanted()


class _NameGiver:
    """Import finder that finds nothing, but adds `traceml` to the reporters of transformers and accelerate.

    Both are often in the middle of their import when torch is imported, so each later import looks whether their
    tables are there. It takes 0.1 us per import, and imports nothing.
    """

    def __init__(self) -> None:
        self._tables = {
            ("transformers.integrations.integration_utils", "INTEGRATION_TO_CALLBACK"): _HuggingFaceReporter,
            ("accelerate.tracking", "LOGGER_TYPE_TO_CLASS"): _AccelerateTracker,
        }

    def find_spec(self, name: str, *_: Any) -> None:
        """Add the name to the tables that are there."""
        if name.startswith(("transformers", "accelerate", "trl")):
            for (module, table), reporter in list(self._tables.items()):
                found = getattr(sys.modules.get(module), table, None)
                if isinstance(found, dict):
                    found.setdefault("traceml", reporter)
                    del self._tables[module, table]


class _HuggingFaceReporter:
    """Class that transformers calls for `report_to="traceml"`."""

    def __new__(cls) -> Any:
        from traceml.integrations.huggingface import TraceMLCallback

        return TraceMLCallback()


class _AccelerateName(type):
    """Type of `_AccelerateTracker`: Accelerate reads the attribute on each rank that names the tracker."""

    @property
    def requires_logging_directory(cls) -> bool:
        from traceml.integrations.accelerate import trace_all_ranks

        trace_all_ranks()
        return False


class _AccelerateTracker(metaclass=_AccelerateName):
    """Class that accelerate calls for `log_with="traceml"`."""

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        from traceml.integrations.accelerate import TraceMLTracker

        return TraceMLTracker(*args, **settings)


def main() -> int:
    """Run the command `traceml`; return its exit status."""
    try:
        from traceml.cli import run_program
    except ImportError as error:
        _explain("the command cannot run", error)
        return 3

    return run_program()


def _explain(what: str, error: Exception) -> None:
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec("traceml")
    place = "no folder" if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ["?"]))
    if sys.stderr is not None:
        sys.stderr.write(_ADVICE.format(what=what, place=place, error=error))
