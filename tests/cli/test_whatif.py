"""`traceml whatif` as users call it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.whatif.generated_job import GeneratedJob, slow_worker
from traceml.cli import main


@pytest.fixture
def words(tmp_path):
    trace, meta = GeneratedJob(seconds=slow_worker).run().write(tmp_path)
    return ["whatif", str(trace), "--meta", str(meta)]


def test_json_is_the_contract(capsys, words):
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)

    assert result["schema"] == "traceml.whatif/1"
    assert result["slowdown"] > 1.4
    assert next(iter(result["by_dp_rank"])) == "1"
    assert next(iter(result["by_stage"])) == "2"
    assert next(iter(result["by_worker"])) == "1,2"
    assert {"forward-compute", "backward-compute", "forward-pp-comm", "optimizer"} <= set(result["by_optype"])
    assert result["worker_share"] > 0.9 > result["stage_share"]
    assert "Rank 5" in result["cause"]


def test_screen_fits_80_columns(capsys, words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()

    assert lines[0] == "Stragglers make a step 1.47x as long."
    assert any(line.startswith("dp rank 1, stage 2") for line in lines)
    assert max(map(len, lines)) <= 80


def test_heatmap_and_timeline(capsys, words, tmp_path):
    picture, timeline = tmp_path / "workers.png", tmp_path / "steps.json.gz"
    assert main([*words, "--heatmap", str(picture), "--timeline", str(timeline)]) == 0

    assert picture.read_bytes().startswith(b"\x89PNG")
    text = gzip.decompress(timeline.read_bytes())
    assert max(map(len, text.splitlines())) < 300, "events are written one by one"
    events = json.loads(text)["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {f"dp rank {rank}, {words}" for rank in (0, 1) for words in ("recorded", "without stragglers")}
    spans = [event for event in events if event["ph"] == "X"]
    ends = [
        max(each["ts"] + each["dur"] for each in spans if (each["pid"] < 2) == recorded) for recorded in (True, False)
    ]
    assert ends[0] > 1.3 * ends[1]
    assert min(each["dur"] for each in spans) >= 0
    assert f"{len(spans):,} operations written" in capsys.readouterr().err


def test_format_that_cannot_be_drawn(capsys, words, tmp_path):
    assert main([*words, "--heatmap", str(tmp_path / "workers.xyz")]) == 2
    assert "xyz" in capsys.readouterr().err


def test_a_file_that_is_not_what_it_must_be_is_no_usage_error(capsys, words, tmp_path):
    """The command is right and the file is not: status 3, as of `analyze`, and no hint to the options."""
    wrong = tmp_path / "wrong"
    wrong.write_text("a: b: c")

    for files in ([words[0], str(wrong), *words[2:]], [*words[:-1], str(wrong)]):
        assert main(files) == 3
        told = capsys.readouterr().err
        assert f"{wrong} is not" in told
        assert "hint" not in told


def test_missing_options(capsys, words):
    assert main(words[:2]) == 2
    assert "--meta" in capsys.readouterr().err


@pytest.mark.parametrize(("sizes", "is_told"), [("tp_size: 1", False), ("tp_size: 3", True)])
def test_a_layout_that_does_not_add_up_is_told(capsys, words, sizes, is_told):
    """The result does not depend on it, so it is no error."""
    meta = Path(words[-1])
    meta.write_text(meta.read_text().replace("tp_size: 1", sizes))

    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert ("but its sizes give" in err) == is_told
    assert json.loads(out)["schema"] == "traceml.whatif/1"
