"""`traceml analyze` as users call it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.forked import client as forked
from tests.traces.brute import check
from traceml.blas_threads import one_blas_thread
from traceml.cli import main
from traceml.run_folder import STORE_NAME

EVENTS = [
    {
        "ph": "X",
        "name": ("read", "forward")[n % 2],
        "cat": ("POSIX", "COMPUTE")[n % 2],
        "pid": 1,
        "tid": n % 3,
        "ts": n * 9,
        "dur": n % 31,
    }
    for n in range(200)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep answers apart from the user's."""
    monkeypatch.setenv("TRACEML_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.pfw"
    path.write_text("\n".join(map(json.dumps, EVENTS)) + "\n")
    return path


def output(capsys, *words):
    assert main(["analyze", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_json_is_the_contract(capsys, trace):
    """The JSON has the documented keys, and nothing else is printed."""
    answer = json.loads(output(capsys, trace, "--by", "name,tid", "--json"))

    check(answer, EVENTS, ("name", "tid"))
    assert answer["schema"] == "traceml.analysis/1"
    assert answer["files"] == [{"path": str(trace), "events": 200, "bytes": trace.stat().st_size, "damage": []}]
    assert (answer["events"], answer["spans"], answer["by"]) == (200, 200, ["name", "tid"])
    assert "report" not in answer


def test_measures(capsys, trace):
    """The table has the columns that were asked for, and JSON has them too."""
    lines = output(capsys, trace, "--agg", "count,std,p95").splitlines()
    (group, *_) = json.loads(output(capsys, trace, "--agg", "p95,std", "--json"))["groups"]

    title = next(line for line in lines if line.startswith("name"))
    assert title.split() == ["name", "count", "std", "p95", "of", "sum"]
    assert group["std_us"] > 8
    assert group["p95_us"] in (29, 30)


def test_one_event_is_no_events(capsys, tmp_path):
    """Counts agree with their nouns."""
    path = tmp_path / "one.pfw"
    path.write_text('{"name": "read", "ph": "X", "pid": 1, "tid": 1, "ts": 0, "dur": 5}\n')
    assert "one.pfw: 1 event, 1 span, " in output(capsys, path)


def test_overview(capsys, trace):
    """Without --by there is an overview."""
    shown = output(capsys, trace)

    for words in ("trace.pfw: 200 events, 200 spans", "forward", "I/O", "unoverlapped", "Timeline"):
        assert words in shown
    assert "report" in json.loads(output(capsys, trace, "--json"))


def test_top_conditions_and_sections(capsys, trace):
    """--top, --where and the sections choose what is shown."""
    shown = output(capsys, trace, "--by", "tid", "--where", "cat=POSIX,dur>3", "--top", 2, "--overlap")

    assert "and 1 more group:" in shown
    assert "compute " not in shown, "what is not computing was left out by the condition"
    assert "I/O" in shown
    assert "Timeline" not in shown
    assert len(json.loads(output(capsys, trace, "--by", "tid", "--top", 2, "--json"))["groups"]) == 2


def test_conditions_and_groups_of_several_options_are_joined(capsys, trace):
    """A condition with OR keeps its extent."""

    def groups(*words):
        return json.loads(output(capsys, trace, "--json", *words))["groups"]

    several = groups("--by", "cat", "--by", "tid", "--where", "dur>3", "--where", "cat=POSIX")

    assert several == groups("--by", "cat,tid", "--where", "dur>3,cat=POSIX")
    assert several != groups("--by", "cat,tid")
    assert groups("--where", "dur>0 OR cat=POSIX", "--where", "cat=nobody") == []


def test_nothing_passes(capsys, trace):
    """A condition that nothing meets is an answer, not an error."""
    assert "No span passes the conditions" in output(capsys, trace, "--by", "name", "--where", "name=nobody")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "name a trace"),
        (["TRACE", "--top", "0"], 2, "--top takes a whole number of at least 1"),
        (["TRACE", "--by", "nam"], 2, "Did you mean name?"),
        (["TRACE", "--where", "cat POSIX"], 2, "HERE -> POSIX"),
        (["TRACE", "--where", "args.x=1"], 2, "There are no args"),
        (["TRACE.gone"], 3, "no such file"),
        (["EMPTY"], 3, "no trace event"),
    ],
)
def test_errors_say_what_to_do(capsys, tmp_path, trace, words, status, said):
    """Called wrongly is 2, nothing to read is 3; each with one sentence that helps."""
    empty = tmp_path / "empty.json"
    empty.write_text("")
    words = [word.replace("TRACE", str(trace)).replace("EMPTY", str(empty)) for word in words]

    assert main(["analyze", *words]) == status
    shown = capsys.readouterr()
    assert said in shown.err
    assert not shown.out


