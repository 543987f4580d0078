"""Questions about runs: bounded answers, and nothing outside the given folders."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import STARTED, store_run
from traceml.cli.assistants.json_documents import document_schema
from traceml.cli.assistants.run_tools import MAX_CHARACTERS, RunTools, bounded
from traceml.diagnosis.kinds import Kind
from traceml.errors import TraceMLError
from traceml.runs.report.report import build_report, save_report
from traceml.runs.run_labels import RunLabels, write_labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs: a healthy one, a slow one, one of many ranks."""
    folder = tmp_path_factory.mktemp("place") / "runs"
    made = (
        ("good", Job(steps=100), []),
        ("slow", Job(steps=100), [adds("forward", 9, (1,))]),
        ("wide", Job(ranks=300, steps=40), []),
    )
    for number, (name, job, faults) in enumerate(made):
        run = store_run(folder / name, job, *faults, facts={"started": STARTED + number}, seed=number)
        save_report(run, build_report(run))

    return folder


@pytest.fixture
def tools(folder):
    return RunTools(folder)


def test_runs_are_listed(tools):
    """Newest first, by condition, at most as many as asked."""
    assert [run["id"] for run in tools.list_runs()["runs"]] == ["wide", "slow", "good"]
    assert tools.list_runs(limit=1)["total"] == 3
    write_labels(tools._runs_dir / "wide", RunLabels(archived=True))
    assert [run["id"] for run in tools.list_runs()["runs"]] == ["slow", "good"]
    write_labels(tools._runs_dir / "wide", RunLabels())
    assert [run["id"] for run in tools.list_runs(where="ranks=2", sort="step_ms")["runs"]] == ["good", "slow"]


def test_the_cause_of_a_slow_run(tools):
    """Findings have the headline, the advice and the numbers; the kind can be explained."""
    (verdict, *_) = tools.findings("slow")["findings"]

    assert (verdict["kind"], verdict["ranks"]) == ("COMPUTE_STRAGGLER", [1])
    assert verdict["headline"].startswith("Rank 1 is slow in forward: the others wait, ")
    assert verdict["next"]
    assert "rank" in tools.explain_kind("compute-straggler")["raised"]
    assert tools.explain_kind("STRAGGLER")["shared_evidence"]["step_ms, steps"].startswith("mean step time")


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_is_explained(tools, kind):
    """Without links, which lead nowhere here."""
    raised = tools.explain_kind(kind)["raised"]

    assert len(raised) > 20
    assert "](" not in raised


def test_the_evidence_of_a_kind_is_explained(tools):
    """Its section has them; several kinds may share one, and it ends before the next."""
    raised = {kind: tools.explain_kind(kind)["raised"] for kind in ("HANG", "STRAGGLER", "JITTER")}

    assert "`blocker`" in raised["HANG"]
    assert "\n- `worker`: the process of a loader worker;\n- `thread`" in raised["HANG"]
    assert "RANK_LOST" not in raised["HANG"]
    assert "`rank_group`" in raised["STRAGGLER"]
    assert raised["JITTER"].endswith("`excess_ms_by_phase`.")


def test_a_comparison_is_the_document_of_the_command(tools):
    """With the last healthy run as the baseline."""
    found = tools.compare("slow")

    jsonschema.validate(found, document_schema("compare"))
    assert (found["a"]["id"], found["outcome"]) == ("good", "slower")


def test_answers_are_bounded(tools):
    """A report of 300 ranks is cut, and says where; sections give the rest."""
    whole = tools.report("wide")

    assert len(json.dumps(whole, indent=2)) <= MAX_CHARACTERS
    assert whole["cut"]["ranks"].endswith("of 300")
    assert "step_times" not in whole
    assert set(tools.report("slow", ["run", "steps"])) == {"run", "steps"}


@pytest.mark.parametrize(
    "document",
    [
        {"text": "x" * 100_000},
        {"items": [{"a": "y" * 1_900} for _ in range(1000)]},
        {"map": {str(n): "z" * 1_000 for n in range(1000)}},
        {f"key{n}": "z" * 1_900 for n in range(1000)},
        {"deep": [[[["x" * 1000] * 20] * 20] * 20]},
    ],
)  # fmt: skip
def test_nothing_is_longer_than_the_bound(document):
    """Whatever the shape, as the text that is sent; what was left out is told."""
    made = bounded(document)

    assert len(json.dumps(made, indent=2)) <= MAX_CHARACTERS
    assert made["cut"]


def test_a_small_document_is_whole():
    """And has no key more."""
    assert bounded({"a": [1, 2], "b": {"c": "d"}}) == {"a": [1, 2], "b": {"c": "d"}}


@pytest.mark.parametrize("run", ["../outside", "/etc", "runs/good", ".."])
def test_runs_outside_the_folder_are_not_read(tools, folder, run):
    """Neither by path nor through a link in the folder."""
    if not (folder.parent / "outside").exists():
        store_run(folder.parent / "outside", Job(steps=20))

    (folder / "link").unlink(missing_ok=True)
    (folder / "link").symlink_to(folder.parent / "outside")

    for name in (run, "link"):
        for ask in (tools.report, tools.findings, tools.compare):
            with pytest.raises(TraceMLError):
                ask(name)
    with pytest.raises(TraceMLError):
        tools.compare("slow", baseline=str(folder.parent / "outside"))
    (folder / "link").unlink()


def test_traces_are_read_below_given_folders_only(folder, tmp_path):
    """A path that leaves them, or a link in them, is refused; the error says how to allow it."""
    event = {"name": "a", "ph": "X", "ts": 1, "dur": 5, "pid": 1, "tid": 1}
    for name in ("given", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.json").write_text(json.dumps({"traceEvents": [event]}))
    (tmp_path / "given" / "sub").mkdir()
    (tmp_path / "given" / "sub" / "link.json").symlink_to(tmp_path / "other" / "t.json")
    tools = RunTools(folder, [tmp_path / "given"])

    found = tools.analyze([str(tmp_path / "given" / "t.json")], by="name", agg="p95")
    jsonschema.validate(found, document_schema("analysis"))
    assert found["groups"][0]["p95_us"] == 5
    for path in ("other/t.json", "given/../other/t.json", "given/sub", "given/sub/link.json"):
        with pytest.raises(TraceMLError, match="traceml mcp --traces DIR"):
            tools.analyze([str(tmp_path / path)])


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda tools: tools.report("nosuch"), "no run 'nosuch'"),
        (lambda tools: tools.report("slow", ["nosuch"]), "Sections: run, "),
        (lambda tools: tools.explain_kind("SLOW"), "Kinds: HEALTHY"),
        (lambda tools: tools.list_runs(where="nosuch<1"), "Fields: id"),
        (lambda tools: tools.compare("good", baseline="good"), "name another baseline"),
        (lambda tools: tools.stacks(), "report and findings work on ended runs"),
        (lambda tools: tools.stacks("good"), "has ended"),
        (lambda tools: tools.analyze([]), "at least one"),
    ],
)
def test_errors_say_what_to_do(tools, ask, what):
    """A model can act on each."""
    with pytest.raises(TraceMLError, match=what):
        ask(tools)
