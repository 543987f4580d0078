"""Commands that start agents, also on hosts where the package is not installed.

The command is one line, which process lists show; it reads the program from its standard input. On this machine and
with the same Python, the program contains the package's path. Elsewhere it writes the greeting. A host that has the
same files at the same paths (a shared file system, the same image) imports them. Any other asks for the package, reads
it (a zip file) from its standard input into a memory file, and imports it from there: nothing is written to a disk.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import io
import struct
import zipfile
from pathlib import Path

from traceml.inspection import kernel_state
from traceml.launch.launcher.hosts import package_check
from traceml.launch.shared import process_cleanup
from traceml.launch.shared.channel_frames import GREETING, message_frame
from traceml.launch.shared.launch_messages import PackageRequest
from traceml.launch.shared.package_import import PACKAGE, archive_path, import_code, zip_import_code
from traceml.launch.shared.process_cleanup import AGENT_NAME

__all__ = ["agent_command", "cleanup_program", "local_program", "remote_program", "sent_package"]

# Packages that an agent, a zygote or a traced worker may need.
_PACKAGES = (
    "launch",
    "session",
    "track",
    "recorder",
    "instrument",
    "samplers",
    "transport",
    "database",
    "inspection",
    "privacy",
)
# Parts of them that only an aggregator, its delivery processes and readers of a run need: a fifth of the bytes.
_ELSEWHERE = ("database/store", "track/backends", "track/delivery")
_FIRST = ("cloudpickle",)  # only the same version surely unpacks what it packs
_EXTRA = ("msgpack",)  # for hosts that have torch and nothing else

# Without a buffer: what follows the line is for the program.
_READ_LINE = 'import io;exec(io.open(0,"rb",0,closefd=False).readline())'
_READ_PROGRAM = """
import os
program = b""
while len(program) < {size}:
    program += os.read(0, {size} - len(program)) or os._exit(1)
exec(program)
"""
# Valid syntax for old Pythons too, so that they can report their version.
_REMOTE = """
import os, sys
if sys.version_info < (3, 11):
    words = "traceml: Python %s at %s is too old: 3.11 or newer is needed\\n"
    sys.stderr.write(words % (sys.version.split()[0], sys.executable))
    sys.exit(78)
os.write(1, {greeting!r})
exec({check!r})
exec({installed!r} if has_files{files!r} else {sent!r})
"""
_RECEIVE = """
os.write(1, {request!r})
def receive(left, take):
    while left:
        piece = os.read(0, min(left, 65536))
        if not piece:
            sys.exit("traceml: the launcher closed the connection")
        left -= take(piece)
size = bytearray()
receive({head}, lambda piece: size.extend(piece) or len(piece))
fd = os.memfd_create("traceml")
receive(int.from_bytes(size, "big"), lambda piece: os.write(fd, piece))
"""
_SIZE = struct.Struct(">Q")
# Modules by name and source, each after those that it imports: that host may have no traceml.
_RUN_SOURCES = """
import sys, types
for name, source in modules:
    package = name.rpartition(".")[0]
    while package:
        sys.modules[package] = types.ModuleType(package)
        package = package.rpartition(".")[0]

    module = sys.modules[name] = types.ModuleType(name)
    exec(source, vars(module))
