"""Results of trace analyses as tables of any width."""

from __future__ import annotations

import pytest

from traceml.renderers.text.trace_analysis import analysis_lines
from traceml.renderers.text.viewport import ASCII, Viewport


def group(name, sum_us, count=3, **more):
    times = dict.fromkeys(("mean_us", "min_us", "max_us", "p50_us", "p99_us"), sum_us / count)
    return {"name": name, "count": count, "sum_us": sum_us, "self_us": sum_us, **times, **more}


def row(**more):
    times = dict.fromkeys(
        (
            "compute_us",
            "io_us",
            "comm_us",
            "copy_us",
            "unoverlapped_io_us",
            "unoverlapped_comm_us",
            "unoverlapped_copy_us",
        ),
        5e5,
    )
    return {"duration_us": 1e6, "idle_us": 1e5, **times, **more}


def answer(**more):
    busy = {f"{kind}_us": 100 for kind in ("compute", "io", "comm", "copy", "host", "host_comm", "other")}
    call = {"cat": "POSIX", "name": "read", "count": 3, "sum_us": 5.0, "bytes": 4096, "bytes_per_s": 1e9}
    report = {
        "overlap": row(),
        "io": {"read_bytes": 4096, "write_bytes": 0, "busy_us": 5, "bytes_per_s": 1e9, "calls": [call]},
        "kernels": [group("gemm", 5e6)],
        "operators": [group("aten::mm", 5e6)],
        "processes": [row(file="f", pid=pid, name="trainer", rank=None, host=None) for pid in range(20)],
        "ranks": [row(rank=rank, host="node") for rank in range(40)],
        "timeline": {"begin_us": 0, "bin_us": 1000.0, "bins": [{"spans": 7, **busy}] * 60},
    }
    files = [{"path": "trace.pfw.gz", "events": 6, "bytes": 5000, "damage": []}]
    groups = [group(f"function number {number} with a long name", 1e6) for number in range(30)]
    return {"files": files, "events": 6, "spans": 6, "by": ["name"], "groups": groups, "report": report, **more}


def text(data, **options):
    viewport = options.pop("viewport", Viewport(width=100))
    return "\n".join(line.plain for line in analysis_lines(data, viewport, **options))


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("glyphs", [Viewport().glyphs, ASCII])
def test_lines_fit(width, glyphs):
    """No line is wider than the screen."""
    viewport = Viewport(width=width, glyphs=glyphs)
    for line in analysis_lines(answer(), viewport):
        assert line.cell_len <= max(width, 80), line.plain

    shown = text(answer(), viewport=viewport)
    assert glyphs is not ASCII or shown.isascii()


def test_every_section_is_there():
    """The overview has groups, overlap, I/O, kernels, operators, ranks and a timeline."""
    shown = text(answer(), top=5)

    for words in (
        "and 25 more groups",
        "communication",
        "4 KiB read",
        "Kernels, by time",
        "Operators",
        "rank 0 (node)",
        "Timeline",
    ):
        assert words in shown
    assert "trainer" not in shown, "ranks are known: processes are left to --json"


@pytest.mark.parametrize("width", [60, 100])
def test_processes_of_one_number_are_told_apart(width):
    """Containers number theirs alike: their files are named, from the common folder on."""
    data = answer()
    where = [("runs/a/trace.pfw", 1), ("runs/b/trace.pfw", 1), ("runs/b/trace.pfw", 7)]
    data["report"]["ranks"] = []
    data["report"]["processes"] = [row(file=file, pid=pid, name=None, rank=None, host=None) for file, pid in where]
    shown = text(data, viewport=Viewport(width=width), sections=("processes",)).splitlines()

    assert [line.split()[:3] for line in shown[-3:]] == [
        ["pid", "1", "a/trace.pfw"],
        ["pid", "1", "b/trace.pfw"],
        ["pid", "7", "b/trace.pfw"],
    ]
    data["report"]["processes"].pop(0)  # 1 and 7 are left
    assert "b/trace.pfw" not in text(data, sections=("processes",))


def test_a_narrow_screen_shows_the_whole_timeline():
    """Neighboring bins share a column, and the title says how long one is; the first bins were left out."""
    data = answer()
    fine = data["report"]["timeline"]["bins"]
    fine[0] = {**fine[0], "spans": 700}

    shown = text(data, viewport=Viewport(width=60), sections=("timeline",))

    assert "Timeline: 30 bins of 2.00 ms" in shown
    [spans] = [line for line in shown.splitlines() if line.startswith("spans begun")]
    assert spans.removeprefix("spans begun").strip() == "█" + "▁" * 29


def test_only_some_sections():
    """An analysis by fields shows its groups."""
    shown = text(answer(), sections=["groups"])

    assert "function number 3" in shown
    assert "Timeline" not in shown


def test_damage_is_on_top():
    """Damage is reported before any number, with its position and size."""
    damage = [{"offset": 1234, "what": "a broken gzip member", "lost_bytes": 2048}] * 11
    lines = text(answer(files=[{"path": "a.pfw.gz", "events": 6, "bytes": 5, "damage": damage}])).splitlines()

    assert lines[1].endswith("damaged: a.pfw.gz: at byte 1,234: a broken gzip member, 2 KiB lost")
    assert "3 more in a.pfw.gz" in lines[9]


def test_aggregated_calls_have_a_table():
    """The calls behind aggregated rows of dftracer are told as calls; without such rows there is no table."""
    calls = {"rows": 8, "count": 1209, "sum_us": 110_000, "mean_us": 90.98}
    group = {"name": "read", "rows": 8, "count": 1209, "sum_us": 110_000, "mean_us": 90.98}
    lines = text(answer(aggregated={**calls, "groups": [group]})).splitlines()

    assert any("1,209 calls in 8 rows" in line for line in lines)
    assert any(line.split() == ["read", "1,209", "110", "ms", "91", "us"] for line in lines)
    assert "Aggregated" not in text(answer())


def test_labels_cannot_harm_the_terminal():
    """Control characters are not printed, markup is text, and a missing label is a dash."""
    shown = text(answer(groups=[group("\x1b[31m[bold]red", 5.0), group(None, 4.0), group(0, 3.0)]), sections=["groups"])

    assert "\x1b" not in shown
    assert r"\x1b[31m[bold]red" in shown
    assert [line.split()[0] for line in shown.splitlines()[-2:]] == ["-", "0"]


def test_no_spans():
    """A trace of instants only has no groups, and says so."""
    assert "No spans" in text(answer(groups=[]), sections=["groups"])
