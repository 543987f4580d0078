"""A delivery process and its store: exact whatever happens to it, and right about what goes wrong."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from tests.runs.fabricated_store import add_samples
from tests.track.fabricated import LoggedRun, deliver, delivering, state_of
from traceml.track.delivery import delivery_loop
from traceml.track.delivery.audit import AuditLog
from traceml.track.delivery.delivery_loop import DeliveryLoop
from traceml.track.plugins.plugin_signature import sign
from traceml.track.tracker_state import (
    EXIT_AGAIN,
    EXIT_BROKEN,
    EXIT_DONE,
    EXIT_TAKEN,
    DeliveryPhase,
    TrackerState,
    locked,
)
from traceml.trusted_files import replace_file

FAULTY = "tests.track.faulty_backends:FaultyBackend"
ROOT = str(Path(__file__).parents[3])


def lines_of(run_dir: Path, pattern: str = "jsonl/*.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(run_dir.glob(pattern)) for line in path.read_text().splitlines()]


def values(lines: list[dict[str, Any]], name: str) -> list[tuple[int, Any]]:
    return [
        (line["step"], line["value"])
        for line in lines
        if line.get("name", line.get("metric")) == name and "value" in line
    ]


@pytest.fixture
def run(tmp_path: Path) -> LoggedRun:
    return LoggedRun(tmp_path / "runs" / "r1")


def faulty(
    run: LoggedRun, backend: str = FAULTY, max_backoff: float = 0.3, tags: dict[str, str] | None = None, **options: Any
) -> Path:
    """Announce an experiment to a backend that may misbehave; return the folder in which its behavior is written."""
    folder = run.path.parent / "faulty"
    folder.mkdir(exist_ok=True)
    run.experiment(
        [backend], id="x", sys_path=[ROOT], max_retries=2, max_backoff=max_backoff, tags=tags or {},
        options={backend: {"path": str(folder), **options}},
    )  # fmt: skip
    return folder


def test_experiments_have_the_times_of_the_training(run: LoggedRun) -> None:
    """The run's own starts with the run, though it is announced later; each ends with its last rank."""
    run.metrics({"warm-up": [0.0] * 2000})  # 2 s
    run.experiment(["jsonl"], id="own")
    run.experiment(["jsonl"], 7, id="other", name="other")
    run.metrics({"loss": [0.0] * 500}, 7)
    run.row("end", 7, values=2500)
    run.end()

    assert deliver(run.path, "jsonl").returncode == 0
    times = {
        path.stem: [
            line["timestamp"] for line in lines_of(run.path, f"jsonl/{path.name}") if line["type"] in {"start", "end"}
        ]
        for path in run.path.glob("jsonl/*.jsonl")
    }
    assert times == {"own": [1.7e9, 1.7e9 + 10], "other": [1.7e9 + 2, 1.7e9 + 2.5]}


def test_a_project_may_be_the_trackers_own(run: LoggedRun) -> None:
    """The one that its variable names in the script, which delivery does not see."""
    run.experiment(["jsonl"], id="x", project="default", projects={"jsonl": "vision"})
    run.end()

    assert deliver(run.path, "jsonl").returncode == 0
    assert [line["project"] for line in lines_of(run.path) if line["type"] == "start"] == ["vision"]


def test_all_that_was_logged_arrives_under_its_ranks_names(run: LoggedRun) -> None:
    numbers = [0.5, math.nan, math.inf, -math.inf, 5e-324]
    for rank in range(2):
        run.experiment(["jsonl"], rank=rank, id="x")
        run.row("params", rank=rank, params={"lr": 0.1, "seed": rank})
        run.metrics({"loss": numbers, "Größe 🙂": [float(rank)] * 12_000}, rank=rank)

    run.row("text", name="note", text="hello", step=3)
    run.row("value", name="phase", value="warm-up", step=4)
    run.row("tags", tags={"team": "vision"})
    run.row("histogram", name="w", counts=[1, 2], edges=[0.0, 0.5, 1.0], step=-5)
    run.end()

    done = deliver(run.path, "jsonl")

    assert done.returncode == 0, done.stderr
    lines = lines_of(run.path)
    odd_numbers = [(0, 0.5), (1, "NaN"), (2, "Infinity"), (3, "-Infinity"), (4, 5e-324)]
    assert values(lines, "loss") == values(lines, "loss/rank_1") == odd_numbers
    assert values(lines, "Größe 🙂/rank_1") == [(step, 1.0) for step in range(12_000)]
    assert [line["params"] for line in lines if line["type"] == "params"] == [
        {"lr": 0.1, "seed": 0},
        {"seed/rank_1": 1},
    ]
    assert {line["name"]: line["text"] for line in lines if line["type"] == "text"} == {
        "note": "hello",
        "phase": "warm-up",
    }
    assert [(line["counts"], line["step"]) for line in lines if line["type"] == "histogram"] == [([1, 2], -5)]
    assert any(line["type"] == "tags" and line["tags"] == {"team": "vision"} for line in lines)
    state = state_of(run.path)
    assert (state.phase, state.failed, state.pending(state.passed)) == (DeliveryPhase.DONE, 0, 0)
    assert state.delivered == 2 * (5 + 12_000) + 2 + 4


def test_the_order_depends_on_rows_alone(tmp_path: Path) -> None:
    """However they are cut into batches: an online run of W&B is continued after as many records as it has."""
    found = []
    for name, is_followed in (("followed", True), ("late", False)):
        run = LoggedRun(tmp_path / "runs" / name)
        for rank in range(2):
            run.experiment(["jsonl"], rank=rank, id="x")

        for part in range(3):
            for rank in (1, 0):
                run.metrics({"loss": [0.5] * 5}, rank=rank, first_step=5 * part)
                run.row("text", name="note", text="hello", step=part, rank=rank)
                run.row("params", params={f"p{part}": 1}, rank=rank)

            run.writer.commit()
            if is_followed:
                assert deliver(run.path, "jsonl", "--once").returncode == 0

        run.end()
        assert deliver(run.path, "jsonl").returncode == 0
        lines = [line for line in lines_of(run.path) if line["type"] in {"metric", "text"}]
        found.append([(line["name"], line["step"]) for line in lines])

    assert found[0] == found[1]
    assert len(found[0]) == 36