"""
_FORK_AND_RUN = """
from traceml.launch.agent.reaper import fork_under_reaper
fork_under_reaper()
from traceml.launch.agent.agent_main import main
"""


def agent_command(python: str) -> list[str]:
    """Return the command of an agent; its standard input starts with a program of this module."""
    return [python, "-c", _READ_LINE, AGENT_NAME]


def local_program() -> bytes:
    """Return the program of an agent that is a child of this process."""
    return _program(import_code() + _FORK_AND_RUN + "main(local=True)\n")


def remote_program() -> bytes:
    """Return the program of an agent elsewhere; it writes the greeting, and the message `package` if it needs one."""
    receive = _RECEIVE.replace("{request!r}", repr(message_frame(PackageRequest()))).replace("{head}", str(_SIZE.size))
    # the path of the reaper, which outlives all others: programs that workers start find it too
    sent = receive + zip_import_code('"/proc/%d/fd/%d" % (os.getpid(), fd)')
    parts = {
        "greeting": GREETING,
        "check": inspect.getsource(package_check),
        "installed": import_code(),
        "files": _installed_files(),
        "sent": sent,
    }
    code = _REMOTE
    for name, value in parts.items():
        code = code.replace(f"{{{name}!r}}", repr(value))

    return _program(code + _FORK_AND_RUN + "main()\n")


def sent_package() -> bytes:
    """Return what an agent that has asked for the package reads: its size and a zip file."""
    return _SIZE.pack(len(_bundle())) + _bundle()


def cleanup_program(mark: str, agent: int) -> bytes:
    """Return a program that ends what a lost agent has left on its host; see `process_cleanup.end_job`."""
    modules = [(module.__name__, inspect.getsource(module)) for module in (kernel_state, process_cleanup)]
    return _program(f"modules = {modules!r}\n{_RUN_SOURCES}module.end_job({mark!r}, {agent})\n")


def _program(code: str) -> bytes:
    """Return a short line that reads the rest at once and executes it: the command reads the line byte by byte."""
    program = code.encode()
    return f"exec({_READ_PROGRAM.format(size=len(program))!r})\n".encode() + program


@functools.cache
def _bundle() -> bytes:
    """Return the package as a zip file."""
    root = Path(PACKAGE)
    return _packed(root) if root.is_dir() else Path(archive_path()).read_bytes()


@functools.cache
def _installed_files() -> tuple[list[str], int, dict[str, str]]:
    """Return the arguments of `package_check.has_files`; those of no host if this package is itself in a zip file."""
    root = Path(PACKAGE)
    if not root.is_dir():
        return [PACKAGE], -1, {}

    specs = {name: importlib.util.find_spec(name) for name in (*_FIRST, *_EXTRA)}
    origins = {name: str(spec.origin) for name, spec in specs.items() if spec is not None}
    folders = list(dict.fromkeys(str(source.parent) for source in _sources(root)))
    folders += [str(Path(origin).parent) for origin in origins.values()]
    return folders, package_check.files_stamp(folders), origins


def _sources(root: Path) -> list[Path]:
    """Return the package's modules that are sent; those in its own folder first."""
    found = [*root.glob("*.py"), *(path for package in _PACKAGES for path in (root / package).rglob("*.py"))]
    return [path for path in found if not path.relative_to(root).as_posix().startswith(_ELSEWHERE)]


def _packed(root: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for source in _sources(root):
            _add(archive, source, str(source.relative_to(root.parent)))

        for place, name in [*(("first", name) for name in _FIRST), *(("extra", name) for name in _EXTRA)]:
            spec = importlib.util.find_spec(name)
            for folder in (spec.submodule_search_locations or []) if spec is not None else []:
                for source in Path(folder).glob("*.py"):
                    _add(archive, source, f"{place}/{name}/{source.name}")

    return file.getvalue()


def _add(archive: zipfile.ZipFile, source: Path, name: str) -> None:
    """Add a module, and its bytecode if there is one: compiling would take longer than everything else."""
    archive.writestr(name, source.read_bytes())
    compiled = Path(importlib.util.cache_from_source(str(source)))
    try:
        code = compiled.read_bytes()
    except OSError:
        return

    facts = source.stat()
    if code[8:16] == struct.pack("<II", int(facts.st_mtime) & 0xFFFFFFFF, facts.st_size & 0xFFFFFFFF):
        # "unchecked", as times in the zip file differ; a Python of another version uses the source
        archive.writestr(f"{name}c", code[:4] + struct.pack("<I", 1) + bytes(8) + code[16:])
