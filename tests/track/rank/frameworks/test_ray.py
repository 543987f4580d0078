"""Values that workers of Ray Train report are captured."""

from __future__ import annotations

from tests.track.rank.frameworks.conftest import RunScript
from traceml.database.schema import MetricKind

SCRIPT = """
    import json
    import traceml
    from ray.train import report
    from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils, set_train_fn_utils

    set_train_fn_utils(LocalTrainFnUtils("here"))
    original = vars(LocalTrainFnUtils)["report"]
    callback = {"__name__": "ray.train.lightning._lightning_utils", "report": report}
    with traceml.Experiment("capture", backend=["jsonl"]):
        report({"loss": 0.5, "nested": {"rate": 0.25}})
        exec("report({'loss': 0.5})", callback)  # Lightning has logged it

    report({"loss": 9.0})
    traceml.shutdown()
    print(json.dumps({"put_back": vars(LocalTrainFnUtils)["report"] is original}))
"""


def test_report(captured: RunScript) -> None:
    """Each value is captured once, under its own name, while tracking is active."""
    found = captured(SCRIPT, RAY_TRAIN_V2_ENABLED="1")

    assert [(name, value) for name, _, value in found.values()] == [("loss", 0.5), ("nested/rate", 0.25)]
    assert {row.kind for row in found.metrics} == {MetricKind.RAY}
    assert found.said["put_back"]
