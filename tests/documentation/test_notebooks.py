"""The example notebooks: each runs in a kernel of its own from top to bottom, and draws its run."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.documentation.pages import ROOT
from tests.kernels import Kernel, forked_kernels
from traceml.diagnosis.kinds import Kind

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def _read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_opens_in_colab(path):
    """The badge leads to this notebook, traceml is installed first, and no output is stored."""
    notebook = _read(path)
    title, install, *rest = notebook.cells
    address = "https://colab.research.google.com/github/traceml/traceml/blob/main/"

    nbformat.validate(notebook)
    assert f"{address}{path.relative_to(ROOT)})" in title.source
    assert install.metadata.tags == ["install"]
    assert "%pip install" in install.source
    assert [cell for cell in rest if cell.get("outputs")] == []


@pytest.mark.process
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    """No cell fails, and `run.verdict` is a card of a known kind."""
    notebook = _read(path)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=200, startup_timeout=200, kernel_manager_class=Kernel, resources=resources
    )
    with forked_kernels("lightning" if path.stem == "lightning" else "torch"):
        done = client.execute()

    outputs = {cell["id"]: cell.get("outputs", []) for cell in done.cells}
    (card,) = outputs["verdict"]
    assert '<section class="card verdict' in card["data"]["text/html"]
    assert any(kind in card["data"]["text/plain"] for kind in Kind)
    drawn = outputs["slow" if path.stem == "own_loop" else "run"]
    assert any("<svg" in each.get("data", {}).get("text/html", "") for each in drawn)