@pytest.mark.parametrize(("hosts", "is_own"), [(["own"], True), (["other"], False), (["other", "own"], True)])
def test_a_class_that_was_sent_is_loaded_only_of_an_own_run(
    run: LoggedRun, tmp_path: Path, hosts: list[str], is_own: bool
) -> None:
    """Whoever can write rows, with the token or on their way, could run code here; of several hosts one is enough."""

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "loaded",))

    pickled = base64.b64encode(pickle.dumps(Trap())).decode()
    sent = f"sent by Python {sys.version_info.major}.{sys.version_info.minor}:{pickled}"
    row: dict[str, Any] = {"backends": ["mine"], "registered": {"mine": sent}}
    for rank, host in enumerate(hosts):
        signature = sign(row) if host == "own" else "of somebody else"
        run.experiment(["mine"], id="x", rank=rank, registered=row["registered"], signature=signature)

    run.metrics({"loss": [0.5]})
    run.end()

    deliver(run.path, "mine")

    assert ((tmp_path / "loaded").exists(), "was not recorded by this user" in state_of(run.path, "mine").error) == (
        is_own, not is_own,
    )  # fmt: skip


def test_what_is_delivered_is_exact_however_often_the_process_is_killed(run: LoggedRun) -> None:
    """SIGKILL at random moments: nothing is missing and nothing is there twice."""
    run.writer.put_meta("run", {"id": "r1", "ended": None, "started": 0.0, "state": "running"})
    run.experiment(["jsonl"], id="x")
    chance = random.Random(5)
    for first in range(0, 100_000, 20_000):  # the one before may have left nothing
        run.metrics({"a": [float(i) for i in range(first, first + 20_000)]}, first_step=first)
        process = delivering(str(run.path), "jsonl", stderr=subprocess.DEVNULL)
        try:
            # From the moment it delivers; earlier kills find nothing to break. It does not end before the run does.
            eventually(lambda: state_of(run.path).pid == process.pid)  # noqa: B023
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.0, 0.06))
        finally:
            process.kill()
            process.wait()

    run.end()
    assert deliver(run.path, "jsonl").returncode == 0
    assert values(lines_of(run.path), "a") == [(i, float(i)) for i in range(100_000)]


def test_a_killed_process_that_left_nothing_has_a_successor(run: LoggedRun) -> None:
    """The state had the number of the dead one until the next value came: the report said that it was stopped."""
    run.writer.put_meta("run", {"id": "r1", "ended": None, "started": 0.0, "state": "running"})
    run.experiment(["jsonl"], id="x")
    run.metrics({"a": [1.0]})
    for _ in range(2):
        process = delivering(str(run.path), "jsonl")
        try:
            eventually(lambda: state_of(run.path).pid == process.pid and state_of(run.path).delivered == 1)  # noqa: B023
            assert not state_of(run.path).was_cut_off
        finally:
            process.kill()
            process.wait()

        assert state_of(run.path).was_cut_off


def test_a_batch_that_a_kill_cut_off_counts_once(run: LoggedRun) -> None:
    """The state is also saved within a batch, before a call that may take long."""
    folder = faulty(run)
    run.metrics({"a": [float(i) for i in range(30)]})
    (run.path / "weights").write_bytes(bytes(2 << 20))
    run.row("artifact", name="weights", path="weights")
    run.end()
    (folder / "behavior").write_text('{"artifact": "hang"}')
    process = delivering(str(run.path), FAULTY)
    try:
        eventually((folder / "hangs").exists)
        during = state_of(run.path, FAULTY)
    finally:
        process.kill()
        process.wait()

    (folder / "behavior").unlink()
    assert deliver(run.path, FAULTY).returncode == 0
    assert (during.passed, during.delivered) == (0, 0)
    assert state_of(run.path, FAULTY).delivered == 31


def test_a_run_that_goes_on_is_followed_and_a_stopped_process_continued(run: LoggedRun) -> None:
    run.writer.put_meta("run", {"id": "r1", "ended": None, "started": 0.0, "state": "running"})
    run.experiment(["jsonl"], id="x")
    run.metrics({"a": [1.0, 2.0]})
    first = delivering(str(run.path), "jsonl")
    eventually(lambda: state_of(run.path).delivered == 2)
    assert deliver(run.path, "jsonl").returncode == EXIT_TAKEN, "one process at a time delivers"

    run.metrics({"a": [3.0]}, first_step=2)
    eventually(lambda: state_of(run.path).delivered == 3)
    first.send_signal(signal.SIGTERM)
    assert first.wait(240) == EXIT_AGAIN
    assert state_of(run.path).phase is DeliveryPhase.STOPPED

    run.metrics({"a": [4.0]}, first_step=3)
    run.end()
    assert deliver(run.path, "jsonl").returncode == 0
    assert values(lines_of(run.path), "a") == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]


def test_the_verdict_of_the_report_that_follows_the_end_is_sent(run: LoggedRun) -> None:
    """The report is written just after the run has ended: its verdict is awaited."""
    run.experiment(["jsonl"], id="x")
    run.metrics({"a": [1.0, 2.0]})
    run.writer.put_meta("report_asked_s", time.time())
    run.end()
    process = delivering(str(run.path), "jsonl")
    eventually(lambda: state_of(run.path).delivered == 2)
    report = {"run": {"state": "finished"}, "verdict": {"kind": "INPUT_BOUND", "summary": "It waits."}}
    replace_file(run.path / "report.json", json.dumps(report).encode())

    assert process.wait(240) == 0
    tags = [line["tags"] for line in lines_of(run.path) if line["type"] == "tags"]
    assert {"traceml/verdict": "INPUT_BOUND"} in tags


