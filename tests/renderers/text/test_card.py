"""The verdict card."""

from __future__ import annotations

import io
import os

import pytest

from tests.renderers.reports import REPORTS, finding, healthy, report, slow_rank, with_data
from traceml.diagnosis.findings import Finding
from traceml.errors import StoreError
from traceml.renderers.text.card import card, print_card, wrapped
from traceml.renderers.text.viewport import Viewport
from traceml.renderers.views import run_view
from traceml.runs.report.report_types import (
    SCHEMA,
    Report,
    RestartSection,
    RunSection,
    StepsSection,
    TimePart,
    TimeSection,
    TrackerSection,
)


def text_of(made: Report, **over) -> str:
    viewport = Viewport(80, 24, **over)
    return "\n".join(line.plain for line in card(run_view(made), viewport).renderables)


def printed(path) -> list[str]:
    shown = io.StringIO()
    print_card(path, file=shown)
    assert "\x1b" not in shown.getvalue()
    return shown.getvalue().splitlines()


def test_print_card_names_report_and_next_command(tmp_path, monkeypatch):
    """The printed card ends with the report's path, whole, and the exact command that shows it again."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "traceml_runs" / ("20250102-030405-" + "long-" * 20)
    folder.mkdir(parents=True)
    path = folder / "report.json"
    path.write_text(slow_rank().to_json())

    assert printed(path)[-2:] == [f" Report  {path}", f" Command traceml report {folder.name}"]

    monkeypatch.chdir("/")
    assert printed(path)[-2:] == [f" Report  {path}", f" Command traceml report {folder}"]

    spaced = folder.rename(tmp_path / "my runs")
    assert printed(spaced / "report.json")[-1] == f" Command traceml report '{spaced}'"

    binary = spaced.rename(tmp_path / os.fsdecode(b"r\xffns"))
    assert printed(binary / "report.json")[-2:] == [
        rf" Report  {tmp_path}/r\xffns/report.json",
        rf" Command traceml report $'{tmp_path}/r\xffns'",
    ]


def test_a_missing_rank_is_reported():
    """A missing rank is named; without one there is no such line."""
    made = slow_rank()
    assert "Missing" not in text_of(made)

    made.run.world_size = 3
    assert " Missing no data from rank 2 (of 3)" in text_of(made)


def test_what_a_long_runs_verdict_rests_on_is_reported():
    """Where the verdict is of a sample of the steps, the card says of how many, and of what the means are."""
    made = slow_rank()
    assert "Basis" not in text_of(made)

    made.steps.cut, made.steps.count, made.steps.diagnosed = True, 1_000_000, 12_800
    said = " ".join(text_of(made).split())
    assert "Basis verdict from 12,800 of 1,000,000 steps, spread over the run; means are of all steps" in said


def test_the_rate_of_data_is_that_of_the_steps():
    """Samples and tokens per second are of the same time as the mean step beside them; unknown ones have no line."""
    made = with_data(report([{"forward": 10.0}]), samples=16, tokens=512)
    made.steps.set_rate(5.0)  # with evaluation between the steps, which the mean step does not have

    assert " Data    51,200 tokens/s  ·  1,600 samples/s" in text_of(made)
    made.run.state = "running"
    assert " Data    2,560 tokens/s  ·  80.0 samples/s" in text_of(made)
    made.steps.samples_per_step = made.steps.tokens_per_step = None
    assert "Data" not in text_of(made)


def test_a_phase_too_long_for_its_column_is_named_shortly():
    """A word is never cut off in its middle; where it fits, it stays whole."""
    times = {"forward": 10.0, "optimizer": 5.0, "checkpoint": 9.0}
    heading = next(line for line in text_of(report([times, times])).splitlines() if line.startswith("   rank"))

    assert heading.split() == ["rank", "step", "forward", "optimizer", "ckpt", "memory"]


@pytest.mark.parametrize("name", REPORTS)
def test_a_narrow_terminal_loses_no_word(name):
    """On 60 columns, facts that find no room are left out; no line of figures is cut in the middle."""
    lines = [line.plain for line in card(run_view(REPORTS[name]()), Viewport(60, 24)).renderables]

    top, steps = lines[0], [line for line in lines if line.startswith(" Steps")]
    assert max(map(len, lines)) <= 60
    assert "…" not in top + "".join(steps)
    assert not [line for line in lines if "MiB" in line and line.endswith("…")]
    assert top.endswith("─")


def test_ranks_without_own_batches_are_reported():
    """Where ranks have the batches of others, or none as later stages of a pipeline, the card says how many have."""
    made = with_data(report([{"forward": 10.0}] * 4), samples=32, ranks=2)

    assert "3,200 samples/s  ·  own batches on 2 of 4 ranks" in text_of(made)
    made.steps.data_ranks = 4
    assert "own batches" not in text_of(made)


def test_errors_of_tracing_are_reported():
    """A run that lost step timing by an error says so."""
    made = slow_rank()
    assert "errors" not in text_of(made)

    made.telemetry.failures = {"recorder": 2, "instrument": 1}
    assert "errors in instrument: 1; errors in recorder: 2" in " ".join(text_of(made).split())


@pytest.mark.parametrize(
    ("evaluation", "line"),
    [
        (0.1, "start-up 74 %, steps 7 %, saving 0.6 %, evaluation 10 %, rest 9 %"),
        (0.01, "start-up 83 %, steps 7 %, after the last step 9 %, rest 2 %"),
    ],
)
def test_the_line_of_the_time_has_the_steps_and_the_largest_parts(evaluation, line):
    """Steps that were 7 % of a run's time were in the rest, and what fits in was, too."""
    shares = {"startup": 0.84 - evaluation, "steps": 0.07, "checkpoint": 0.006, "evaluation": evaluation, "idle": 0.09}
    made = slow_rank()
    made.time = TimeSection(wall_s=11.0, parts=[TimePart(part, 11 * share, share) for part, share in shares.items()])

    assert f" Time    11 s: {line}\n" in text_of(made)


