"""Reports that are read back, labels, and conditions over runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st

from tests.diagnosis.fabricated import Job
from tests.generated.targets import DAMAGE, TEXTS, Damage, Target, refusal
from tests.runs.fabricated_store import store_run
from traceml.errors import StoreError, UsageError
from traceml.run_folder import LABELS_NAME, REPORT_NAME
from traceml.runs.find import describe_run, list_runs
from traceml.runs.json_document import read_keys
from traceml.runs.report.report import build_report
from traceml.runs.report.report_types import MetricSection, ReportSummary, read_report
from traceml.runs.run_labels import read_labels
from traceml.runs.run_query import FIELDS, RunFields, select_runs, sort_runs

__all__ = ["TARGETS"]


@cache
def _report() -> bytes:
    with TemporaryDirectory() as folder:
        report = build_report(store_run(Path(folder, "20260101-000000-a-abcd"), Job(steps=20)))
        report.setup.params, report.metrics = {"lr": 0.1, "opt": "Adam W"}, {"loss": MetricSection(last=1.0)}
        return report.to_json().encode()


def _damaged_report(damage: Damage, folder: Path) -> None:
    """A damaged report is refused with its name; lists of runs and their fields have the run in any case."""
    run_dir = folder / "run"
    run_dir.mkdir()
    path = run_dir / REPORT_NAME
    path.write_bytes(damage.of(_report()))
    assert isinstance(refusal(lambda: read_report(path)), StoreError | None)
    read_keys(path, ReportSummary)
    (info,) = list_runs(folder)
    fields = RunFields(info)
    for name in (*FIELDS, "lr", "loss"):
        fields.value(name)

    fields.record(["lr"])


def _damaged_labels(damage: Damage, folder: Path) -> None:
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / REPORT_NAME).write_bytes(_report())
    labels = b'{"name":"x","tags":["a","b"],"note":"slow \\u00fc disk","archived":false}'
    (run_dir / LABELS_NAME).write_bytes(damage.of(labels))
    read_labels(run_dir)
    describe_run(run_dir)


@cache
def _runs() -> list[RunFields]:
    """Return runs with parameters of every type; their reports stay in memory."""
    values: list[dict[str, Any]] = [
        {"lr": 0.1, "odd": "text", "big": 10**400},
        {"lr": 1, "odd": True, "big": 1.5},
        {"lr": None, "odd": 3},
        {},
    ]
    found = []
    with TemporaryDirectory() as folder:
        for number, params in enumerate(values):
            run_dir = Path(folder, f"run-{number}")
            run_dir.mkdir()
            report = build_report(store_run(run_dir, Job(steps=5)))
            report.setup.params = params
            (run_dir / REPORT_NAME).write_bytes(report.to_json().encode())

        for info in list_runs(Path(folder)):
            fields = RunFields(info)
            fields.logged_names()  # read now: the folder goes
            found.append(fields)

    return found


def _conditions(value: tuple[str, str, bool], _folder: Path) -> None:
    """Conditions and fields of any text select and sort runs, or are refused with words."""
    conditions, name, is_reversed = value
    runs = _runs()
    assert isinstance(refusal(lambda: select_runs(runs, conditions)), UsageError | None)
    assert isinstance(refusal(lambda: sort_runs(runs, name, reverse=is_reversed)), UsageError | None)


_NAMES = st.sampled_from([*FIELDS, "lr", "odd", "big"])
_SIGNS = st.sampled_from(["<", "<=", ">", ">=", "=", "!=", "~", ":", " ", "!", "'", ","])
_VALUES = st.sampled_from(["1", "0.1", "nan", "inf", "1e999", "9" * 400, "text", "True", "", "²"])
_PARTS = st.lists(st.one_of(_NAMES, _SIGNS, _VALUES), max_size=6).map("".join)
_TERMS = st.tuples(_NAMES, _SIGNS, _VALUES).map("".join)
TARGETS = (
    Target("report", DAMAGE, _damaged_report, 40),
    Target("labels of a run", DAMAGE, _damaged_labels, 30),
    Target(
        "conditions over runs",
        st.tuples(st.one_of(TEXTS, _PARTS, _TERMS), st.one_of(_NAMES, TEXTS), st.booleans()),
        _conditions,
        100,
    ),
)