def test_the_verdict_of_a_report_that_takes_long_is_sent_too(run: LoggedRun) -> None:
    """The last experiment has ended with the run, and on a busy host its report takes more than the usual 10 s."""
    run.writer.put_meta("run", {"id": "r1", "ended": None, "started": 0.0, "state": "running"})
    run.experiment(["jsonl"], 1, id="x")
    run.metrics({"a": [1.0, 2.0]}, 1)
    run.row("end", 1, values=2)
    run.writer.commit()
    first = delivering(str(run.path), "jsonl")
    eventually(lambda: state_of(run.path).resume.get("to_end"))
    first.send_signal(signal.SIGTERM)
    assert first.wait(240) == EXIT_AGAIN
    state = state_of(run.path)
    for noted in state.resume["to_end"].values():
        noted[1] -= 60.0  # it was a minute ago

    state.save(run.path)
    run.writer.put_meta("report_asked_s", time.time())
    run.end()
    process = delivering(str(run.path), "jsonl")
    eventually(lambda: state_of(run.path).pid == process.pid and state_of(run.path).phase is DeliveryPhase.DELIVERING)
    report = {"run": {"state": "finished"}, "verdict": {"kind": "INPUT_BOUND", "summary": "It waits."}}
    replace_file(run.path / "report.json", json.dumps(report).encode())

    assert process.wait(240) == 0
    tags = [line["tags"] for line in lines_of(run.path) if line["type"] == "tags"]
    assert {"traceml/verdict": "INPUT_BOUND"} in tags
    assert [line["type"] for line in lines_of(run.path)].count("end") == 1


def test_an_experiment_that_ends_before_the_run_has_the_verdict_so_far(run: LoggedRun) -> None:
    """With its words: the report's comes when the experiment has ended."""
    run.writer.put_meta("run", {"id": "r1", "ended": None, "started": 0.0, "state": "running"})
    run.experiment(["jsonl"], 1, id="first", name="first")
    run.experiment(["jsonl"], 2, id="second", name="second")
    run.metrics({"a": [1.0]}, 1)
    run.writer.event("verdict", {"verdict": {"kind": "INPUT_BOUND", "summary": "It waits."}, "step": 0})
    run.row("end", 1, values=1)
    run.writer.commit()

    assert deliver(run.path, "jsonl", "--once").returncode == 0
    lines = lines_of(run.path, "jsonl/first.jsonl")
    assert lines[-1]["type"] == "end"
    assert {"traceml/verdict_summary": "It waits."} in [line["facts"] for line in lines if line["type"] == "facts"]


