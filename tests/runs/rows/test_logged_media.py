"""Logged texts, images, histograms and files."""

from __future__ import annotations

from contextlib import closing

from tests.track.fabricated import LoggedRun
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
from traceml.runs.rows.logged_media import LoggedItems


def test_the_newest_of_each_name_are_kept(tmp_path):
    """Older ones are counted; ranks above 0 have their own name; rows of other kinds are left out."""
    run = LoggedRun(tmp_path / "run")
    for step in range(30):
        run.row("text", name="sample", step=step, text=f"text {step}")

    run.row("text", name="sample", step=1, text="of rank 2", rank=2)
    run.row("artifact", name="model.pt", path="artifacts/abc.pt", size=12)
    run.row("artifact", name="model.pt", path="artifacts/def.pt", size=13)
    run.row("histogram", name="w", step=3, counts=[1, 2], edges=[0, 1, 2])
    run.row("value", name="mode", step=2, value="fast")
    run.row("params", params={"lr": 1})
    run.writer.commit()
    items = LoggedItems()
    with closing(StoreReader(run.path / STORE_NAME)) as reader:
        assert items.update(reader)
        groups = {(group.kind, group.name): group for group in items.groups()}
        assert not items.update(reader)
        run.row("text", name="sample", step=30, text="new")
        run.writer.commit()
        assert items.update(reader)

    assert list(groups) == [
        ("text", "sample"), ("text", "sample/rank_2"), ("histogram", "w"), ("artifact", "model.pt"), ("value", "mode"),
    ]  # fmt: skip
    texts = groups["text", "sample"]
    assert (texts.older, texts.items[0].text, texts.items[-1].text) == (6, "text 6", "text 29")
    files = groups["artifact", "model.pt"]
    assert (files.older, files.items[0].path, files.items[0].size_bytes) == (1, "artifacts/def.pt", 13)
    assert groups["histogram", "w"].items[0].edges == (0.0, 1.0, 2.0)
    assert groups["value", "mode"].items[0].text == "fast"
    assert items.groups()[0].items[-1].text == "new"
    run.end()