def test_folder_of_a_run(capsys, tmp_path):
    """A run's folder contains no trace: the error names the commands that create one."""
    (tmp_path / STORE_NAME).touch()

    assert main(["analyze", str(tmp_path)]) == 3
    assert f"traceml export {tmp_path} --format pfw" in capsys.readouterr().err


@pytest.mark.process
def test_second_time_needs_no_numpy(trace):
    """A question asked again of an unchanged file is answered without reading it, or importing what reads it."""
    os.utime(trace, (1, 1))
    code = (
        "import sys; from traceml.cli import main; main(sys.argv[1:]); print('numpy' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "analyze", str(trace), "--by", "name", "--json"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))

    assert first.stdout == second.stdout
    assert (first.stderr.strip(), second.stderr.strip()) == ("True", "False")


@pytest.mark.process
def test_progress_is_for_terminals_only(trace):
    """In a pipe nothing but the answer is printed."""
    command = [sys.executable, "-m", "traceml", "analyze", str(trace), "--no-cache"]
    done = forked.run(command, imports="aggregator", capture_output=True, text=True, check=True)

    assert done.stderr == ""
    assert "\x1b" not in done.stdout


@pytest.mark.process
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Twice as many events, most of them beyond what is held for sorting, take a fifth and some chunks more at most."""
    text = "".join(
        f'{{"ph":"X","name":"f{n % 9}","pid":1,"tid":{n % 5},"ts":{n * 7 % 90_000},"dur":{n % 400}}}\n'
        for n in range(60_000)
    )
    member, peaks = gzip.compress(text.encode(), 1), []
    for copies in (50, 100):
        path = tmp_path / f"{copies}.pfw.gz"
        path.write_bytes(member * copies)
        code = "import re, sys; from traceml.cli import main; main(sys.argv[1:]); "
        code += "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)"
        command = [sys.executable, "-c", code, "analyze", str(path), "--json", "--by", "name"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["events"] == 60_000 * copies
        peaks.append(int(done.stderr))

    chunks_kib = 16 * 1024  # threads that wait for a core hold fewer chunks at a time; the text is 178 MiB longer
    assert peaks[1] <= 1.2 * peaks[0] + chunks_kib


@pytest.mark.process
def test_cores_are_for_reading(trace):
    """The command imports numpy without BLAS threads, and leaves the environment of its process unchanged."""
    code = (
        "import os, sys, threading, time; from pathlib import Path; from traceml.cli import main\n"
        "before = dict(os.environ)\n"
        f"main(['analyze', {str(trace)!r}, '--by', 'name', '--json', '--no-cache'])\n"
        "assert dict(os.environ) == before; assert 'numpy' in sys.modules\n"
        "extra = lambda: len(list(Path('/proc/self/task').iterdir())) - threading.active_count()\n"
        "end = time.monotonic() + 5\n"
        "while extra() and time.monotonic() < end: time.sleep(0.01)  # a joined thread is in /proc a moment longer\n"
        "print(extra(), file=sys.stderr)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert done.stderr.strip() == "0"


@pytest.mark.parametrize(("before", "inside"), [(None, "1"), ("", "1"), ("4", "4")])
def test_the_number_of_blas_threads_is_restored_after_an_error(monkeypatch, before, inside):
    """The zygote and the command keep to a number that the user chose; an empty one is none."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if before is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", before)

    seen = []
    with suppress(KeyError), one_blas_thread():
        seen.append(os.environ["OPENBLAS_NUM_THREADS"])
        raise KeyError

    assert seen == [inside]
    assert os.environ.get("OPENBLAS_NUM_THREADS") == before


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_plot_writes_a_chart_beside_the_output(capsys, tmp_path, trace, suffix):
    """Standard output stays what it is, JSON included."""
    path = tmp_path / f"chart.{suffix}"

    assert json.loads(output(capsys, trace, "--by", "name", "--json", "--plot", path))["groups"]
    assert path.read_bytes()[:9] in (b"<!doctype", b"\x89PNG\r\n\x1a\n\x00")


@pytest.mark.parametrize(
    ("name", "said"),
    [("chart.pdf", "ends neither in .html nor in .png"), ("no/chart.png", "there is no folder")],
)
def test_a_chart_that_cannot_be_written_is_reported_before_reading(capsys, tmp_path, name, said):
    assert main(["analyze", "no-such-trace", "--plot", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(capsys, tmp_path, trace, monkeypatch):
    monkeypatch.setattr("traceml.cli.analyze.find_spec", lambda name: None)

    assert main(["analyze", str(trace), "--plot", str(tmp_path / "chart.png")]) == 2
    assert "pip install 'traceml-torch[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["", " ", ","])
def test_no_field_to_group_by(capsys: pytest.CaptureFixture[str], trace: object, by: str) -> None:
    """An empty list is a mistake, not the default."""
    assert main(["analyze", str(trace), "--by", by]) == 2

    err = capsys.readouterr().err
    assert "no field in" in err