def test_many_frames_are_few_batches(run: LoggedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The state is copied and written per batch, and of a job of many ranks it is large."""
    monkeypatch.chdir(tmp_path)
    run.experiment(["jsonl"], id="x")
    for step in range(250):
        run.metrics({"a": [1.0]}, first_step=step)

    run.end()
    saved: list[int] = []
    save = TrackerState.save

    def counted(state: TrackerState, run_dir: Path) -> None:
        saved.append(state.passed)
        save(state, run_dir)

    class Unwatched:
        """No thread that would end this process."""

        def __init__(self, on_hang: object) -> None: ...
        def end_within(self, seconds: float) -> None: ...

        def watch(self, name: str, allowed_s: float) -> contextlib.nullcontext[None]:
            return contextlib.nullcontext()

    monkeypatch.setattr(TrackerState, "save", counted)
    monkeypatch.setattr(delivery_loop, "CallWatchdog", Unwatched)
    assert DeliveryLoop(run.path, "jsonl").run() == EXIT_DONE

    assert len(lines_of(run.path)) > 250
    assert len(saved) < 10


def test_each_experiment_of_a_process_has_the_facts(run: LoggedRun) -> None:
    """Collectors read once: of a loop over experiments the first one alone had its commit."""
    names = ("first", "second", "inner")
    for number, name in enumerate(names, 1):
        run.experiment(["jsonl"], number, id=name, name=name, parent="second" if name == "inner" else None)
        if number == 1:
            run.row("collected", 1, name="git", facts={"commit": "0123abcd", "diff": "+ line\n- line"})

        run.row("end", number, values=0)

    run.end()
    assert deliver(run.path, "jsonl").returncode == 0
    facts = {
        name: [line["facts"] for line in lines_of(run.path, f"jsonl/{name}.jsonl") if line["type"] == "facts"]
        for name in names
    }
    assert facts == {"first": [{"git/commit": "0123abcd"}], "second": [{"git/commit": "0123abcd"}], "inner": []}


def test_experiments_are_kept_apart_and_end_when_their_ranks_have(run: LoggedRun) -> None:
    for rank in range(2):
        run.experiment(["jsonl"], 1, rank=rank, id="first", name="first")
        run.experiment(["tensorboard"], 2, rank=rank, id="second", name="second")
        run.metrics({"a": [1.0]}, 1, rank=rank)
        run.metrics({"a": [2.0]}, 2, rank=rank)
        run.metrics({"a": [3.0]}, 0, rank=rank)  # outside of both

    run.row("end", 1, rank=0)
    run.metrics({"late": [4.0]}, 1, rank=1)
    run.row("end", 1, rank=1)
    run.metrics({"later": [5.0]}, 1, rank=1)  # from a forked child, say
    run.end()

    assert deliver(run.path, "jsonl").returncode == 0

    lines = lines_of(run.path)
    assert [path.name for path in (run.path / "jsonl").iterdir()] == ["first.jsonl"]
    assert values(lines, "a") == [(0, 1.0)]
    assert values(lines, "late/rank_1") == [(0, 4.0)]
    assert values(lines, "later/rank_1") == [(0, 5.0)]
    assert lines[-1]["type"] == "end"


def test_an_experiment_ends_after_the_last_value_that_was_logged_before(run: LoggedRun) -> None:
    """Its end is in another table, and is stored long before the values where there are many."""
    run.writer.put_meta("run", {"id": "r1", "ended": None, "started": 0.0, "state": "running"})
    run.experiment(["jsonl"], 1, id="first", name="first")
    run.experiment(["jsonl"], 2, id="second", name="second")
    run.row("end", 1, values=5_000)
    run.writer.commit()
    process = delivering(str(run.path), "jsonl")
    try:
        for first_step in range(0, 5_000, 1_000):
            run.metrics({"a": [float(i) for i in range(first_step, first_step + 1_000)]}, 1, first_step=first_step)
            eventually(lambda rows=first_step + 1_000: state_of(run.path).delivered == rows)

        eventually(lambda: lines_of(run.path, "jsonl/first.jsonl")[-1]["type"] == "end")  # while the run goes on
        run.end()
        assert process.wait(240) == 0
    finally:
        process.kill()
        process.wait()

    lines = lines_of(run.path, "jsonl/first.jsonl")
    assert [line["type"] for line in lines].count("end") == 1
    assert len(values(lines, "a")) == 5_000


def test_a_tracker_without_the_run_to_resume_begins_another(run: LoggedRun) -> None:
    """An id with a typing error kept all rows of the run from the tracker, for good: the row cannot be changed."""
    run.experiment(["jsonl"], id="own", resume="nope")
    run.metrics({"loss": [0.5, 0.4]})
    run.end()

    done = deliver(run.path, "jsonl")

    assert done.returncode == 0
    assert values(lines_of(run.path), "loss") == [(0, 0.5), (1, 0.4)]
    assert "resume='nope': jsonl has no run with that id" in done.stderr


@pytest.mark.parametrize(("resume", "sent"), [("earlier", True), (None, False)])
def test_a_run_that_is_resumed_loses_the_verdict_of_its_earlier_job(
    run: LoggedRun, resume: str | None, sent: bool
) -> None:
    """A job that only logs gets no verdict, but its run must not stay `RANK_LOST` because the job before was killed."""
    run.experiment(["jsonl"], id="own", resume=resume)
    run.metrics({"loss": [0.5]})
    run.end()
    verdict = {"kind": "INSUFFICIENT_DATA", "summary": "Only logs.", "evidence": {"steps": 0}}
    (run.path / "report.json").write_text(json.dumps({"run": {"state": "finished"}, "verdict": verdict}))

    assert deliver(run.path, "jsonl").returncode == 0
    tags = [line["tags"] for line in lines_of(run.path) if line["type"] == "tags"]
    assert ({"traceml/verdict": "INSUFFICIENT_DATA"} in tags) is sent


def test_a_fallbacks_id_is_not_the_trackers(run: LoggedRun, tmp_path: Path) -> None:
    """A run that began while its tracker was down was continued by the id that its fallback had given."""
    ids = {"tensorboard:0-exp": str(tmp_path / "tb"), "0-exp": str(tmp_path / "exp.jsonl")}
    kept = {key: {"id": place, "public": "own", "mark": None, "ended": True} for key, place in ids.items()}
    before = tmp_path / "runs" / "r0"
    before.mkdir()
    TrackerState("jsonl", experiments=kept).save(before)
    run.experiment(["jsonl", "tensorboard"], id="x", resume="own")
    run.metrics({"loss": [0.5]})
    run.end()

    for backend, place in zip(("tensorboard", "jsonl"), ids.values(), strict=True):
        assert deliver(run.path, backend).returncode == 0
        (stored,) = state_of(run.path, backend).experiments.values()
        assert stored["id"] == place


def test_values_may_come_before_their_experiment_is_announced(run: LoggedRun) -> None:
    """The announcement is in another table, and may be committed a moment later."""
    run.writer.put_meta("run", {"id": "r1", "ended": None, "started": 0.0, "state": "running"})
    run.experiment(["jsonl"], 1, id="outer", name="outer")
    run.metrics({"a": [1.0]}, 1)
    process = delivering(str(run.path), "jsonl")
    try:
        eventually(lambda: state_of(run.path).delivered == 1)
        run.metrics({"b": [2.0]}, 2)
        run.experiment(["jsonl"], 2, id="inner", name="inner")
        run.metrics({"c": [3.0]}, 2, rank=1)  # a forked child, which announces nothing
        run.end()
        assert process.wait(240) == 0
    finally:
        process.kill()
        process.wait()

    lines = lines_of(run.path)
    assert (values(lines, "b"), values(lines, "c/rank_1")) == ([(0, 2.0)], [(0, 3.0)])


@pytest.mark.parametrize("backend", [FAULTY, f"{FAULTY}Idempotent"])
def test_rows_that_are_refused_are_left_out_one_by_one(run: LoggedRun, backend: str) -> None:
    folder = faulty(run, backend)
    run.metrics({"a": [float(i) for i in range(3_000)], "refused": [0.0]})
    run.metrics({"b": [1.0], "also refused": [0.0, 1.0]})
    add_samples(run.writer, run.stream())  # values made from these come with the rows after them
    run.metrics({"refused in the end": [0.0]})
    run.end()

    for _ in range(60):  # as the manager does
        if (done := deliver(run.path, backend)).returncode == 0:
            break

    assert done.returncode == 0, done.stderr
    lines = lines_of(folder, "x.jsonl")
    assert values(lines, "a") == [(i, float(i)) for i in range(3_000)]
    assert values(lines, "b") == [(0, 1.0)]
    state = state_of(run.path, backend)
    assert (state.failed, state.delivered) == (4, 3_001)
    assert sum(state.reasons.values()) == 4
    assert any(line.get("metric") == "system/cpu_pct" for line in lines)


def test_a_row_of_a_later_version_is_not_counted_as_delivered(run: LoggedRun) -> None:
    run.experiment(["jsonl"], id="x")
    run.row("hologram", name="net")
    run.row("text", name="note", text="hello", step=3)
    run.end()

    assert deliver(run.path, "jsonl").returncode == 0
    state = state_of(run.path)
    assert (state.failed, state.delivered) == (1, 1)
    assert list(state.reasons) == ["rows of kind 'hologram' are unknown to this version of traceml"]


@pytest.mark.parametrize("backend", ["jsonl", "tensorboard"])
def test_an_id_is_no_path(run: LoggedRun, tmp_path: Path, backend: str) -> None:
    """An experiment's id is part of a file's name: whatever it is, the file is in its folder."""
    before = set(tmp_path.iterdir())
    for number, experiment in enumerate(("../../../planted", f"{tmp_path}/planted", "a/b", "..")):
        run.experiment([backend], number, id=experiment, name=f"exp{number}")
        run.metrics({"loss": [1.0]}, number)

    run.end()
    done = deliver(run.path, backend)

    assert done.returncode == 0, done.stderr
    assert set(tmp_path.iterdir()) == before
    files = [path for path in (run.path / backend).rglob("*") if path.is_file()]
    assert len(files) == 4


def test_no_file_outside_of_the_run_is_sent(run: LoggedRun, tmp_path: Path) -> None:
    """A row's path is text: one that leads elsewhere, by dots, as a whole or through a link, is refused."""
    (tmp_path / "secret.txt").write_text("secret")
    (run.path / "link.txt").symlink_to(tmp_path / "secret.txt")
    (run.path / "own.txt").write_text("own")
    run.experiment(["jsonl"], id="a")
    for path in ("../secret.txt", str(tmp_path / "secret.txt"), "link.txt", "own.txt"):
        run.row("artifact", name=path, path=path, size=6)

    run.end()
    assert deliver(run.path, "jsonl").returncode == 0

    state = state_of(run.path, "jsonl")
    assert (state.failed, state.delivered) == (3, 1)
    assert all("is not in the run's folder" in reason for reason in state.reasons)
    assert [line["name"] for line in lines_of(run.path) if line.get("type") == "artifact"] == ["own.txt"]


def test_a_refused_row_doubles_nothing_in_a_backend_that_cannot_go_back(run: LoggedRun) -> None:
    """A third party's with the required methods alone: which row it refuses is known, so no other comes again."""
    plain = "tests.track.faulty_backends:Bare"
    folder = faulty(run, plain, tags={"team": "red"})
    run.metrics({"a": [float(i) for i in range(300)], "refused": [0.0], "b": [1.0]})
    run.row("params", params={"lr": 0.1})
    run.row("params", params={"refused": 1})
    run.row("artifact", name="weights", path="store.db", step=0)  # which it does not know at all
    run.row("params", params={"depth": 3})
    run.writer.event("verdict", {"verdict": {"kind": "INPUT_BOUND", "summary": "It waits."}, "step": 0})
    run.end()

    assert deliver(run.path, plain).returncode == 0
    lines = lines_of(folder, "plain.jsonl")
    assert values(lines, "a") == [(i, float(i)) for i in range(300)]
    assert values(lines, "b") == [(0, 1.0)]
    assert [line["params"] for line in lines if "params" in line] == [{"lr": 0.1}, {"depth": 3}]
    state = state_of(run.path, plain)
    assert (state.failed, state.delivered, sum(state.reasons.values())) == (6, 303, 6)


@pytest.mark.parametrize(
    ("behavior", "status", "phase"), [("broken", EXIT_BROKEN, "broken"), ("refuses", EXIT_AGAIN, "open")]
)
def test_a_tracker_that_cannot_begin_a_run_refuses_no_row(
    run: LoggedRun, behavior: str, status: int, phase: str
) -> None:
    """An error about the run or its options is not an error about rows: no row is dropped."""
    folder = faulty(run)
    run.metrics({"a": [1.0, 2.0]})
    run.end()
    (folder / "behavior").write_text(json.dumps({"start": behavior}))

    assert deliver(run.path, FAULTY).returncode == status
    state = state_of(run.path, FAULTY)
    assert (state.phase, state.failed, state.passed) == (phase, 0, 0)
    assert "cannot be started" in state.error

    (folder / "behavior").unlink()
    assert deliver(run.path, FAULTY).returncode == 0
    assert values(lines_of(folder, "x.jsonl"), "a") == [(0, 1.0), (1, 2.0)]


def test_a_batch_that_failed_halfway_comes_once(run: LoggedRun) -> None:
    """Its values were accepted, then its file was not: the same object continues before them."""
    backend = f"{FAULTY}Idempotent"
    folder = faulty(run, backend, tags={"team": "red"})
    (run.path / "artifacts").mkdir()
    (run.path / "artifacts" / "model.pt").write_bytes(b"weights")
    run.metrics({"a": [1.0, 2.0]})
    run.row("artifact", name="model.pt", path="artifacts/model.pt")
    run.end()
    (folder / "behavior").write_text('{"artifact": "down once"}')

    assert deliver(run.path, backend).returncode == 0
    lines = lines_of(folder, "x.jsonl")
    assert values(lines, "a") == [(0, 1.0), (1, 2.0)]
    assert [line["artifact"] for line in lines if "artifact" in line] == ["model.pt"]
    assert sum("start" in line for line in lines) == 1  # by one process
    assert [line["params"] for line in lines if "params" in line] == [{"tags/team": "red"}]  # it was sent before, too


def test_a_library_that_fails_at_every_call_loses_nothing(run: LoggedRun) -> None:
    """A TypeError of every call is no reason to give up one row after another: it is the library that is broken."""
    folder = faulty(run, f"{FAULTY}Idempotent")
    run.metrics({"a": [float(i) for i in range(500)]})
    run.end()
    (folder / "behavior").write_text('{"metrics": "broken"}')

    assert deliver(run.path, f"{FAULTY}Idempotent").returncode == EXIT_BROKEN
    state = state_of(run.path, f"{FAULTY}Idempotent")
    assert (state.phase, state.failed) == (DeliveryPhase.BROKEN, 0)
    assert "unexpected keyword" in state.error

    (folder / "behavior").unlink()
    assert deliver(run.path, f"{FAULTY}Idempotent").returncode == 0
    assert values(lines_of(folder, "x.jsonl"), "a") == [(i, float(i)) for i in range(500)]


def test_a_backend_that_fails_again_behind_what_it_had_opens_the_breaker(run: LoggedRun) -> None:
    """It starts over each time: rows that it had before are no success, or it would be tried without an end."""
    backend = f"{FAULTY}Anew"
    folder = faulty(run, backend)
    run.metrics({"a": [float(i) for i in range(1_500)]})
    (run.path / "weights").write_bytes(b"weights")
    run.row("artifact", name="weights", path="weights")
    run.end()
    (folder / "behavior").write_text('{"artifact": "down"}')

    for _ in range(3):  # it fails, starts over, and fails again
        assert deliver(run.path, backend).returncode == EXIT_AGAIN

    state = state_of(run.path, backend)
    assert (state.phase, state.retries) == (DeliveryPhase.OPEN, 2)


def test_a_call_that_does_not_return_ends_the_process_and_nothing_is_lost(run: LoggedRun) -> None:
    # The other calls of both deliveries must return within it, on a busy machine too.
    folder = faulty(run, timeout_s=10)
    run.metrics({"a": [1.0, 2.0]})
    run.end()
    (folder / "behavior").write_text('{"metrics": "hang"}')

    assert deliver(run.path, FAULTY).returncode == EXIT_AGAIN
    state = state_of(run.path, FAULTY)
    assert "log_metrics did not return within" in state.error
    assert state.phase is DeliveryPhase.WAITING

    (folder / "behavior").unlink()
    assert deliver(run.path, FAULTY).returncode == 0
    assert values(lines_of(folder, "x.jsonl"), "a") == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize("first", [FAULTY, f"{FAULTY}Anew"])
def test_a_fallback_takes_the_rows_while_the_first_fails_and_they_do_not_come_twice(run: LoggedRun, first: str) -> None:
    """Except where the first has to start over; what the fallback has begun is ended then, too."""
    folder = faulty(run, first, fallback="jsonl", max_backoff=4.0)
    run.writer.put_meta("run", {"id": "r1", "ended": None, "started": 0.0, "state": "running"})
    run.metrics({"a": [float(i) for i in range(10)]})
    (folder / "behavior").write_text('{"metrics": "down"}')
    process = None

    def delivered(count: int) -> bool:
        nonlocal process
        if process is None or process.poll() is not None:
            process = delivering(str(run.path), first, stderr=subprocess.DEVNULL)

        return state_of(run.path, first).passed == count

    try:
        eventually(lambda: delivered(11))
        assert state_of(run.path, first).phase is DeliveryPhase.OPEN
        (folder / "behavior").unlink()
        eventually(lambda: delivered(11) and time.time() > state_of(run.path, first).retry_at)
        run.metrics({"a": [10.0, 11.0]}, first_step=10)
        run.end()
        eventually(lambda: delivered(13) and state_of(run.path, first).phase is DeliveryPhase.DONE)
        assert process is not None
        assert process.wait() == EXIT_DONE
    finally:
        if process is not None:
            process.kill()
            process.wait()

    by_fallback, by_first = values(lines_of(run.path), "a"), values(lines_of(folder, "x.jsonl"), "a")
    assert by_fallback[:10] == [(i, float(i)) for i in range(10)]
    assert sorted(by_first if first.endswith("Anew") else by_fallback + by_first) == [(i, float(i)) for i in range(12)]
    assert lines_of(run.path)[-1]["type"] == "end"  # although the first has continued


@pytest.mark.parametrize("other", [{}, {"fallback": "jsonl"}])
def test_a_fallback_that_has_the_experiment_from_another_tracker_keeps_that(
    run: LoggedRun, other: dict[str, str]
) -> None:
    """Both wrote to the file of the experiment: what one had delivered was gone when the other began."""
    second = f"{FAULTY}Anew" if other else "jsonl"
    folder = run.path.parent / "faulty"
    folder.mkdir()
    options = {FAULTY: {"path": str(folder), "fallback": "jsonl"}, second: {"path": str(folder), **other}}
    run.experiment(
        [FAULTY, second], id="x", sys_path=[ROOT], max_retries=1, max_backoff=4.0,
        options=options if other else {FAULTY: options[FAULTY]},
    )  # fmt: skip
    run.metrics({"a": [1.0, 2.0]})
    run.end()
    (folder / "behavior").write_text('{"metrics": "down"}')

    for backend in (second, FAULTY):
        while not (state_of(run.path, backend).fallback_done or state_of(run.path, backend).phase == "done"):
            assert deliver(run.path, backend).returncode in {EXIT_AGAIN, EXIT_DONE}

    files = sorted(run.path.glob("jsonl/*.jsonl"))
    assert len(files) == 2
    assert [values(lines_of(run.path, f"jsonl/{file.name}"), "a") for file in files] == [[(0, 1.0), (1, 2.0)]] * 2


def test_a_fallback_takes_the_rows_although_the_wait_is_over_when_its_process_starts(run: LoggedRun) -> None:
    """With a short `max_backoff` only the failing backend had a turn, again and again."""
    folder = faulty(run, fallback="jsonl", max_backoff=0.01)
    run.metrics({"a": [float(i) for i in range(10)]})
    run.end()
    (folder / "behavior").write_text('{"metrics": "down"}')

    while state_of(run.path, FAULTY).phase is not DeliveryPhase.OPEN:
        assert deliver(run.path, FAULTY).returncode == EXIT_AGAIN

    assert deliver(run.path, FAULTY).returncode == EXIT_AGAIN
    assert values(lines_of(run.path), "a") == [(i, float(i)) for i in range(10)]
    assert state_of(run.path, FAULTY).fallback_done


def test_a_fallback_that_was_not_needed_is_not_asked_to_end_anything(run: LoggedRun, tmp_path: Path) -> None:
    options = {FAULTY: {"path": str(tmp_path), "fallback": "mlflow"}, "mlflow": {"api_key_file": "/nowhere"}}
    run.experiment([FAULTY], id="x", sys_path=[ROOT], options=options)
    run.metrics({"a": [1.0]})
    run.end()
    done = deliver(run.path, FAULTY)

    assert (done.returncode, done.stderr) == (EXIT_DONE, "")


@pytest.mark.parametrize("is_fallback", [False, True])
def test_a_key_file_is_read_from_where_the_script_was_started_also_the_fallbacks(
    run: LoggedRun, tmp_path: Path, is_fallback: bool
) -> None:
    keyed, other = f"{FAULTY}Idempotent", tmp_path / "other"
    (tmp_path / "script" / "keys").mkdir(parents=True)
    other.mkdir()
    key = tmp_path / "script" / "keys" / "faulty"
    key.write_text("FAULTY_KEY=hush")
    key.chmod(0o600)
    options = {keyed: {"path": str(other), "api_key_file": "keys/faulty"}}
    if is_fallback:
        options[FAULTY] = {"path": str(tmp_path), "fallback": keyed}
        (tmp_path / "behavior").write_text('{"start": "down"}')

    backend = FAULTY if is_fallback else keyed
    run.experiment(
        [backend], id="x", sys_path=[ROOT], folder=str(tmp_path / "script"), max_retries=0, max_backoff=30.0,
        options=options,
    )  # fmt: skip
    run.metrics({"a": [1.0]})
    run.end()
    for _ in range(2):
        deliver(run.path, backend)

    lines = lines_of(other, "x.jsonl")
    assert [line["keyed"] for line in lines if "start" in line] == [True]
    assert values(lines, "a") == [(0, 1.0)]


def test_secrets_are_masked_and_rest_nowhere(run: LoggedRun) -> None:
    secret = "sk-proj-abcdefghijklmnop0123456789ABCDEF"
    run.experiment(["jsonl"], id="x", mask=["customer_*"])
    run.row("params", params={"api_key": secret, "lr": 0.1, "customer_id": "C-1", "max_tokens": 512})
    run.row("text", name="note", text=f"mail jane.doe@example.org, key {secret}", step=0)
    run.row("tags", tags={"owner": "jane.doe@example.org"})
    run.end()

    done = deliver(run.path, "jsonl", WANDB_API_KEY="w" * 40)

    assert done.returncode == 0, done.stderr
    lines = lines_of(run.path)
    masked = {"api_key": "[masked:secret]", "lr": 0.1, "customer_id": "[masked:custom]", "max_tokens": 512}
    assert next(line["params"] for line in lines if line["type"] == "params") == masked
    written = "".join(path.read_text() for path in run.path.rglob("*") if path.suffix in {".json", ".jsonl", ".log"})
    assert secret not in written
    assert "jane.doe" not in written
    audit = lines_of(run.path, "trackers/audit.jsonl")
    assert sum(line["sent"].get("params", 0) for line in audit) == 1
    assert audit[-1]["masked"] == {"secret": 2, "custom": 1, "email": 2}
    assert {"api_key", "note"} <= {name for line in audit for name in line["names"]}


def test_tags_of_an_experiment_are_filtered_and_sent_once(run: LoggedRun) -> None:
    """Those at its start passed `exclude` and the audit log, and came again, over newer ones, with each process."""
    run.writer.put_meta("run", {"id": "r1", "ended": None, "started": 0.0, "state": "running"})
    run.experiment(["jsonl"], id="x", exclude=["customer"], tags={"customer": "ACME", "team": "red"})
    run.row("tags", tags={"team": "blue"})
    run.writer.commit()
    assert deliver(run.path, "jsonl", "--once").returncode == 0
    run.metrics({"a": [1.0]})
    run.end()
    assert deliver(run.path, "jsonl").returncode == 0

    lines = lines_of(run.path)
    assert [line["tags"] for line in lines if line["type"] == "tags"] == [{"team": "red"}, {"team": "blue"}]
    assert "ACME" not in json.dumps(lines)
    audit = lines_of(run.path, "trackers/audit.jsonl")
    assert sum(line["sent"].get("tags", 0) for line in audit) == 2
    assert "team" in {name for line in audit for name in line["names"]}


def test_an_audit_log_that_cannot_be_written_is_no_failure_of_the_tracker(run: LoggedRun) -> None:
    """It has taken the rows, and gets none of them again; the log counts them once it can be written."""
    folder = faulty(run)
    run.metrics({"a": [1.0, 2.0]})
    run.row("params", params={"lr": 0.1})
    run.end()
    path = run.path / "trackers" / "audit.jsonl"
    path.mkdir(parents=True)

    done = deliver(run.path, FAULTY)

    state = state_of(run.path, FAULTY)
    assert (done.returncode, state.phase, state.error) == (EXIT_DONE, "done", "")
    assert values(lines_of(folder, "x.jsonl"), "a") == [(0, 1.0), (1, 2.0)]
    assert done.stderr.count(f"{path} cannot be written, delivery to {FAULTY} goes on") == 1

    path.rmdir()
    AuditLog(run.path, state).write({}, force=True)
    assert lines_of(run.path, "trackers/audit.jsonl")[0]["sent"] == {"metrics": 2, "params": 1}


def test_each_experiment_is_delivered_by_its_own_settings_and_options(run: LoggedRun) -> None:
    """Those of the first experiment were applied to all: `exclude` and `mask` of a later one had no effect."""
    run.experiment(["jsonl"], 1, id="a", name="a", options={"jsonl": {"aggregate": {"every": 2, "by": "mean"}}})
    own = {"routes": [{"names": ["loss", "note", "debug/*"]}], "sample": 2}
    run.experiment(
        ["jsonl"], 2, id="b", name="b", options={"jsonl": own}, exclude=["debug/*"], mask=["customer_*"],
        tags={"customer_id": "17"},
    )  # fmt: skip
    for number in (1, 2):
        run.metrics({"loss": [1.0, 2.0], "debug/x": [3.0, 4.0], "acc": [5.0, 6.0]}, number)
        run.row("params", number, params={"customer_name": "Ada", "debug/p": 1})
        run.row("text", number, name="note", text="by customer_17", step=0)

    run.end()

    assert deliver(run.path, "jsonl").returncode == 0
    first, second = (lines_of(run.path, f"jsonl/{name}.jsonl") for name in ("a", "b"))
    assert [values(first, name) for name in ("loss", "debug/x", "acc")] == [[(1, 1.5)], [(1, 3.5)], [(1, 5.5)]]
    assert [values(second, name) for name in ("loss", "debug/x", "acc")] == [[(0, 1.0)], [], []]
    said = [[line.get("tags") or line.get("params") or line.get("text") for line in lines] for lines in (first, second)]
    assert [[each for each in words if each] for words in said] == [
        [{"customer_name": "Ada", "debug/p": 1}, "by customer_17"],
        [{"customer_id": "[masked:custom]"}, {"customer_name": "[masked:custom]"}, "by [masked:custom]"],
    ]
    assert state_of(run.path).masked == 4  # the tag at the start, too


def test_local_only_is_of_the_experiment_that_sets_it(run: LoggedRun) -> None:
    elsewhere = {"mlflow": {"tracking_uri": "http://192.0.2.1:9"}}
    run.experiment(["mlflow"], 1, id="a", name="a", local_only=True)
    run.experiment(["mlflow"], 2, id="b", name="b", options=elsewhere, max_retries=1)
    run.end()

    assert deliver(run.path, "mlflow", MLFLOW_HTTP_REQUEST_TIMEOUT="1").returncode == EXIT_AGAIN
    assert "local_only" not in state_of(run.path, "mlflow").error


def test_a_backend_that_would_leave_the_machine_is_refused_under_local_only(run: LoggedRun) -> None:
    run.experiment(
        ["mlflow"], id="x", local_only=True, options={"mlflow": {"tracking_uri": "http://tracking.example.org"}}
    )
    run.metrics({"a": [1.0]})
    run.end()

    assert deliver(run.path, "mlflow").returncode == EXIT_BROKEN
    assert "local_only" in state_of(run.path, "mlflow").error


def test_a_run_that_asked_for_no_tracker_can_be_delivered_later(run: LoggedRun) -> None:
    run.metrics({"a": [1.0, 2.0]})
    run.end()

    assert deliver(run.path, "jsonl", "--once", "--options", "{}").returncode == 0
    assert values(lines_of(run.path), "a") == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize("to", ["start", "metrics"])
@pytest.mark.parametrize(
    ("behavior", "words"),
    [("exits", "the tracker's library ended its process: sys.exit(3)"), ("panics", "PanicException: called `Option")],
)
def test_a_library_that_ends_its_process_is_a_failure(run: LoggedRun, to: str, behavior: str, words: str) -> None:
    """It was started again and again, and nobody was told why nothing arrived."""
    folder = faulty(run)
    run.metrics({"a": [1.0, 2.0]})
    run.end()
    (folder / "behavior").write_text(json.dumps({to: behavior}))

    assert deliver(run.path, FAULTY).returncode == EXIT_AGAIN
    assert state_of(run.path, FAULTY).phase == DeliveryPhase.WAITING
    assert words in state_of(run.path, FAULTY).error

    (folder / "behavior").unlink()
    assert deliver(run.path, FAULTY).returncode == EXIT_DONE
    assert values(lines_of(folder, "x.jsonl"), "a") == [(0, 1.0), (1, 2.0)]


def test_an_id_may_be_any_object(run: LoggedRun) -> None:
    """Of a UUID the process died, as often as it was started."""
    backend = f"{FAULTY}Odd"
    folder = faulty(run, backend)
    run.end()

    assert deliver(run.path, backend).returncode == EXIT_DONE
    (stored,) = state_of(run.path, backend).experiments.values()
    assert (stored["id"], stored["url"]) == ("00000000-0000-0000-0000-000000000007", str(folder / "x.jsonl"))


def test_a_plugin_that_creates_nothing_is_named(run: LoggedRun) -> None:
    backend = FAULTY.replace("FaultyBackend", "ForgetfulPlugin")
    faulty(run, backend)
    run.end()

    assert deliver(run.path, backend).returncode == EXIT_BROKEN
    assert "create_backend() must return a BackendInterface, not None" in state_of(run.path, backend).error


def test_a_position_that_cannot_be_kept_is_named(run: LoggedRun) -> None:
    """The process died of it, as often as it was started."""
    backend = f"{FAULTY}Mark"
    faulty(run, backend)
    run.end()

    assert deliver(run.path, backend).returncode == EXIT_BROKEN
    assert "FaultyBackendMark.mark() must return what JSON can hold" in state_of(run.path, backend).error


@pytest.mark.parametrize("cleanup", ["fails", "hang"])
def test_a_plugin_releases_what_it_took(run: LoggedRun, cleanup: str) -> None:
    """`cleanup` is called when all is delivered: that it fails, or does not return, costs nothing."""
    plugin = FAULTY.replace("FaultyBackend", "FaultyPlugin")
    folder = faulty(run, plugin, timeout_s=5)
    (folder / "behavior").write_text(json.dumps({"cleanup": cleanup}))
    run.metrics({"a": [1.0, 2.0]})
    run.end()

    assert deliver(run.path, plugin).returncode == EXIT_DONE
    assert state_of(run.path, plugin).phase is DeliveryPhase.DONE
    assert (folder / "cleaned").exists()


def test_a_profile_is_written_where_it_is_asked_for(run: LoggedRun) -> None:
    run.experiment(["jsonl"], id="x")
    run.end()

    assert deliver(run.path, "jsonl", "--profile").returncode == 0
    assert list((run.path / "trackers").glob("jsonl.*.prof"))


def test_the_lock_is_one_processs_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path, "x") as first, locked(tmp_path, "x") as second, locked(tmp_path, "y") as other:
        assert (first, second, other) == (True, False, True)


def test_delivery_steps_back(run: LoggedRun) -> None:
    """It runs at the priority that it is given, and as a batch job for the scheduler."""
    run.writer.put_meta("run", {"id": "r1", "ended": None, "started": 0.0, "state": "running"})
    run.experiment(["jsonl"], id="x")
    run.writer.commit()
    process = subprocess.Popen([sys.executable, "-m", "traceml.track.delivery", str(run.path), "jsonl", "--nice", "12"])
    try:
        eventually(lambda: TrackerState.path_in(run.path, "jsonl").exists())
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(os.getpriority(os.PRIO_PROCESS, 0) + 12, 19)
        assert os.sched_getscheduler(process.pid) == os.SCHED_BATCH
    finally:
        process.kill()
        process.wait()


def test_names_without_end_are_all_delivered(run: LoggedRun) -> None:
    run.experiment(["jsonl"], id="x")
    run.metrics({f"layer_{i}/grad": [float(i)] for i in range(100_000)})
    run.end()

    assert deliver(run.path, "jsonl").returncode == 0
    counted = Counter(line["name"] for line in lines_of(run.path) if line["type"] == "metric")
    assert len(counted) == 100_000
    assert set(counted.values()) == {1}