def test_an_accelerator_without_device_times_is_reported():
    """Where the device's time is not known, the card says whose time the phases show."""
    made = slow_rank()
    assert "Clock" not in text_of(made)

    made.steps.untimed_device = "mps"
    assert " Clock   device times: not measured on mps; phases show CPU time" in text_of(made)


def test_a_time_of_which_nothing_is_known_is_not_divided():
    """The heading has the whole time of a run that only logs."""
    made = slow_rank()
    made.time = TimeSection(wall_s=10.0, parts=[TimePart("steps", 4.0, 0.4), TimePart("unexplained", 6.0, 0.6)])
    assert " Time    10 s: steps 40 %, unexplained 60 %" in text_of(made)

    made.time.parts = [TimePart("steps", 0.0, 0.0), TimePart("unexplained", 10.0, 1.0)]
    assert " Time  " not in text_of(made)


def test_print_card_of_a_damaged_report(tmp_path):
    """A damaged report is an error that names the file."""
    path = tmp_path / "report.json"
    path.write_text('{"schema": ')

    with pytest.raises(StoreError, match=r"report\.json is not a report"):
        print_card(path, file=io.StringIO())


def test_print_card_in_latin_1(tmp_path):
    """A terminal without UTF-8 gets ASCII."""
    path = tmp_path / "report.json"
    path.write_text(slow_rank().to_json())
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="latin-1")

    print_card(path, file=file)
    file.flush()

    assert raw.getvalue().isascii()


@pytest.mark.parametrize("name", REPORTS)
def test_report_without_anything_optional(name):
    """A report with nothing but its required parts still makes a card, with no two blank lines in a row."""
    full = REPORTS[name]()
    run = RunSection(id="x", name="x")
    bare = Report(schema=SCHEMA, run=run, verdict=full.verdict, findings=[full.verdict], ranks=full.ranks)

    assert full.verdict.kind in text_of(bare)
    assert "\n\n\n" not in text_of(bare)


def test_lost_rows_are_reported():
    """Rows that were lost are counted on the card."""
    assert "120 lost" in text_of(report([{"forward": 1.0}], lost=120))
    assert "none lost" in text_of(healthy())


def test_user_phase_is_shown_by_its_name():
    """A phase of the user has its own bar, and the verdict names it."""
    blame = finding("RESIDUAL_HEAVY", severity="warning", phase="augment", cost_share=0.4)

    shown = text_of(report([{"forward": 6.0, "augment": 4.0}], blame))

    assert "40 % of step time is spent in phase 'augment'" in shown
    assert "\n augment    " in shown


