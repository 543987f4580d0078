"""`traceml compare`."""

from __future__ import annotations

import json

import pytest

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import run_with_batches, store_run
from traceml import cli
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report import build_report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs: two alike, one with a straggler, one too short, one of other size, two of other batches."""
    folder = tmp_path_factory.mktemp("runs")
    store_run(folder / "first", Job(steps=200), seed=1)
    store_run(folder / "again", Job(steps=200), seed=5)
    store_run(folder / "slow", Job(steps=200), adds("forward", 5, (1,)), seed=2)
    store_run(folder / "short", Job(steps=12), seed=2)
    store_run(folder / "wide", Job(ranks=4, steps=200), seed=2)
    run_with_batches(folder / "batches", 16)
    run_with_batches(folder / "larger", 32, forward=10.0)
    return folder


@pytest.fixture
def compare(runs, capsys):
    """Run the command on runs of that folder; return (status, stdout, stderr)."""

    def run(*words):
        status = cli.main(["compare", *words, "--runs-dir", str(runs)])
        return status, *capsys.readouterr()

    return run


def test_it_tells_what_got_slower(compare):
    """Without a gate a slower run is told, and that is all."""
    status, shown, complaint = compare("first", "slow")

    assert status == 0
    assert "B is slower" in shown
    assert "Rank 1's own work grew" in shown
    assert complaint == ""


def test_a_real_slowdown_over_the_limit_fails(compare):
    """35 % slower: over 5 %, not over 50 %."""
    assert compare("first", "slow", "--fail-over", "5")[0] == 1
    assert "--fail-over" in compare("first", "slow", "--fail-over", "5")[2]
    assert compare("first", "slow", "--fail-over", "50")[0] == 0


def test_larger_batches_are_judged_by_sample(compare):
    """Steps of twice the samples take 1.4x as long and pass; the other way round, samples take 1.4x as long."""
    assert compare("batches", "larger", "--fail-over", "5")[0] == 0
    status, _, complaint = compare("larger", "batches", "--fail-over", "5")
    assert (status, "time per sample +" in complaint) == (1, True)


def test_chance_and_gains_pass(compare):
    """Runs that are alike pass even at 0 %, and so does one that is faster."""
    assert compare("first", "again", "--fail-over", "0")[0] == 0
    assert compare("slow", "first", "--fail-over", "0")[0] == 0


@pytest.mark.parametrize(
    ("other", "way"),
    [
        ("short", "there are too few independent steps; let both runs make more"),
        ("wide", "a step is not the same work; compare runs with the same number of ranks"),
    ],
)
def test_a_gate_that_cannot_be_decided_does_not_pass(compare, other, way):
    """Neither green nor red: 3, with the reason and the next step."""
    status, _, complaint = compare("first", other, "--fail-over", "5")

    assert status == 3
    assert complaint.endswith(f"{way}\n")


def test_json_and_nothing_else(compare):
    """The comparison as one JSON document, also when the gate fails."""
    status, shown, _ = compare("first", "slow", "--json", "--fail-over", "5")

    assert status == 1
    assert json.loads(shown)["outcome"] == "slower"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["first"], "traceml compare: name two runs"),
        (["first", "slow", "--json", "--md"], "cannot be combined"),
        (["first", "slow", "--fail-over", "-1"], "of at least 0"),
        (["first", "slow", "--fail-over", "nan"], "of at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(compare, words, what):
    """A usage error exits with 2 and a line that says what."""
    status, shown, complaint = compare(*words)

    assert status == 2
    assert shown == ""
    assert what in complaint.lower()


def test_runs_that_are_not_there_or_cannot_be_read(compare, runs):
    """The error names the run."""
    (runs / "broken").mkdir(exist_ok=True)
    (runs / "broken" / STORE_NAME).write_bytes(b"garbage" * 999)

    assert compare("first", "nosuchrun")[0] == 3
    status, _, complaint = compare("first", "broken")
    assert status == 3
    assert "cannot compare broken" in complaint


def test_notes_name_each_run_by_its_letter(compare):
    """Of several runs the notes of the third are on C: on the terminal, in Markdown and in the JSON."""
    told = "A ran on 2 ranks, C on 4: a step is not the same work; compare runs with the same number of ranks"

    found = json.loads(compare("first", "again", "wide", "--json")[1])

    assert [each["obstacles"] for each in found["comparisons"]] == [[], [told]]
    assert f" C: {told.partition(';')[0]}" in compare("first", "again", "wide")[1]
    assert f"- C: {told}" in compare("first", "again", "wide", "--md")[1]


def test_reports_without_their_runs_are_compared(compare, runs, tmp_path):
    """A build server keeps reports: they hold step times, so the result is that of the runs."""
    for name in ("first", "again", "slow"):
        (tmp_path / f"{name}.json").write_text(build_report(runs / name).to_json())

    of_runs, of_files, mixed = (
        json.loads(compare(*pair, "--json")[1])
        for pair in (
            ("first", "slow"),
            (str(tmp_path / "first.json"), str(tmp_path / "slow.json")),
            (str(tmp_path / "first.json"), "slow"),
        )
    )

    assert of_files["outcome"] == mixed["outcome"] == "slower"
    for found in (of_files, mixed):
        assert found["step_time"]["mean"] == pytest.approx(of_runs["step_time"]["mean"], rel=1e-3)
    assert compare(str(tmp_path / "first.json"), str(tmp_path / "slow.json"), "--fail-over", "5")[0] == 1
    assert compare(str(tmp_path / "first.json"), str(tmp_path / "again.json"), "--fail-over", "0")[0] == 0


def test_a_report_without_step_times_is_not_judged(compare, runs, tmp_path):
    """A report of an earlier version: its numbers are shown, and chance is not ruled out."""
    report = build_report(runs / "first").to_dict()
    del report["step_times"], report["setup"]
    (tmp_path / "old.json").write_text(json.dumps(report))

    status, shown, complaint = compare(str(tmp_path / "old.json"), "slow", "--json", "--fail-over", "5")
    changes = json.loads(shown)

    assert (status, changes["outcome"], changes["comparable"]) == (3, "unknown", False)
    assert changes["step_time"]["mean"]["change"] > 0.2
    assert "A is a report without step times" in complaint


def test_a_file_that_is_no_report(compare, tmp_path):
    """The text names the file."""
    (tmp_path / "other.json").write_text("{}")

    status, _, complaint = compare("first", str(tmp_path / "other.json"))

    assert status == 3
    assert "other.json is not a report" in complaint


def test_several_runs_are_compared_with_the_first(compare):
    """A line for each run; in the JSON the two-run comparisons; the gate fails if any is slower."""
    status, shown, complaint = compare("first", "again", "slow", "--fail-over", "5")
    of_runs = json.loads(compare("first", "again", "slow", "--json")[1])

    assert status == 1
    assert [line.split()[:2] for line in shown.splitlines()[1:4]] == [["A", "first"], ["B", "again"], ["C", "slow"]]
    assert "slow: step time" in complaint
    assert "again" not in complaint
    assert (of_runs["schema"], of_runs["baseline"]) == ("traceml.compares/1", "first")
    assert [each["outcome"] for each in of_runs["comparisons"]] == ["same", "slower"]


@pytest.mark.parametrize("words", [["first", "first"], ["short", "--baseline", "short"]])
def test_a_run_is_the_same_as_itself(compare, words):
    """Also one that is too short to be judged; a note says that it is one run."""
    status, shown, complaint = compare(*words, "--json")

    assert (status, json.loads(shown)["outcome"]) == (0, "same")
    assert "are the same run" in complaint


def test_a_gate_of_a_run_with_itself_does_not_pass(compare):
    """The new run may have left nothing, so that the latest one is the baseline."""
    status, shown, complaint = compare("first", "--baseline", "first", "--fail-over", "1")

    assert (status, shown) == (2, "")
    assert "the baseline and B are the same run, first: --fail-over has nothing to judge" in complaint


def test_a_named_baseline(compare):
    """With --baseline one run is enough, and it is B."""
    found = json.loads(compare("slow", "--baseline", "first", "--json")[1])

    assert (found["a"]["id"], found["b"]["id"]) == ("first", "slow")


def test_markdown(compare):
    """A result, a table whose rows have equally many cells, and nothing else on stdout."""
    for words in (("first", "slow"), ("first", "again", "slow")):
        _, shown, complaint = compare(*words, "--md")
        tables = [line for line in shown.splitlines() if line.startswith("|")]

        assert complaint == ""
        assert len({line.count("|") for line in tables}) == 1
        assert "COMPUTE\\_STRAGGLER" in shown
