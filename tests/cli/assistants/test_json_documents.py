"""JSON Schemas of documents: published as the types are, and true of what commands print."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import jsonschema
import msgspec
import pytest

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import STARTED, store_run
from tests.whatif.generated_job import GeneratedJob, usual_s
from traceml import cli
from traceml.cli.assistants.json_documents import DOCUMENTS, StacksDocument, document_schema
from traceml.database.snapshots.rank_snapshot import FrameSnapshot, GroupSnapshot, WorkerSnapshot
from traceml.renderers.text.rank_stacks_text import MissingRank, StacksRank

FOLDER = Path(__file__).parents[3] / "docs" / "schemas"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_published_schema_is_the_type(name):
    """After a change on purpose: `UPDATE_SNAPSHOTS=1 pytest tests/cli/assistants/test_json_documents.py`."""
    path, schema = FOLDER / f"{name}-1.json", document_schema(name)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(json.dumps(schema, indent=2) + "\n")

    published = json.loads(path.read_text())
    assert published == json.loads(json.dumps(schema))
    jsonschema.Draft202012Validator.check_schema(published)


def test_nothing_else_is_published():
    """A schema whose document is gone is gone too."""
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(f"{name}-1.json" for name in DOCUMENTS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A healthy run, a slow one, and one without steps."""
    folder = tmp_path_factory.mktemp("runs")
    for number, (name, steps, faults) in enumerate(
        (("a", 100, []), ("b", 100, [adds("forward", 9, (1,))]), ("c", 0, []))
    ):
        facts = {"started": STARTED + number}
        store_run(folder / name, Job(steps=steps), *faults, facts=facts, seed=number)

    return folder


@pytest.fixture
def printed(runs, capsys):
    """Run a command and return its output as JSON."""

    def run(*words):
        assert cli.main(list(words)) == 0
        return json.loads(capsys.readouterr().out)

    return run


@cache
def _validator(name):
    return jsonschema.Draft202012Validator(document_schema(name))


def valid(name, document):
    _validator(name).validate(document)
    assert document if isinstance(document, list) else document["schema"] == f"traceml.{name}/1"


@pytest.mark.parametrize("run", ["a", "b", "c"])
def test_reports(printed, runs, run):
    """Also of a run without steps."""
    valid("report", printed("report", run, "--json", "--runs-dir", str(runs)))


@pytest.mark.parametrize("run", ["a", "c"])
def test_lines(printed, runs, run):
    """Also of a run without samples."""
    valid("lines", printed("report", run, "--lines", "--json", "--runs-dir", str(runs)))


def test_comparisons(printed, runs):
    """Of two runs, also without a result, and of several."""
    for other in ("b", "c"):
        valid("compare", printed("compare", "a", other, "--json", "--runs-dir", str(runs)))

    valid("compares", printed("compare", "a", "b", "c", "--json", "--runs-dir", str(runs)))


def test_the_list_of_runs(printed, runs):
    """With and without columns."""
    for words in ([], ["--columns", "steps,verdict"]):
        valid("runs", printed("runs", "--json", "--runs-dir", str(runs), *words))


def test_the_fleet(printed, runs, tmp_path):
    """Of a few runs on one host."""
    valid("fleet", printed("fleet", "--json", "--update", "--runs-dir", str(runs), "--dataset", str(tmp_path / "f")))


@pytest.mark.parametrize("words", [[], ["--by", "cat", "--agg", "p95,std"], ["--where", "dur>4"]])
def test_analyses(printed, tmp_path, words):
    """Overview and groups."""
    events = [
        {"name": n, "cat": "POSIX", "ph": "X", "ts": i, "dur": 5 * i + 1, "pid": 1, "tid": 1}
        for i, n in enumerate("abc")
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))

    valid("analysis", printed("analyze", str(tmp_path / "trace.json"), "--json", "--no-cache", *words))


def test_what_if(printed, tmp_path):
    """Of a job without stragglers."""
    trace, meta = GeneratedJob(seconds=usual_s).run().write(tmp_path)
    valid("whatif", printed("whatif", str(trace), "--meta", str(meta), "--json"))


def test_stacks():
    """With every part of a snapshot."""
    frame = FrameSnapshot(file="train.py", line=3, function="wait", is_user=True)
    worker = WorkerSnapshot(index=1, pid=5, cpu_share=0.5, frames=(frame,), waits_for_batch=3)
    rank = StacksRank(
        host="h0", rank=1, pid=7, frames=(frame,), user_line=frame, groups=(GroupSnapshot(members=(0, 1), peer=1),),
        workers=(worker,),
    )  # fmt: skip
    made = StacksDocument(run="run", ranks=[rank], missing=[MissingRank(0, "h1", "does not answer")])

    document = json.loads(msgspec.json.encode(made))
    valid("stacks", document)
    (rank,) = document["ranks"]
    assert (rank["host"], rank["pid"], rank["frames"][0]["line"]) == ("h0", 7, 3)
    assert msgspec.convert(document, StacksDocument) == made


def test_a_document_of_another_kind_is_refused(printed, runs):
    """The schemas can fail."""
    report = printed("report", "a", "--json", "--runs-dir", str(runs))
    with pytest.raises(jsonschema.ValidationError):
        valid("compare", report)
    report["steps"]["count"] = "many"
    with pytest.raises(jsonschema.ValidationError, match="many"):
        valid("report", report)


def test_the_command(capsys, tmp_path):
    """One by name, all to a folder, a list; an unknown name is an error that lists them."""
    assert cli.main(["schema", "report"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "traceml.report/1"
    assert cli.main(["schema", "-o", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == len(DOCUMENTS)
    assert f"{len(DOCUMENTS)} schemas" in capsys.readouterr().out
    assert cli.main(["schema", "--json", "-o", str(tmp_path / "out")]) == 0
    assert {*map(Path, json.loads(capsys.readouterr().out).values())} == {*(tmp_path / "out").iterdir()}
    assert cli.main(["schema", "runs", "-o", str(tmp_path / "one")]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["runs-1.json"]
    assert capsys.readouterr().out == f"{tmp_path / 'one'}: 1 schema\n"
    assert cli.main(["schema", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(DOCUMENTS)
    assert cli.main(["schema", "nosuch"]) == 2
    assert "Documents: report, lines" in capsys.readouterr().err
