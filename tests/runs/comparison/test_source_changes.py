"""Code, packages and variables of two runs."""

from __future__ import annotations

import msgspec
import pytest

from tests.renderers.reports import slow_rank
from traceml.runs.comparison.source_changes import package_changes, source_remarks, variable_changes
from traceml.runs.report.report_types import Report, SourceSection

PACKAGES = {"numpy": "2.1.0", "torch": "2.12.0", "zipp": "3.0"}
VARIABLES = {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7", "PATH": "/bin"}


def report(commit="a" * 40, *, dirty=False, **source) -> Report:
    """Return the report of a run with facts about its code."""
    made = slow_rank()
    made.run.commit, made.run.dirty = commit, dirty
    made.source = msgspec.structs.replace(SourceSection(packages=PACKAGES, variables=VARIABLES), **source)
    return made


def test_versions_that_differ_those_that_compute_first():
    """Also packages that one run lacks."""
    other = report(packages={"aiohttp": "1.0", "numpy": "2.1.0", "torch": "2.13.0", "zipp": "3.0"})

    changed = package_changes(report(), other)

    assert [(row.name, row.a, row.b) for row in changed] == [("torch", "2.12.0", "2.13.0"), ("aiohttp", None, "1.0")]


def test_variables_that_tune_libraries():
    """Those that name the job, the rank or a place differ without meaning anything."""
    other = report(variables={"OMP_NUM_THREADS": "4", "SLURM_JOB_ID": "8", "PATH": "/usr/bin", "NCCL_DEBUG": "INFO"})

    changed = variable_changes(report(), other)

    assert [(row.name, row.a, row.b) for row in changed] == [
        ("NCCL_DEBUG", None, "INFO"),
        ("OMP_NUM_THREADS", "1", "4"),
    ]


def test_what_a_run_does_not_know_is_no_difference():
    """Neither packages and variables that were not read, nor the commit of a script outside a repository."""
    unknown = report(commit=None, dirty=None, packages={}, variables={})

    assert package_changes(report(), unknown) == package_changes(unknown, report()) == []
    assert variable_changes(report(), unknown) == []
    assert list(source_remarks(report(), unknown, "B")) == []
    assert list(source_remarks(report(), report(), "B")) == []


def test_each_kind_of_difference_is_one_sentence():
    """A few of many, commits by their first digits."""
    packages = {**{f"p{number}": "1" for number in range(6)}, "torch": "2.13.0"}
    other = report("b" * 40, packages=packages, variables={"OMP_NUM_THREADS": "4"})

    commit, versions, tuning = source_remarks(report(), other, "C")

    assert commit == "commit: aaaaaaaaaa in A, bbbbbbbbbb in C"
    assert versions.startswith("packages: torch 2.12.0 in A, 2.13.0 in C; numpy 2.1.0 in A, none in C; p0 none in A, 1")
    assert versions.endswith("; 5 others in --json")
    assert tuning == "variables: OMP_NUM_THREADS 1 in A, 4 in C"


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        ({"dirty": False}, {"dirty": True, "diff": "+x"}, True),
        ({"dirty": True, "diff": "+x"}, {"dirty": True, "diff": "+y"}, True),
        ({"dirty": True, "diff": "+x"}, {"dirty": True, "diff": "+x"}, False),
        ({"dirty": False}, {"dirty": True}, False),  # the diff was not read
        ({"dirty": False}, {"dirty": None}, False),
    ],
)
def test_uncommitted_changes(a, b, told):
    """They are compared where both are known."""
    remarks = list(source_remarks(report(**a), report(**b), "B"))

    assert remarks == (["uncommitted changes: those of A are not those of B"] if told else [])
