"""The distribution's name, its extras, and other products that install a package `traceml`."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from traceml.cli.checks.local_checks import _installation
from traceml.installation import DISTRIBUTION, foreign_distributions, install_command, unsupported, warn_of_foreign

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def install(folder: Path, *names: str) -> Path:
    """Put the metadata of distributions into a folder."""
    for name in names:
        (folder / name).mkdir()

    return folder


def test_the_name_is_the_projects() -> None:
    """Hints name the distribution that is built."""
    assert PROJECT["name"] == DISTRIBUTION
    assert install_command("web") == "pip install 'traceml-torch[web]'"


def test_every_hint_names_an_extra_that_exists() -> None:
    """Each `install_command` of the source, and each `traceml-torch[...]` of the pages, is an extra."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py")]
    text = "\n".join(page.read_text() for page in pages)
    named = {*re.findall(r'install_command\(["\'](\w+)', text), *re.findall(r"traceml-torch\[(\w+)", text)}

    assert named > {"web", "torch", "dask", "aim"}
    assert named <= set(PROJECT["optional-dependencies"])
    assert "'traceml[" not in text


def test_an_extra_without_a_release_for_this_python_says_so() -> None:
    """Aim has none for 3.13, as its marker in `pyproject.toml` says."""
    assert unsupported("aim", (3, 12)) == unsupported("web", (3, 13)) == ""
    assert unsupported("aim", (3, 13)) == "aim has no release for Python 3.13: use Python 3.12 or older"
    assert all("python_version < '3.13'" in need for need in PROJECT["optional-dependencies"]["aim"])


def test_other_products_in_the_folder_are_named(tmp_path: Path) -> None:
    """Only those that install the same package; our own metadata is none."""
    folder = install(tmp_path, "traceml_torch-0.1.0.dist-info", "traceml_plugin-1.dist-info", "torch-2.9.dist-info")
    assert foreign_distributions(folder) == []
    assert _installation(folder, None).state == "ok"

    install(folder, "traceml-1.5.0.dist-info", "traceml_ai-0.5.0.dist-info")
    assert foreign_distributions(folder) == ["traceml 1.5.0", "traceml-ai 0.5.0"]
    check = _installation(folder, None)
    assert check.state == "broken"
    assert check.hint.startswith("pip uninstall traceml traceml-ai, then install traceml-torch again as before")


def test_a_command_of_another_product_is_noted(tmp_path: Path) -> None:
    """Theirs runs when the user types ours."""
    command = tmp_path / "traceml"
    command.write_text("#!/usr/bin/python\nfrom traceml_ai.launcher.cli import main\n")
    assert _installation(tmp_path, str(command)).state == "note"

    command.write_text("#!/usr/bin/python\nfrom traceml_torch import main\n")
    assert _installation(tmp_path, str(command)).state == "ok"


def test_this_installation_is_sound(caplog: pytest.LogCaptureFixture) -> None:
    """No warning where no other product is."""
    with caplog.at_level(logging.WARNING, logger="traceml"):
        warn_of_foreign.__wrapped__()

    assert caplog.text == ""


@pytest.mark.process
def test_the_first_use_of_a_mixed_package_warns(tmp_path: Path) -> None:
    """Once, on the first name that is used, with what to do; the name works."""
    install(tmp_path, "traceml_ai-0.5.0.dist-info")
    (tmp_path / "traceml").symlink_to(ROOT / "src" / "traceml")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import traceml; traceml.Metric; traceml.is_enabled"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("traceml-ai 0.5.0 installed a package `traceml` over this one") == 1
    assert "pip uninstall traceml-ai, then install traceml-torch again" in done.stderr


@pytest.mark.process
@pytest.mark.parametrize("words", [("--version",), ("doctor",)])
def test_the_command_beside_a_module_of_our_name(tmp_path: Path, words: tuple[str, ...]) -> None:
    """The command says which file is in the way, and ends with a status of its own."""
    (tmp_path / "traceml.py").touch()
    code = "import sys; from traceml_torch import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip

    assert done.returncode == 3
    assert f"another `traceml` in {tmp_path / 'traceml.py'}" in done.stderr
