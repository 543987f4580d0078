"""The house has floors: imports go down only, and the public list is what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import traceml

SOURCE = Path(traceml.__file__).parent

# Top to bottom; a room imports only from rooms below it, from itself, and from the leaf modules.
ROOMS = (
    "cli",
    "integrations",
    "launch",
    "supervise",
    "session",
    "display",
    "renderers",
    "runs",
    "aggregator",
    "track",
    "diagnosis",
    "traces",
    "tasks",
    "recorder",
    "instrument",
    "samplers",
    "transport",
    "database",
)
# Rooms that keep to less than everything below them.
NARROW = {
    "instrument": {"database"},
    "samplers": {"database"},
    "transport": {"database"},
    "diagnosis": {"database"},
    "recorder": {"instrument", "samplers", "transport", "database"},
    "tasks": set(),
    "traces": {"tasks"},
    "integrations": {"session", "runs", "track", "recorder"},
    "supervise": {"display", "renderers", "transport"},
    "session": {"display", "track", "recorder"},
    "track": {"diagnosis", "recorder", "instrument", "transport", "database"},
    "aggregator": {"diagnosis", "track", "transport", "database"},
    "runs": {"diagnosis", "track", "traces", "database"},
    "renderers": {"runs", "diagnosis", "database"},
    "display": {"renderers", "runs", "diagnosis", "database"},
}
# Folders of a divided room: what each may import beside itself and the leaves, as other folders (a.b) or whole rooms.
SUBROOMS = {
    "launch.launcher": {"launch.wire", "supervise", "database"},
    "launch.agent": {"launch.wire"},
    "launch.worker": {"launch.wire", "session", "recorder"},
    "launch.wire": {"database"},
    "track.rank": {
        "track.plugins", "track.filters", "track.tracker_state", "track.wandb_sweep", "recorder", "instrument",
        "database",
    },
    "track.delivery": {
        "track.plugins", "track.filters", "track.tracker_state", "track.wandb_sweep", "database", "diagnosis",
    },
    "track.backends": {"track.plugins"},
    "track.plugins": set(),
}  # fmt: skip
# Packages that a folder's process must never load.
FORBIDDEN = {
    "launch.agent": {"torch", "numpy", "asyncio", "threading"},
    "track.rank": {"torch", "numpy", "sqlite3", "pydantic"},
    "track.plugins": {"torch", "numpy", "sqlite3", "pydantic"},
    "track.delivery": {"torch", "pydantic"},
}
# What users import, and nobody inside.
FACES = {"__init__", "__main__", "dask"}
LEAVES = {"formatting", "settings", "coerce", "errors", "clock", "ids", "priority", "fail_open", "version", "privacy"}


def _room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imported_rooms(path: Path) -> set[str]:
    """Every room that a module imports from, also inside functions and under TYPE_CHECKING."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "traceml":
                names = [f"traceml.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]

        rooms |= {name.split(".")[1] for name in names if name.startswith("traceml.")}

    return rooms


def test_every_module_belongs_to_a_room() -> None:
    """No folder or module stands outside the plan."""
    known = {*ROOMS, *LEAVES, *FACES}

    assert {_room_of(path) for path in SOURCE.rglob("*.py")} <= known


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    """A module imports from below its own room only."""
    room = _room_of(path)
    if room in FACES:
        return

    below = set() if room in LEAVES else set(ROOMS[ROOMS.index(room) + 1 :])
    allowed = NARROW.get(room, below) | LEAVES | {room}

    assert _imported_rooms(path) <= allowed


def _modules_imported(path: Path) -> set[str]:
    """Every module that a module imports, also inside functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}

    return names


def test_folders_keep_to_their_part_of_a_room() -> None:
    """A folder of a divided room imports what SUBROOMS lists, and no folder of such a room is missing there."""
    divided = {name.split(".")[0] for name in SUBROOMS}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).parts
        folder = ".".join(parts[:2])
        if parts[0] not in divided or len(parts) < 3:
            continue

        allowed = SUBROOMS[folder] | {folder} | LEAVES
        modules = _modules_imported(path)
        assert not {name.split(".")[0] for name in modules} & FORBIDDEN.get(folder, set()), path
        for name in modules:
            _, _, inside = name.partition("traceml.")
            room = inside.split(".")[0]
            part = ".".join(inside.split(".")[:2])
            if inside and room not in FACES and (room in ROOMS or room in LEAVES):
                assert part in allowed or room in allowed or inside == room in divided, f"{path}: {name}"


def test_public_names_are_sorted_and_exist() -> None:
    """`traceml.__all__` is sorted, complete, and each name can be had."""
    assert traceml.__all__ == sorted(traceml.__all__)
    assert set(traceml._HOMES) == set(traceml.__all__)
    for name in traceml.__all__:
        assert getattr(traceml, name) is not None


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_lists_what_it_offers(path: Path) -> None:
    """Each module with public definitions has an `__all__` whose names exist."""
    if path.name in {"__init__.py", "__main__.py"}:
        return

    name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    module = import_module(name)
    for public in module.__all__:
        assert hasattr(module, public), f"{name}.{public}"


def test_import_is_light() -> None:
    """`import traceml` brings in none of the heavy packages, nor a room."""
    code = "import sys, traceml; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"torch", "numpy", "pydantic", "rich", "asyncio", "msgpack"} & set(loaded)
    assert [name for name in loaded if name.startswith("traceml.")] == []