def test_wide_characters_take_two_columns():
    """Columns stand under each other, and nothing of a sentence in Chinese is cut."""
    blame = finding(summary="加载数据时出错" * 20)

    made = report([{"forward": 6.0, "数据增强": 4.0}] * 2, blame)
    lines = list(card(run_view(made), Viewport(80, 24)).renderables)

    assert sum(line.plain.count("错") for line in lines) == 20
    ends = {line.cell_len for line in lines if line.plain.endswith(" ms") and "%" in line.plain}
    assert ends == {79}
    rows = [line.cell_len for line in lines if line.plain.endswith(("MiB", "memory"))]
    assert len(set(rows)) == 1


def test_markup_in_texts_is_text():
    """Square brackets in names are shown as they are."""
    shown = text_of(report([{"forward": 1.0, "[bold]x[/]": 1.0}], finding(summary="see [link=x]y[/link]")))

    assert "[bold]x[/]" in shown
    assert "[link=x]y[/link]" in shown


def test_wrapped_keeps_words_whole():
    """Lines break between words; a word longer than the line stands alone."""
    assert wrapped("aa bb cccccccc d", 5) == ["aa bb", "cccccccc", "d"]
    assert wrapped("", 5) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("it takes 27 % of it", ["it takes", "27 % of it"]),
        ("it is at 436 MiB, now", ["it is at", "436 MiB, now"]),
        ("it was 1 h 27 min ago", ["it was 1 h", "27 min ago"]),
        ("step 5 has it, or 12 more", ["step 5 has", "it, or 12", "more"]),
    ],
)
def test_a_number_stays_with_its_unit(text, lines):
    """A line that begins with a unit reads as if its number were missing."""
    assert wrapped(text, 12 if "MiB" in text else 10) == lines


def test_nothing_is_cut_in_40_columns():
    """Title and step times leave out what finds no room, rather than half of a number."""
    lines = [line.plain for line in card(run_view(healthy()), Viewport(40, 24)).renderables]

    assert lines[0].endswith("─ finished ─")
    assert len(lines[0]) == 40
    assert not [line for line in lines if "…" in line]


def test_a_long_phase_leaves_room_for_its_time():
    """On a narrow screen the name of a phase is cut, its mean is not."""
    made = report([{"forward": 6.0, "compute the augmentations": 4.0}])

    lines = [line.plain for line in card(run_view(made), Viewport(40, 24)).renderables]

    assert any(line.startswith(" compute") and line.endswith("40 %   4.00 ms") for line in lines)


def test_a_long_path_loses_its_middle_only():
    """Its file and line stay, whatever the width; addresses are left as they are."""
    path = "/tmp/venv/lib/python3.11/site-packages/stable_baselines3/common/utils.py:623,"

    assert wrapped(f"at {path} in step 3", 36) == [
        "at /tmp/.../common/utils.py:623, in",
        "step 3",
    ]
    assert wrapped("https://example.org/a/b", 10) == ["https://example.org/a/b"]


def tracker(backend: str, state: str = "done", **more: object) -> TrackerSection:
    return TrackerSection(**{"backend": backend, "state": state, "delivered": 12_340, "pending": 0, **more})


def tracked(*trackers: TrackerSection) -> Report:
    made = healthy()
    made.trackers = list(trackers)
    return made


def test_trackers_are_reported_and_what_to_do_when_rows_wait():
    """Each tracker has a line; pending rows have a reason and the command that delivers them."""
    made = tracked(
        tracker("mlflow"),
        tracker("wandb", "open", delivered=0, pending=20, error="ConnectionError: refused"),
        tracker("aim", "broken", pending=1, failed=3, error="ImportError: pip install 'traceml-torch[aim]'"),
    )

    shown = text_of(made)

    assert "Sent    mlflow 12,340 delivered\n" in shown
    assert "wandb 0 delivered, 20 pending (ConnectionError: refused)" in shown
    assert "aim 12,340 delivered, 1 pending, 3 refused (broken: ImportError" in shown
    assert "traceml sync delivers the pending rows" in shown


