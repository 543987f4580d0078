"""The structure of the package: imports go down only, without cycles, and names occur once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import traceml
from tests.source_tree import SOURCE, nodes_of, source_files

# Top to bottom; a package imports only from packages below it, from itself, and from the leaf modules.
PACKAGES = (
    "cli",
    "integrations",
    "launch",
    "supervise",
    "session",
    "display",
    "renderers",
    "runs",
    "whatif",
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
# Packages that keep to less than everything below them.
NARROW = {
    "instrument": {"database"},
    "samplers": {"database"},
    "transport": {"database"},
    "diagnosis": {"database"},
    "recorder": {"instrument", "samplers", "transport", "database"},
    "tasks": set(),
    "traces": set(),
    "whatif": set(),
    "integrations": {"session", "runs", "track", "recorder"},
    "supervise": {"display", "renderers", "transport", "database"},
    "session": {"display", "runs", "track", "recorder", "transport"},
    "track": {"diagnosis", "recorder", "instrument", "transport", "database"},
    "aggregator": {"diagnosis", "track", "transport", "database"},
    "runs": {"diagnosis", "track", "traces", "database"},
    "renderers": {"runs", "whatif", "diagnosis", "database"},
    "display": {"renderers", "runs", "diagnosis", "database"},
}
# Folders of a divided package: what each may import beside itself and the leaves (folders, modules, whole packages).
SUBPACKAGES = {
    "runs.rows": {"diagnosis", "database"},
    "runs.report": {
        "runs.rows", "runs.about", "runs.run_state", "runs.json_document", "diagnosis", "track", "database",
    },
    "runs.comparison": {"runs.report", "runs.rows", "runs.json_document", "diagnosis", "database"},
    "runs.export": {"runs.report", "runs.rows", "diagnosis", "traces", "database"},
    "runs.fleet": {
        "runs.report", "runs.find", "runs.run_query", "runs.json_document", "runs.export.table_columns", "diagnosis",
        "traces", "database.states",
    },
    "diagnosis.facts": {"database"},
    "diagnosis.steps": {"diagnosis.facts", "database"},
    "diagnosis.hangs": {
        "diagnosis.kinds", "diagnosis.findings", "diagnosis.advice", "diagnosis.facts", "diagnosis.steps",
        "diagnosis.rules", "database",
    },
    "diagnosis.rules": {
        "diagnosis.kinds", "diagnosis.findings", "diagnosis.advice", "diagnosis.facts", "diagnosis.steps",
        "diagnosis.stalls", "database",
    },
    "diagnosis.deaths": {
        "diagnosis.kinds", "diagnosis.findings", "diagnosis.advice", "diagnosis.facts", "diagnosis.memory", "database",
    },
    "diagnosis.memory": {
        "diagnosis.kinds", "diagnosis.findings", "diagnosis.advice", "diagnosis.facts", "diagnosis.steps", "database",
    },
    "diagnosis.stalls": {"diagnosis.kinds", "diagnosis.findings", "diagnosis.facts", "diagnosis.steps", "database"},
    "diagnosis.merged_hosts": {
        "diagnosis.findings", "diagnosis.intake", "diagnosis.facts", "diagnosis.steps", "database",
    },
    "database.flight": {"database.schema", "database.file_contents"},
    "database.store": {"database.schema", "database.row_arrays"},
    "database.snapshots": {"database.schema", "database.info_kinds", "database.flight"},
    "launch.launcher": {"launch.shared", "supervise", "recorder", "database"},
    "launch.launcher.submission": {"launch.launcher", "supervise"},
    "launch.launcher.hosts": {"launch.shared"},
    "launch.launcher.logs": {"launch.shared"},
    "launch.launcher.job": {
        "launch.launcher.hosts", "launch.launcher.logs", "launch.shared", "supervise", "transport", "database",
    },
    "launch.agent": {"launch.shared", "database"},
    "launch.worker": {"launch.shared", "session", "recorder"},
    "launch.shared": {"database"},
    "track.rank": {
        "track.plugins", "track.filters", "track.tracker_state", "track.wandb_sweep", "recorder", "instrument",
        "database",
    },
    "track.delivery": {
        "track.plugins", "track.filters", "track.tracker_state", "track.wandb_sweep", "database", "diagnosis",
    },
    "track.backends": {"track.plugins", "database.states"},
    "track.plugins": set(),
    "traces.writer": set(),
    "traces.native": set(),
    "traces.reader": {"traces.native"},
    "traces.aggregate": {"traces.native"},
    "traces.query": {"traces.reader", "traces.aggregate"},
}  # fmt: skip
# Packages whose files run in several processes: each of their folders says in which.
PACKAGES_OF_MANY_PROCESSES = {"launch", "supervise"}
# Folders of one process, with the words for it.
WORDS_OF_PROCESSES = {
    "launch.launcher": r"\blauncher\b", "launch.agent": r"\bagent\b", "launch.worker": r"\b(zygote|workers?)\b",
}  # fmt: skip
# Packages that a folder's process must never load.
FORBIDDEN = {
    "database.flight": {"torch", "numpy", "sqlite3", "pydantic", "msgspec"},
    "launch.agent": {"torch", "numpy", "asyncio", "threading"},
    "track.rank": {"torch", "numpy", "sqlite3", "pydantic", "msgspec"},
    "track.plugins": {"torch", "numpy", "sqlite3", "pydantic", "msgspec"},
    "track.delivery": {"torch", "pydantic"},
    "traces.writer": {"torch", "numpy", "asyncio"},
}
# Modules for users, which no other module imports.
FACES = {"__init__", "__main__", "dask"}
LEAVES = {
    "blas_threads", "formatting", "setting_sources", "settings", "coerce", "errors", "clock", "ids", "installation",
    "gc_pause", "loopback", "trusted_files", "helper_programs", "fail_open", "fork_gate", "process_ends", "run_folder",
    "version", "privacy", "inspection",
}  # fmt: skip

# Classes that have their name more than once: each a callback that its framework's users look for under this name.
SHARED_CLASSES = {"TraceMLCallback"}
# Plugins are named after the library that they serve, in each family of plugins.
SHARED_FILES = {"huggingface", "lightning", "ray", "tensorboard"}


@cache
def _files() -> dict[str, Path]:
    """Return the package's modules by dotted name."""
    names = {}
    for path in source_files():
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    return names


