"""Code in the pages: commands and options exist, names and settings too, and Python runs.

Commands that start jobs, hosts or servers are parsed here; tests of their own packages run them.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import traceml
from tests.documentation.pages import PAGES, ROOT, Block, blocks, commands_of, docstring_examples, spans
from tests.forked import client as forked
from traceml import cli, settings, traces
from traceml.cli.completion import whole_parser
from traceml.cli.options.parsing import parse
from traceml.cli.runs import EDITS
from traceml.setting_sources import former_setting

# Python that needs other hosts, or a framework's training: the test that runs the same call.
CALLED_ELSEWHERE = {
    "integrations.huggingface": "integrations/test_huggingface.py",
    "integrations.lightning": "integrations/test_lightning.py",
    "integrations.ray": "integrations/test_ray.py",
    "traceml.launch(": "launch/launcher/test_launcher.py",
    "traceml.Launcher": "launch/launcher/test_launcher.py",
    "dask.distributed": "tasks/test_dask_plugin.py",
    'backend=["mlflow"': "track/backends/test_round_trip.py",
    'backend="mlflow"': "track/backends/test_round_trip.py",
    "TrainingArguments(": "integrations/test_huggingface.py",
    "Accelerator(": "integrations/test_accelerate.py",
    "SFTConfig(": "integrations/test_trl.py",
}
THEIRS = {"watch", "view", "inspect"}  # commands of traceml-ai
STORIES = {"docs/quickstart.md", "docs/guides/mlflow.md"}  # run by test_stories.py
EXAMPLES = "docstrings"
ON_HOSTS = {"traceml.launch", "traceml.Launcher", "traceml.SubmittedJob"}  # run in tests/launch
# Values that a page's code takes from the reader's program.
PRELUDES = {
    "README.md": """
import types
augment, process, paths = (lambda batch: batch), len, ["a", "bc"]
reader = iter([1, 2, 3])
batch = 0
wandb = types.SimpleNamespace(log=print)
""",
    "docs/traces.md": """
import pathlib
from tests.diagnosis.fabricated import Job
from tests.runs.fabricated_store import store_run
from traceml.cli import main
from traceml.traces import Writer
store_run(pathlib.Path("traceml_runs/20260101-000000-train-a1b2"), Job(steps=30))
assert main(["export", "--format", "parquet", "-o", "run-parquet"]) == 0
pathlib.Path("run").mkdir()
with Writer("run/rank0.pfw.gz") as each, each.span("read", cat="POSIX", size=4096):
    pass
""",
    EXAMPLES: """
import types
from traceml import traces
batch, batches, wandb = [1, 2], [[1], [2]], types.SimpleNamespace(log=print)
augment = train = lambda batch: batch
with traces.Writer("trace.pfw.gz") as each, each.span("read", cat="POSIX"):
    pass
traceml.init(local=True)
with traceml.trace_step():
    pass
