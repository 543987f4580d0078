"""A run in a notebook: a real kernel trains, and the charts are in the cell's output."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

import traceml
from tests.diagnosis.fabricated import Job, adds
from tests.kernels import Kernel, forked_kernels
from tests.runs.fabricated_store import store_run
from traceml.errors import RunNotFoundError
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.report.report import build_report

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


_MORE = (
    "traceml.load_run(run.run_dir).verdict",
    "%load_ext traceml",
    """%%traceml second
for step in range(40):
    net(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
""",
    "print([(each.name, each.state) for each in traceml.runs()])",
    "%%traceml\n1 / 0",
)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """An executed notebook: training, `run.show()` during it, `load_run()` at the end of a cell."""
    import nbclient
    import nbformat

    cells = [_TRAIN, "run.show()", "traceml.shutdown()", "traceml.load_run(run.run_dir)", *_MORE]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    folder = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(
        notebook,
        timeout=240,
        allow_errors=True,
        kernel_manager_class=Kernel,
        resources={"metadata": {"path": str(folder)}},
    )
    with forked_kernels():
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


@pytest.mark.process
def test_the_end_of_a_run_draws_it(notebook):
    """`traceml.shutdown()` draws the ended run: nobody reads what a kernel prints when it ends."""
    (data,) = (output["data"] for output in notebook.cells[2]["outputs"] if "data" in output)

    assert "<svg" in data["text/html"]
    assert ": finished, 1 rank" in data["text/plain"]


@pytest.mark.process
def test_a_verdict_is_drawn_as_a_card(notebook):
    """`run.verdict` at the end of a cell is HTML, with text for who cannot draw, and no dataclass."""
    data = notebook.cells[4]["outputs"][0]["data"]

    assert '<section class="card verdict' in data["text/html"]
    assert "Finding(" not in data["text/plain"]
    assert "\nNext: " in data["text/plain"]


@pytest.mark.process
def test_the_magic_traces_its_cell(notebook):
    """`%%traceml NAME` makes a run of the cell, and draws it below."""
    assert notebook.cells[5]["outputs"] == []
    assert "<svg" in _html(notebook.cells[6])
    assert (
        "40 steps" in next(output for output in notebook.cells[6]["outputs"] if "data" in output)["data"]["text/plain"]
    )
    assert "('second', 'finished')" in notebook.cells[7]["outputs"][0]["text"]


@pytest.mark.process
def test_the_magic_shows_the_error_of_its_cell(notebook):
    """The exception is the cell's output, once, and the run has failed by it."""
    outputs = notebook.cells[8]["outputs"]

    assert [output.get("ename") for output in outputs].count("ZeroDivisionError") == 1
    (drawn,) = (output["data"]["text/plain"] for output in outputs if "data" in output)
    assert ": failed, 1 rank" in drawn
    assert "ZeroDivisionError" in drawn
    assert "In[9]:1" in drawn


def test_outside_a_notebook_it_is_text(tmp_path, capsys):
    """In a plain interpreter the verdict is written."""
    traceml.load_run(store_run(tmp_path / "run", Job(steps=120), adds("forward", 20, (1,)))).show()

    assert "COMPUTE_STRAGGLER" in capsys.readouterr().out


def test_without_a_run_it_says_so():
    """A disabled recorder says why it has nothing to show."""
    with pytest.raises(RunNotFoundError, match="disabled"):
        traceml.init(enabled=False).show()


def test_a_cell_shows_a_run_whose_store_is_damaged(tmp_path):
    """Its written report, as text."""
    run_dir = store_run(tmp_path / "run", Job(steps=120), adds("forward", 20, (1,)))
    (run_dir / REPORT_NAME).write_text(build_report(run_dir).to_json())
    (run_dir / STORE_NAME).write_bytes(b"no store")

    shown = traceml.load_run(run_dir)._repr_html_()

    assert shown.startswith("<pre>")
    assert "Rank 1 slows the others down" in shown
