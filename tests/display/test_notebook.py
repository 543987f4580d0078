"""A run in a notebook: a real kernel trains, and the charts are in the cell's output."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

import traceml
from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import store_run
from traceml.errors import RunNotFoundError

_TRAIN = """
import torch, traceml
run = traceml.init(local=True, run_name="<b>note</b>")
net = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
for step in range(60):
    with traceml.trace_step(net, optimizer):
        loss = net(torch.randn(16, 8)).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        traceml.log_metric("loss", loss.item())
"""


class _Kernel(AsyncKernelManager):
    """This interpreter as the kernel, whichever kernels are installed for others."""

    @property
    def kernel_spec(self):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="here", language="python")


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """An executed notebook: training, `run.show()` during it, `load_run()` at the end of a cell."""
    import nbclient
    import nbformat

    cells = [_TRAIN, "run.show()", "traceml.shutdown()", "traceml.load_run(run.run_dir)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    folder = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(
        notebook, timeout=60, kernel_manager_class=_Kernel, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def _html(cell):
    return next(output["data"]["text/html"] for output in cell["outputs"] if "data" in output)


class _Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)


@pytest.mark.process
def test_a_run_that_goes_on_is_drawn(notebook):
    """`run.show()` draws all steps so far, and the loss beside them."""
    html = _html(notebook.cells[1])

    assert "<svg" in html
    assert "Step time" in html
    assert "Loss and step time" in html
    assert 'class="tm-shown"' in html


@pytest.mark.process
def test_a_run_at_the_end_of_a_cell_is_drawn(notebook):
    """The result of `load_run` is drawn, also after the recorder has stopped."""
    html = _html(notebook.cells[3])

    assert "<svg" in html
    assert "1 rank" in html


@pytest.mark.process
def test_the_drawing_needs_neither_scripts_nor_a_network(notebook):
    """No tag loads anything, and there is no script."""
    html = _html(notebook.cells[3])

    assert {"script", "link", "img", "iframe"}.isdisjoint(_Tags(html).found)
    assert not re.search(r"(?:src|href)=|url\(|@import", html)


@pytest.mark.process
def test_there_is_text_for_who_cannot_draw(notebook):
    """The cell also has the text that a terminal gets."""
    data = next(output["data"] for output in notebook.cells[1]["outputs"] if "data" in output)

    assert "60 steps" in data["text/plain"]


def test_outside_a_notebook_it_is_text(tmp_path, capsys):
    """In a plain interpreter the verdict is written."""
    traceml.load_run(store_run(tmp_path / "run", Job(steps=120), adds("forward", 20, (1,)))).show()

    assert "COMPUTE_STRAGGLER" in capsys.readouterr().out


def test_without_a_run_it_says_so():
    """A disabled recorder says why it has nothing to show."""
    with pytest.raises(RunNotFoundError, match="disabled"):
        traceml.init(enabled=False).show()
