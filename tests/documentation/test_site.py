"""The documentation site: it builds with every link checked, and its generated pages are complete."""

from __future__ import annotations

import ast
import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import traceml
from traceml import errors, traces
from traceml.cli import COMMANDS
from traceml.diagnosis.kinds import Kind

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]
_FOR_USERS = r"TraceML\w+|trace|get_worker_runtime"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of the built site; a warning, as of a broken link, fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def _names_for_frameworks() -> dict[str, str]:
    """Return the docstrings of the names that users write in full, as those modules cannot all be imported."""
    found = {}
    for path in [*(ROOT / "src/traceml/integrations").glob("*.py"), ROOT / "src/traceml/dask.py"]:
        module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and re.fullmatch(_FOR_USERS, node.name):
                found[f"{module}.{node.name}"] = ast.get_docstring(node) or ""

    return found


def _text(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text())


def test_the_reference_has_every_public_name(site):
    """Each name of `traceml` and `traceml.traces` has one place, with an anchor."""
    anchors = [
        name for page in site.glob("api/*.html") for name in re.findall(r'id="(traceml\.[\w.]+)"', page.read_text())
    ]

    public = {f"traceml.{name}" for name in traceml.__all__ if not hasattr(errors, name)}
    public |= {f"traceml.errors.{name}" for name in errors.__all__} | {
        f"traceml.traces.{name}" for name in traces.__all__
    }
    assert public | set(_names_for_frameworks()) <= set(anchors)
    assert len(set(anchors)) == len(anchors)


def test_names_for_frameworks_have_an_example():
    """It parses; nothing runs it here."""
    texts = _names_for_frameworks()
    examples = {name: doctest.DocTestParser().get_examples(text) for name, text in texts.items()}

    assert len(texts) >= 8
    assert [name for name, found in examples.items() if not found] == []
    assert all(ast.parse("".join(each.source for each in found)) for found in examples.values())


def test_the_catalog_explains_every_kind(site):
    """Each kind has an example with a remedy, from the rules; nothing of the cards' layout is left."""
    catalog = (site / "catalog.html").read_text()
    parts = re.split(r'<h2 id="[^"]+">([A-Z0-9_]+)<', catalog)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))

    assert sections.keys() == {kind.value for kind in Kind}
    assert [kind for kind, text in sections.items() if "<strong>Next:</strong>" not in text] == []
    assert "─" not in _text(site / "catalog.html")


def test_the_reference_of_commands_has_every_help(site):
    """Each command with its options, without escape codes."""
    text = _text(site / "commands.html")

    assert [name for name in COMMANDS if f"traceml {name}" not in text] == []
    assert "--fail-on" in text
    assert "\x1b" not in text


def test_pages_load_nothing_from_other_servers(site):
    """Fonts, scripts, styles and pictures are in the site."""
    loaded = re.compile(r'<(?:script|img|link)[^>]*?(?:src|href)="(https?:[^"]+)"')
    wrong = {found for page in site.rglob("*.html") for found in loaded.findall(page.read_text())}

    assert wrong == set()