def _package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def _imports(path: Path) -> frozenset[str]:
    """Return every name that a module imports: also inside functions, under TYPE_CHECKING, and by `import_module`."""
    return frozenset(_import_names(path))


def _import_names(path: Path) -> Iterator[str]:
    for node in nodes_of(path, ast.ImportFrom, ast.Import, ast.Call):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif "import_module" in (
            getattr(node.func, "id", None),
            getattr(node.func, "attr", None),
        ):
            yield from (each.value for each in node.args[:1] if isinstance(each, ast.Constant))


def _started(path: Path) -> set[str]:
    """Return the modules that a module names in strings: processes started by `python -m`."""
    values = {node.value for node in nodes_of(path, ast.Constant) if isinstance(node.value, str)}
    return values & _files().keys()


def _imported_packages(path: Path) -> set[str]:
    return {name.split(".")[1] for name in {*_imports(path), *_started(path)} if name.startswith("traceml.")}


def _imported_files(path: Path) -> set[str]:
    """Return the modules of the package that a module imports."""
    names = {name if name in _files() else name.rpartition(".")[0] for name in _imports(path)}
    return names & _files().keys()


def test_every_module_belongs_to_a_package() -> None:
    """No folder or module stands outside the plan."""
    known = {*PACKAGES, *LEAVES, *FACES}

    assert {_package_of(path) for path in _files().values()} <= known


def test_imports_go_down() -> None:
    """A module imports from below its own package only."""
    wrong = {}
    for name, path in _files().items():
        package = _package_of(path)
        if package in FACES:
            continue

        if more := _imported_packages(path) - (_allowed(package) | LEAVES | {package}):
            wrong[name] = more

    assert wrong == {}


def _allowed(package: str) -> set[str]:
    """Return the packages from which a package may import."""
    below = set() if package in LEAVES else set(PACKAGES[PACKAGES.index(package) + 1 :])
    return NARROW.get(package, below)


