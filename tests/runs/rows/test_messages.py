"""Messages of a run."""

from __future__ import annotations

from tests.renderers.reports import finding, straggler
from tests.runs.export.exported import rich_run
from tests.runs.fabricated_store import add_info, run_facts
from tests.track.fabricated import LoggedRun
from traceml.database.snapshots.rank_snapshot import SNAPSHOT
from traceml.database.store.reader import RunEvent, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.diagnosis.facts.core_waits import COMPETING_PROCESSES
from traceml.diagnosis.findings import Finding
from traceml.run_folder import STORE_NAME
from traceml.runs.live_run import LiveRun
from traceml.runs.rows.messages import RunEvents


def told(run_dir):
    live = LiveRun(run_dir)
    live.refresh()
    try:
        return [(note.rank, note.kind, note.text) for note in live.notes()]
    finally:
        live.close()


def test_events_warnings_and_texts_are_reported(tmp_path):
    """The newest first, each with its rank; rows without words for a person are left out."""
    notes = told(rich_run(tmp_path / "run"))

    assert notes[0] == (None, "verdict", "COMPUTE_STRAGGLER")
    assert sorted(notes[1:]) == [
        (0, "text", 'note, hello, "world" ü'), (0, "warning", "look out"),
        (1, "text", 'note, hello, "world" ü'), (1, "warning", "look out"),
    ]  # fmt: skip


def test_dates_are_on_one_time_line(tmp_path):
    """A rank's monotonic stamp and another's wrong wall clock are both dates of the aggregator's clock."""
    live = LiveRun(rich_run(tmp_path / "run"))
    live.refresh()
    dates = [note.epoch_s for note in live.notes() if note.kind in ("warning", "text")]
    live.close()

    assert max(dates) - min(dates) < 1


def test_only_what_is_new_is_read(tmp_path):
    """A second call continues after the first; the same verdict twice in a row is one line."""
    writer = StoreWriter(tmp_path / STORE_NAME)
    writer.put_meta("run", run_facts(state="running", ended=None))
    stream = writer.stream(StreamIdentity(0, 0, "h0", 1, 7, ""), state="running")
    add_info(writer, stream, kind="warning", t_ns=1, text="first")
    writer.commit()
    live = LiveRun(tmp_path)
    live.refresh()
    assert [note.text for note in live.notes()] == ["first"]

    add_info(writer, stream, kind="warning", t_ns=2, text="second")
    for step in (1, 2):
        writer.event("verdict", {"findings": [finding().to_dict()], "step": step})

    writer.commit()
    live.refresh()

    assert [note.text for note in live.notes()] == ["HEALTHY", "second", "first"]
    live.close()
    writer.close()


def test_what_is_kept_is_bounded(tmp_path):
    """Of very many texts the newest 500 are kept, and long ones are cut."""
    run = LoggedRun(tmp_path / "run")
    for number in range(600):
        run.row("text", name="n", text=f"{number} " + "x" * 5000)

    run.end()
    notes = told(tmp_path / "run")

    assert len(notes) == 500
    assert notes[0][2].startswith("n, ")
    assert max(len(text) for _, _, text in notes) == 500


def kept(*events: tuple[str, dict]) -> list[tuple[int, str]]:
    of_run = RunEvents()
    for number, (kind, data) in enumerate(events):
        of_run.take(RunEvent(number, 0, kind, data))

    assert len(of_run) == len(list(of_run))
    return [(event.id, event.kind) for event in of_run]


def verdict(of: Finding) -> tuple[str, dict]:
    return "verdict", {"findings": [of.to_dict()]}


def test_readings_displace_nothing():
    """After an hour of readings of the host, the end of a rank is still there, and no reading is."""
    readings = [(COMPETING_PROCESSES, {"cores": {"ffmpeg": 0.8}}), (SNAPSHOT, {"stream": 1})] * 1_200

    assert kept(("rank", {"rank": 0, "state": "failed"}), *readings) == [(0, "rank")]


def test_a_verdict_is_reported_when_it_changes():
    """Another cost is no other verdict; another kind, phase or rank is, also the return of an earlier one."""
    slow = [straggler(), straggler(cost_share=0.5), straggler(phase="backward"), straggler(ranks=[2]), finding()]

    assert [number for number, _ in kept(*map(verdict, [*slow, straggler()]))] == [0, 2, 3, 4, 5]


def test_the_end_of_a_rank_is_reported_when_it_changes():
    """The launcher's report adds when it saw the end; another state or signal is new, and that of another rank."""
    raised = {"exception": "ValueError", "message": "boom"}
    ends = [
        ("failed", raised),
        ("failed", {**raised, "code": 1, "reported_s": 2.0}),
        ("lost", {}),
        ("killed", {"signal": 15}),
    ]
    of_first = [("rank", {"rank": 0, "attempt": 0, "state": state, "exit": ended}) for state, ended in ends]

    found = kept(*of_first, ("rank", {"rank": 1, "attempt": 0, "state": "killed", "exit": {"signal": 15}}))

    assert [number for number, _ in found] == [0, 2, 3, 4]


def test_the_newest_events_stay():
    """Their number is bounded."""
    assert [number for number, _ in kept(*[("alert", {})] * 500)] == list(range(300, 500))
