"""Calls of a real SummaryWriter are captured with their steps, times and bit-identical values."""

from __future__ import annotations

import numpy as np
import pytest

from tests.track.rank.frameworks.conftest import RunScript
from traceml.database.schema import MetricKind

SCRIPT = """
    import json, sys
    import numpy as np
    import torch
    import traceml

    before_import = sys.argv[1] == "torch.utils.tensorboard"
    if not before_import:
        from tensorboardX import SummaryWriter  # known before anything is captured

        originals = {name: vars(SummaryWriter)[name] for name in vars(SummaryWriter) if name.startswith("add_")}

    with traceml.Experiment("capture", backend=["jsonl"]):
        if before_import:
            from torch.utils.tensorboard import SummaryWriter

            originals = {name: getattr(vars(SummaryWriter)[name], "__wrapped__", vars(SummaryWriter)[name])
                         for name in vars(SummaryWriter) if name.startswith("add_")}

        writer = SummaryWriter("events")
        for step in range(50):
            writer.add_scalar("loss", 0.1 * step, step, walltime=1_700_000_000.25 + step)
        writer.add_scalar("tensor", torch.tensor(0.1), 3)
        writer.add_scalar("numpy", np.float64(1e300), np.int64(4))
        writer.add_scalar("nan", float("nan"), 5)
        writer.add_scalars("group", {"train": 1.5, "val": 2.5}, 6)
        writer.add_text("note", "Grüße", 7)
        writer.add_image("picture", torch.linspace(0, 1, 3 * 8 * 9).reshape(3, 8, 9), 8)
        writer.add_histogram("weights", np.arange(10.0), 9, bins=5)
        writer.add_hparams({"lr": 0.1, "optimizer": "sgd"}, {"hparam/accuracy": 0.75})
        try:
            writer.add_scalar()
        except TypeError as error:
            pass
        writer.close()

    def is_put_back():
        return all(vars(SummaryWriter)[name] is original for name, original in originals.items())

    put_back = is_put_back()
    with SummaryWriter("between") as writer:
        writer.add_scalar("between", 1.0, 0)
    with traceml.Experiment("again", backend=["jsonl"]), SummaryWriter("again") as writer:
        writer.add_scalar("again", 1.0, 0)

    traceml.shutdown()
    put_back = put_back and is_put_back()
    print(json.dumps({"put_back": put_back}))
"""


@pytest.mark.parametrize("library", ["torch.utils.tensorboard", "tensorboardX"])
def test_summary_writer(captured: RunScript, library: str) -> None:
    """Everything is captured once, after the original call, and the class is left as it was found."""
    found = captured(SCRIPT, library)
    values = found.values(MetricKind.TENSORBOARD)

    assert [value for value in values if value[0] == "loss"] == [("loss", step, 0.1 * step) for step in range(50)]
    assert [row.timestamp for row in found.metrics if row.name == "loss"] == [1_700_000_000.25 + i for i in range(50)]
    assert ("tensor", 3, float(np.float32(0.1))) in values
    assert ("numpy", 4, 1e300) in values
    assert [value != value for name, _, value in values if name == "nan"] == [True]
    assert {("group/train", 6, 1.5), ("group/val", 6, 2.5)} <= set(values)
    assert [value for name, _, value in values if name == "hparam/accuracy"] == [0.75]
    assert ("again", 0, 1.0) in values
    assert len(values) == 50 + 3 + 2 + 1 + 1
    [text] = found.logged["text"]
    assert (text["name"], text["step"], text["text"]) == ("note", 7, "Grüße")
    [histogram] = found.logged["histogram"]
    assert (histogram["counts"], histogram["edges"]) == ([2] * 5, [0.0, 1.8, 3.6, 5.4, 7.2, 9.0])
    [image] = found.logged["image"]
    assert (image["name"], image["step"]) == ("picture", 8)
    assert {"lr": 0.1, "optimizer": "sgd"} in [row["params"] for row in found.logged["params"]]
    assert found.said["put_back"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The writer's own files are what they are without us.
    events = EventAccumulator(str(found.folder / "events"), size_guidance={"scalars": 0}).Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    assert written == [(step, float(np.float32(0.1 * step))) for step in range(50)]


def test_histograms_of_nearly_equal_weights(captured: RunScript) -> None:
    """numpy refuses ranges that are narrower than our intervals; the writer's own call succeeds, and so does ours."""
    found = captured("""
        import numpy as np
        import traceml
        from torch.utils.tensorboard import SummaryWriter

        traceml.init(backend=["jsonl"])
        with SummaryWriter("events") as writer:
            writer.add_histogram("weights", np.array([1.0, 1.0 + 2**-52]), 1)
            writer.add_histogram("weights", np.arange(4.0), 2, bins=[0.0, 2.0, 4.0])
        traceml.shutdown()
    """)

    nearly, given = sorted(found.logged["histogram"], key=lambda row: row["step"])
    assert (len(nearly["counts"]), sum(nearly["counts"])) == (64, 2)
    assert (given["counts"], given["edges"]) == ([2, 2], [0.0, 2.0, 4.0])


def test_ranks_and_plain_recorder(captured: RunScript) -> None:
    """A rank's values are its own, without an experiment and without trackers they are the run's."""
    script = """
        import traceml
        from torch.utils.tensorboard import SummaryWriter

        traceml.init(backend=BACKEND)
        with SummaryWriter("events") as writer:
            writer.add_scalar("loss", 0.5, 1)
        traceml.shutdown()
    """
    found = captured(script.replace("BACKEND", '["jsonl"]'), RANK="3", WORLD_SIZE="4")
    assert [(row.name, row.rank, row.value) for row in found.metrics] == [("loss", 3, 0.5)]

    found = captured(script.replace("BACKEND", "[]"), TRACEML_RUN_ID="no-trackers")
    found.run_dir = found.run_dir.parent / "no-trackers"
    found.metrics.clear()
    found.read()
    assert [(row.name, row.value) for row in found.metrics] == [("loss", 0.5)]
