"""Code by which another process imports this very package, installed or not: an agent, and its zygote.

Process: launcher and agent.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["PACKAGE", "archive_path", "import_code", "zip_import_code"]

PACKAGE = str(Path(__file__).parents[2])
"""Where this package is: a folder, or one inside a zip file."""

_PREPARE = """
import sys
if sys.path and not sys.flags.safe_path:
    del sys.path[0]
"""
_FROM_FOLDER = """
import importlib.util
spec = importlib.util.spec_from_file_location("traceml", {init!r}, submodule_search_locations=[{package!r}])
"""
_FROM_ZIP = """
import zipimport
place = {path}
spec = zipimport.zipimporter(place).find_spec("traceml")
sys.path.insert(0, place + "/first")
sys.path += [place + "/extra", place]
"""
_LOAD = """
import importlib.util
module = importlib.util.module_from_spec(spec)
sys.modules["traceml"] = module
spec.loader.exec_module(module)
"""


def import_code() -> str:
    """Return code that imports this very package without adding it to the search path.

    The working directory is removed from the path: modules there must not shadow the standard library's.
    """
    if not Path(PACKAGE).is_dir():
        return zip_import_code(repr(archive_path()))

    load = _FROM_FOLDER.replace("{init!r}", repr(f"{PACKAGE}/__init__.py")).replace("{package!r}", repr(PACKAGE))
    return _PREPARE + load + _LOAD


def zip_import_code(place: str) -> str:
    """Return code that imports the package from the zip file whose path is the value of the expression `place`."""
    return _PREPARE + _FROM_ZIP.replace("{path}", place) + _LOAD


def archive_path() -> str:
    """Return the path of the zip file that this package was imported from."""
    return PACKAGE.removesuffix("/traceml")