def _prefixes(name: str) -> list[str]:
    """Return a dotted name and the names above it, the longest one first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _folder_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).parent.parts)


def test_folders_keep_to_their_part_of_a_package() -> None:
    """A folder of a divided package imports what SUBPACKAGES lists."""
    for name, path in _files().items():
        folder = next((each for each in _prefixes(_folder_of(path)) if each in SUBPACKAGES), None)
        if folder is None:
            continue

        imported = _imports(path)
        assert not {each.split(".")[0] for each in imported} & FORBIDDEN.get(folder, set()), name
        allowed = SUBPACKAGES[folder] | {folder, *LEAVES, *FACES}
        inside = {each.removeprefix("traceml.") for each in imported if each.startswith("traceml.")}
        wrong = {each for each in inside if not allowed.intersection(_prefixes(each))}
        assert wrong == set(), name


def test_folders_of_a_divided_package_are_listed() -> None:
    """No folder of a divided package is missing in SUBPACKAGES."""
    divided = {name.rpartition(".")[0] for name in SUBPACKAGES}
    folders = {_folder_of(path) for path in _files().values()}

    assert {each for each in folders if each.rpartition(".")[0] in divided - {""}} == SUBPACKAGES.keys()


def test_folders_are_small() -> None:
    """A folder has at most 20 modules: a larger one has more than one subject."""
    sizes = Counter(_folder_of(path) for path in _files().values() if path.name != "__init__.py")

    assert {folder: size for folder, size in sizes.items() if size > 20} == {}


def test_a_folder_says_what_it_may_import() -> None:
    """The docstring of a folder has two parts: what lives there, and where it runs and what it may import."""
    docstrings = {
        name: _docstring(path) for name, path in _files().items() if path.name == "__init__.py" and name != "traceml"
    }

    assert [name for name, text in docstrings.items() if not re.search(r"\bimports?\b", text.lower())] == []
    many = {name: text for name, text in docstrings.items() if name.split(".")[1] in PACKAGES_OF_MANY_PROCESSES}
    assert [name for name, text in many.items() if not _processes(text)] == []


def test_a_folder_says_truly_what_it_may_import() -> None:
    """What the docstring of a folder names exists, and is what PACKAGES and SUBPACKAGES allow; packages name all."""
    more, missing = {}, {}
    for name, path in _files().items():
        if path.name == "__init__.py" and name != "traceml":
            folder, package = name.removeprefix("traceml."), _package_of(path.parent)
            allowed = SUBPACKAGES.get(folder) or _allowed(package) | {package}
            named = _named_imports(folder, _docstring(path))
            more[folder] = {each for each in named if not {*allowed, *LEAVES, folder}.intersection(_prefixes(each))}
            missing[folder] = NARROW.get(folder, set()) - named

    assert {folder: names for folder, names in more.items() if names} == {}
    assert {folder: names for folder, names in missing.items() if names} == {}


def _named_imports(folder: str, docstring: str) -> set[str]:
    """Return the packages and modules that a docstring says a folder imports, by full name if there is one."""
    sentences = re.findall(r"\bimports?\b.*?(?:\.(?=\s)|\Z)", docstring, re.DOTALL | re.IGNORECASE)
    clauses = (re.split(r";|\b(?:no|neither|nothing|never|what)\b", each)[0] for each in sentences)
    words = {word for clause in clauses for word in re.findall(r"`([\w.]+)`", clause)}
    places = ["", *(f"{each}." for each in _prefixes(folder))]
    return {next((at + word for at in places if f"traceml.{at}{word}" in _files()), word) for word in words}


def test_a_module_of_the_wire_names_its_processes() -> None:
    """The line `Process:` of each module of `launch/shared` has the processes whose folders import it, and no other."""
    importers = defaultdict(set)
    for name, path in _files().items():
        for each in _imported_files(path):
            importers[each].add(name)

    told, found = {}, {}
    for name in [name for name in _files() if name.startswith("traceml.launch.shared.")]:
        line = _processes(_docstring(_files()[name]))
        told[name] = {folder for folder, word in WORDS_OF_PROCESSES.items() if re.search(word, line)}
        found[name] = {".".join(each.split(".")[1:3]) for each in _reached(name, importers)} & WORDS_OF_PROCESSES.keys()

    assert told == found


def _docstring(path: Path) -> str:
    return next(ast.get_docstring(node) or "" for node in nodes_of(path, ast.Module))


def _processes(docstring: str) -> str:
    """Return the sentence of a docstring that names processes; empty if there is none."""
    found = re.search(r"^Process: (.+?)\.(\s|$)", docstring, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def _reached(name: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Return what a node leads to, directly or through others."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        waiting.extend(more := graph.get(waiting.pop(), set()) - seen)
        seen |= more

    return seen


def test_packages_do_not_import_traceml_itself() -> None:
    """`import traceml` brings the public names of every package: only the command line may use it."""
    bare = {
        name
        for name, path in _files().items()
        if _package_of(path) not in {*FACES, "cli"} and "traceml" in _imports(path)
    }

    assert bare == set()


def test_no_module_imports_itself_through_others() -> None:
    """There are no cycles, imports inside functions and under TYPE_CHECKING included."""
    assert _cycles() == []


def _cycles() -> list[set[str]]:
    """Return the sets of modules that import each other."""
    reach: dict[str, set[str]] = {}
    inside = {name: path for name, path in _files().items() if _package_of(path) not in FACES}
    graph = {name: _imported_files(path) & inside.keys() - {name} for name, path in inside.items()}
    for name in graph:
        reach[name] = _reached(name, graph)

    found = {frozenset({name, *(each for each in seen if name in reach[each])}) for name, seen in reach.items()}
    return [set(cycle) for cycle in found if len(cycle) > 1]


def test_a_class_has_its_name_alone() -> None:
    """A class name occurs once in the package, its leading underscore ignored."""
    homes = defaultdict(set)
    for name, path in _files().items():
        for node in nodes_of(path, ast.ClassDef):
            homes[node.name.lstrip("_")].add(name)

    shared = {name: places for name, places in homes.items() if len(places) > 1}
    assert {name: shared[name] for name in shared.keys() - SHARED_CLASSES} == {}


def test_a_file_has_its_name_alone() -> None:
    """A file name occurs once in the package, except a command and the module that does its work."""
    homes = defaultdict(set)
    for name, path in _files().items():
        if not path.stem.startswith("__") and _package_of(path) != "cli":
            homes[path.stem].add(name)

    shared = {name: places for name, places in homes.items() if len(places) > 1}
    assert {name: shared[name] for name in shared.keys() - SHARED_FILES} == {}


def test_public_names_are_sorted_and_exist() -> None:
    """`traceml.__all__` is sorted, complete, and each name can be had."""
    assert traceml.__all__ == sorted(traceml.__all__)
    assert set(traceml._HOMES) == set(traceml.__all__)
    for name in traceml.__all__:
        assert getattr(traceml, name) is not None


@pytest.mark.process
def test_modules_of_frameworks_need_no_import_of_their_own() -> None:
    """`traceml.dask.X` and `traceml.integrations.ray.X` work after `import traceml`; other names are missing."""
    code = (
        "import traceml\n"
        "print(traceml.dask.TraceMLDaskWorkerPlugin.__name__, traceml.integrations.ray.__name__)\n"
        "print(hasattr(traceml, 'nope'), hasattr(traceml.integrations, 'nope'))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "TraceMLDaskWorkerPlugin traceml.integrations.ray\nFalse False\n"


@pytest.mark.process
def test_the_first_use_of_a_name_searches_for_no_garbage() -> None:
    """A script has many objects, torch's among them. The collector is on again afterwards, unless it was off."""
    code = (
        "import gc, importlib, sys, traceml.gc_pause\n"
        "gc.set_threshold(1, 1, 1)\n"
        "gc.enable() if sys.argv[1] == 'on' else gc.disable()\n"
        "loaded = []\n"
        "gc.callbacks.append(lambda phase, _: loaded.append(len(sys.modules)))\n"
        "before = len(sys.modules)\n"
        "traceml.log_metric\n"
        "print(before < len(sys.modules), {*loaded} <= {before, len(sys.modules)}, gc.isenabled())"
    )
    shown = [
        subprocess.run([sys.executable, "-c", code, state], capture_output=True, text=True, check=True).stdout
        for state in ("on", "off")
    ]
    assert shown == ["True True True\n", "True True False\n"]


def test_completion_offers_users_names_alone() -> None:
    """`dir(traceml)` has the public names and the imported folders, and none that the module needs itself."""
    offered = {name for name in dir(traceml) if not name.startswith("__")}

    assert set(traceml.__all__) <= offered
    assert all(hasattr(import_module(f"traceml.{name}"), "__file__") for name in offered - {*traceml.__all__})


@pytest.mark.process
def test_every_module_lists_what_it_offers() -> None:
    """Each module with public definitions has an `__all__` whose names exist."""
    for name, path in _files().items():
        if path.name in {"__init__.py", "__main__.py"}:
            continue

        module = import_module(name)
        for public in module.__all__:
            assert hasattr(module, public), f"{name}.{public}"


@pytest.mark.process
def test_import_is_light() -> None:
    """`import traceml` brings in none of the heavy libraries, nor a package of its own."""
    code = "import sys, traceml; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"torch", "numpy", "pydantic", "rich", "asyncio", "msgpack"} & set(loaded)
    assert [name for name in loaded if name.startswith("traceml.")] == []