traceml.flush()
""",
    "docs/tracking.md": "read_watts = lambda: 7.0",
    "docs/guides/memory-leak.md": "range = lambda steps, full=range: full(min(steps, 3))",
}
SHELL = [(str(block), line) for block in blocks() for line in block.shell_lines()]
COMMANDS = [(place, words) for place, line in SHELL for words in commands_of(line)]
# Variables that exist only in the environment, as docs/settings.md lists them, and the switch.
VARIABLES = set(re.findall(r"TRACEML_[A-Z_]+", (ROOT / "docs" / "settings.md").read_text()))


def _parse(words: list[str]) -> object:
    """Parse the arguments of a command as it does itself."""
    command, *rest = words
    module = import_module(cli.COMMANDS[command][0])
    if command == "runs" and rest[:1] and rest[0] in EDITS:
        return EDITS[rest[0]]

    if hasattr(module, "make_parser"):
        return module.make_parser().parse_args(rest)

    return parse(getattr(module, f"{command.title()}Options"), rest, prog=f"traceml {command}")


def test_commands_are_found():
    """The pages show every command at least once, and the parser of this test sees them."""
    shown = {words[0] for _, words in COMMANDS} | {words[0] for page in PAGES for words in _inline(page)}

    assert set(cli.COMMANDS) <= shown


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_commands_in_blocks_are_understood(place, words):
    """Each option exists, and takes that value."""
    assert _parse(words) is not None


def _inline(page: Path) -> list[list[str]]:
    """Return the words of the commands in a page's sentences; they may have placeholders."""
    return [span.split()[1:] for span in spans(page) if re.match(r"traceml [a-z]+\b", span)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_exist(page):
    """Command and options are known, whatever stands for the values."""
    known = _known_commands()
    for words in _inline(page):
        if page.name == "migrating.md" and words[0] in THEIRS:
            continue

        command = words[0].strip("[]")
        assert command in known, words
        options = set(known[command]._option_string_actions) | _torchrun(command) | _of_edits(command)
        used = {word for each in words for word in re.findall(r"--[a-z][a-z-]+", each)}
        assert used <= options, f"traceml {' '.join(words)}"


@cache
def _known_commands():
    return next(action for action in whole_parser()._actions if action.dest == "command").choices


def _torchrun(command: str) -> set[str]:
    return {"--nproc-per-node", "--standalone"} if command == "run" else set()


def _of_edits(command: str) -> set[str]:
    return {"--undo", "--yes", "--remove"} if command == "runs" else set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_variables_are_settings(page):
    """A variable of ours that a page names has an effect."""
    names = {f"TRACEML_{name.upper()}" for name in settings.Settings.model_fields} | VARIABLES
    found = set(re.findall(r"\bTRACEML_[A-Z_]*[A-Z]\b", page.read_text()))
    if page.name == "migrating.md":
        found = {name for name in found if not former_setting(name.removeprefix("TRACEML_").lower(), is_variable=True)}

    assert found <= names | {"TRACEML_ON"}


def test_data_in_blocks_is_sound():
    """TOML has settings that exist; JSON and YAML are well-formed."""
    for block in blocks("toml"):
        tables = tomllib.loads(block.text)
        assert set(tables) - {"backends"} <= settings.Settings.model_fields.keys(), block

    assert all(json.loads(block.text.replace("…", "")) for block in blocks("json"))
    assert all(yaml.safe_load(block.text) for block in blocks("yaml"))


@pytest.mark.parametrize("block", [*blocks("python"), *docstring_examples()], ids=str)
def test_names_in_python_exist(block):
    """Each name of ours, and each argument by name, is one that the package has."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("traceml"):
            _check_import(node, block)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "traceml":
            assert node.attr in traceml.__all__, f"{block}: traceml.{node.attr}"
        elif isinstance(node, ast.Call):
            _check_arguments(node, block)


def _check_import(node: ast.ImportFrom, block: Block) -> None:
    if node.module == "traceml":
        missing = {alias.name for alias in node.names} - {*traceml.__all__, "traces"}
    else:  # not imported: frameworks are slow
        path = ROOT / "src" / Path(*str(node.module).split(".")).with_suffix(".py")
        missing = {alias.name for alias in node.names if not re.search(rf"\b{alias.name}\b", path.read_text())}

    assert missing == set(), block


def _check_arguments(node: ast.Call, block: Block) -> None:
    called = ast.unparse(node.func)
    owner = {"traceml": traceml, "traces": traces}.get(called.partition(".")[0])
    if owner is None or called.count(".") != 1:
        return

    given = {each.arg for each in node.keywords if each.arg}
    taken = inspect.signature(getattr(owner, called.partition(".")[2])).parameters
    names = settings.Settings.model_fields.keys() if "arguments" in taken else taken.keys()
    assert given <= names or "settings" in taken, f"{block}: {called}"


def _runnable() -> dict[str, list[Block]]:
    pages: dict[str, list[Block]] = {}
    for block in blocks("python"):
        if block.page not in STORIES and not any(mark in block.text for mark in CALLED_ELSEWHERE):
            pages.setdefault(block.page, []).append(block)

    examples = [each for each in docstring_examples() if each.page not in ON_HOSTS]
    return {**pages, EXAMPLES: sorted(examples, key=lambda each: each.page != "traceml.init")}


def test_public_names_have_an_example():
    """All but the errors, of which two have one, and a list of patterns."""
    shown = {each.page for each in docstring_examples()}
    errors = {name for name in traceml.__all__ if name.endswith("Error")} - {"TraceMLError", "TasksFailedError"}
    names = {f"traceml.{name}" for name in traceml.__all__ if name not in errors | {"DEFAULT_ENV_VARS"}}

    assert names | {f"traceml.traces.{name}" for name in traces.__all__} == shown


@pytest.mark.process
def test_python_runs(tmp_path):
    """The blocks of a page run in their order, after what the reader's program provides; all in one process."""
    parts = ["import os, sys, traceml", "from tests.documentation.pages import run_examples"]
    for number, (page, own) in enumerate(_runnable().items()):
        (tmp_path / str(number)).mkdir()
        parts.append(f"os.chdir({str(tmp_path / str(number))!r}); names = {{'traceml': traceml, '__name__': 'page'}}")
        parts.append(f"exec({PRELUDES.get(page, '')!r}, names)")
        parts += [_run_of(block) for block in own]
        parts.append(f"traceml.shutdown(); print('ran', {page!r})")

    script = tmp_path / "all_pages.py"
    script.write_text("\n".join(parts))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRACEML_")}
    own = {"PYTHONPATH": str(ROOT), "TRACEML_QUIET": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = forked.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**kept, **own, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"^ran (.+)$", done.stdout, re.MULTILINE)) == _runnable().keys()


def _run_of(block: Block) -> str:
    """Return the line that runs a block of a page, or the examples in a docstring with the outputs that they show."""
    if block.page.startswith("traceml."):
        return f"run_examples({block.page!r}, names)"

    return f"exec(compile({block.text!r}, {str(block)!r}, 'exec'), names)"


def test_python_that_is_not_run_here_is_run_elsewhere():
    """The tests that are named exist."""
    assert [name for name in CALLED_ELSEWHERE.values() if not (ROOT / "tests" / name).exists()] == []