def test_trackers_that_have_everything_need_no_advice():
    """There is no command where no rows are pending."""
    assert "traceml sync" not in text_of(tracked(tracker("mlflow")))


def test_rows_on_their_way_need_no_command():
    """A script that only logs ends before its tracker's library is imported: the delivery goes on without it."""
    waits = tracker("mlflow", "starting", delivered=0, pending=15)
    down = tracker("wandb", "open", pending=3, error="ConnectionError: refused")

    assert "delivery continues; if it is cut off, traceml sync delivers the rest" in text_of(tracked(waits))
    assert "traceml sync delivers the pending rows" in text_of(tracked(waits, down))
    assert "delivery continues" not in text_of(tracked(waits, down))
    assert "delivery continues" not in text_of(tracked(tracker("mlflow", "stopped", pending=15)))


def test_what_a_broken_tracker_lacks_is_not_promised():
    """`traceml sync` fails as the delivery did until the cause is mended, as of a misspelt name."""
    shown = text_of(tracked(tracker("mlfow", "broken", delivered=0, pending=3, error="there is no tracker 'mlfow'")))

    assert "traceml sync delivers the pending rows once that is fixed; with" in shown
    assert "--backend NAME, to another tracker" in shown


def test_what_a_fallback_took_is_reported():
    """The rows are at the fallback, not at the tracker."""
    shown = text_of(tracked(tracker("mlflow", fallback=12_000)))
    assert "mlflow 12,340 delivered, 12,000 of them to its fallback" in shown


def unstarted(verdict: Finding, state="failed", **end) -> Report:
    made = report([{"forward": 1.0}], verdict, state=state, exits={0: {"exit": end}})
    made.steps = StepsSection()
    return made


@pytest.mark.parametrize(
    ("kind", "end", "says"),
    [
        ("INSUFFICIENT_DATA", {"state": "stopped", "signal": 15}, "Stopped before the first step."),
        ("INSUFFICIENT_DATA", {"state": "stopped"}, "Stopped before the first step."),
        ("INSUFFICIENT_DATA", {"code": 2}, "The job failed before its first step: read its output, if it has any."),
        ("RANK_LOST", {"exception": "ImportError: no"}, "Rank 0 ended with ImportError: no at x.py:1."),
    ],
)
def test_a_run_that_failed_before_its_first_step_is_one_line(tmp_path, kind, end, says):
    path = tmp_path / "report.json"
    path.write_text(unstarted(finding(kind, summary="Rank 0 ended with ImportError: no at x.py:1."), **end).to_json())

    assert printed(path) == [f"traceml: {says} More: traceml report {tmp_path}"]


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("RANK_LOST", {"signal": 9}),
        ("HANG", {"code": 1}),
        ("HANG", {"state": "stopped"}),
        ("RANK_LOST", {"code": 1, "trackers": True}),
    ],
)
def test_a_run_that_failed_early_gets_a_card_where_that_says_more(tmp_path, kind, end):
    """After a signal, for another verdict than the failure, and where logged values may wait."""
    trackers = [TrackerSection(backend="jsonl")] if end.pop("trackers", False) else []
    made = unstarted(finding(kind), **end)
    made.trackers = trackers
    path = tmp_path / "report.json"
    path.write_text(made.to_json())

    assert kind in printed(path)[0]


def test_restarts_and_waiting_steps_are_on_the_card():
    made = slow_rank()
    made.run.restarts = [RestartSection(attempt=0, ranks=[1], reason="RuntimeError", step=30, lost_s=12.0)]
    made.run.steps_waiting = 1234

    text = text_of(made)

    assert " Restarted once: rank 1, RuntimeError at step 30 (lost 12 s)\n" in text
    assert " 1,234 steps are not stored: they wait in this host's memory; `traceml sync`\n stores them\n" in text


def test_the_card_in_a_working_directory_that_was_removed(tmp_path, monkeypatch):
    """A training may remove its own; the card names the run by its folder."""
    folder, gone = tmp_path / "traceml_runs" / "20250102-030405-a", tmp_path / "gone"
    folder.mkdir(parents=True)
    gone.mkdir()
    (folder / "report.json").write_text(slow_rank().to_json())
    monkeypatch.chdir(gone)
    gone.rmdir()

    assert printed(folder / "report.json")[-1] == f" Command traceml report {folder}"
