"""How an agent comes to life on a host where nothing of ours is installed.

Two ways. On this machine, by the same Python, the agent is started with the place of our package in its command line.
Elsewhere the command is a small program that says the greeting, reads the package (a zip file) from its standard input
into a file in memory, and imports it from there: nothing is written to a disk, and nothing is left.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import struct
import zipfile
from pathlib import Path

import traceml

__all__ = ["bundle", "import_code", "local_command", "remote_command"]

_LENGTH = struct.Struct(">Q")
# Rooms that an agent, a zygote or a traced worker may need.
_ROOMS = ("launch", "session", "track", "recorder", "instrument", "samplers", "transport", "database", "privacy")
_FIRST = ("cloudpickle",)  # what it packs, only the same version unpacks for sure
_EXTRA = ("msgpack",)  # for hosts that have torch and nothing else

# Kept free of what old Pythons do not know, so that they can say that they are old.
_REMOTE = """
import os, sys
if sys.version_info < (3, 11):
    words = "traceml: Python %s at %s is too old: 3.11 or newer is needed\\n"
    sys.stderr.write(words % (sys.version.split()[0], sys.executable))
    sys.exit(78)
os.write(1, {greeting!r})
def read(n):
    pieces = []
    while n:
        piece = os.read(0, min(n, 1 << 20))
        if not piece:
            sys.exit("traceml: the launcher went away")
        pieces.append(piece)
        n -= len(piece)
    return b"".join(pieces)
data = read(int.from_bytes(read(8), "big"))
fd = os.memfd_create("traceml")
os.write(fd, data)
"""
_IMPORT = """
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
_GUARD = """
from traceml.launch.agent.reaper import fork_under_reaper
fork_under_reaper()
from traceml.launch.agent.agent import main
"""


def local_command(python: str) -> list[str]:
    """Return what starts an agent on this machine as our child; it reads no bundle."""
    return [python, "-c", import_code() + _GUARD + "main(local=True)\n"]


def remote_command(python: str) -> list[str]:
    """Return what starts an agent elsewhere; it greets, and wants `bundle()` before the first frame."""
    from traceml.launch.wire.channel import GREETING

    code = _REMOTE.replace("{greeting!r}", repr(GREETING)) + _IMPORT
    # by way of the guard, which outlives all others: programs that workers start find it too
    code += _FROM_ZIP.replace("{path}", '"/proc/%d/fd/%d" % (os.getpid(), fd)')
    code += _LOAD + _GUARD + "main()\n"
    return [python, "-c", code]


def import_code() -> str:
    """Return code that imports the very package which is imported here, and leaves the search path to the user.

    The working directory is taken from the path, as modules there must not shadow the standard library's.
    """
    place = traceml.__path__[0]
    if Path(place).is_dir():
        load = _FROM_FOLDER.replace("{init!r}", repr(f"{place}/__init__.py")).replace("{package!r}", repr(place))
    else:
        load = _FROM_ZIP.replace("{path}", repr(_archive()))

    return _IMPORT + load + _LOAD


@functools.cache
def bundle() -> bytes:
    """Return the package as an agent wants it: 8 bytes of length, then a zip file."""
    root = Path(traceml.__path__[0])
    data = _packed(root) if root.is_dir() else Path(_archive()).read_bytes()
    return _LENGTH.pack(len(data)) + data


def _archive() -> str:
    """Return the path of the zip file that we were imported from."""
    return str(traceml.__path__[0]).removesuffix("/traceml")


def _packed(root: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        sources = [*root.glob("*.py"), *(path for room in _ROOMS for path in (root / room).rglob("*.py"))]
        for source in sources:
            _add(archive, source, str(source.relative_to(root.parent)))

        for place, name in [*(("first", name) for name in _FIRST), *(("extra", name) for name in _EXTRA)]:
            spec = importlib.util.find_spec(name)
            for folder in (spec.submodule_search_locations or []) if spec is not None else []:
                for source in Path(folder).glob("*.py"):
                    _add(archive, source, f"{place}/{name}/{source.name}")

    return file.getvalue()


def _add(archive: zipfile.ZipFile, source: Path, name: str) -> None:
    """Add a module, and its compiled form where there is one: compiling takes longer than all the rest."""
    archive.writestr(name, source.read_bytes())
    compiled = Path(importlib.util.cache_from_source(str(source)))
    try:
        code = compiled.read_bytes()
    except OSError:
        return

    facts = source.stat()
    if code[8:16] == struct.pack("<II", int(facts.st_mtime) & 0xFFFFFFFF, facts.st_size & 0xFFFFFFFF):
        # "unchecked": the zip file's times mean nothing; a Python of another version takes the source
        archive.writestr(f"{name}c", code[:4] + struct.pack("<I", 1) + bytes(8) + code[16:])
