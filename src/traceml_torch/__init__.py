"""Entry points of the distribution `traceml-torch`, in a package that no other distribution has.

The folder or module that Python finds as `traceml` may be another product's, or a file of the user. Nothing here fails
because of that: `import torch` must succeed, and the command says what is wrong.
"""

from __future__ import annotations

import os
import sys

__all__ = ["autostart", "main"]

_ADVICE = """\
traceml: {what}: Python finds another `traceml` in {place} ({error}).
If pip has installed it: pip uninstall traceml traceml-ai, then pip install --force-reinstall --no-deps traceml-torch. \
Else rename it, or start Python in another folder.
"""


def autostart() -> None:
    """Trace this process if `TRACEML=1` is set, or if a rank of `traceml run` has started it. torch calls it at the end
    of its import, unless `TORCH_DEVICE_BACKEND_AUTOLOAD=0` is set. Raises nothing.
    """
    if not (os.environ.get("TRACEML") or os.environ.get("TRACEML_PARENT")):
        return

    try:
        from traceml.session.autostart import start_if_wanted
    except Exception as error:  # noqa: BLE001 - another product may raise anything, and torch would not be imported
        _explain("this process is not traced", error)
    else:
        start_if_wanted()


def main() -> int:
    """Run the command `traceml`; return its exit status."""
    try:
        from traceml.cli import main as run_command
    except ImportError as error:
        _explain("the command cannot run", error)
        return 3

    return run_command()


def _explain(what: str, error: Exception) -> None:
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec("traceml")
    place = "no folder" if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ["?"]))
    if sys.stderr is not None:
        sys.stderr.write(_ADVICE.format(what=what, place=place, error=error))
