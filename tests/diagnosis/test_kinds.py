"""Kinds of finding: headline and severity."""

from __future__ import annotations

import ast

import pytest

from tests.renderers.reports import finding
from tests.source_tree import nodes_of, source_files
from traceml.diagnosis.kinds import Kind, Severity

_SEVERITIES = {f"Severity.{each.name}" for each in Severity}


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (finding("HEALTHY"), "No bottleneck found"),
        (
            finding("INPUT_STRAGGLER", ranks=[1], phase="input_wait", cost_share=0.846),
            "Rank 1 is slow in data loading: the others wait, 85 % of step time",
        ),
        (
            finding("STRAGGLER", ranks=[1, 3], phase="augment", cost_share=0.3),
            "Ranks 1, 3 are slow in phase 'augment': the others wait, 30 % of step time",
        ),
        (
            finding("COMPUTE_STRAGGLER", phase="forward", cost_share=0.3, evidence={"imbalance_ms": 30.0}),
            "All ranks take turns being slow in forward: 30 % of step time",
        ),
        (
            finding("INPUT_STRAGGLER", ranks=[1], phase="input_wait", cost_share=0.3, evidence={"is_hidden": True}),
            "Rank 1 is slow in data loading, hidden by other slow ranks: 30 % of step time",
        ),
        (
            finding("COMM_BOUND", phase="comm", cost_share=0.5),
            "Communication between ranks slows training down: 50 % of step time",
        ),
        (
            finding("COMM_BOUND", phase="comm", cost_share=0.5, evidence={"waits_for": "messages"}),
            "The ranks wait for messages of each other: 50 % of step time",
        ),
        (
            finding("COMM_BOUND", phase="comm", cost_share=0.5, evidence={"waits_for": "answers"}),
            "Training waits for functions in other processes (RPC): 50 % of step time",
        ),
        (
            finding("COMM_BOUND", phase="comm", cost_share=0.9, evidence={"ranks_without_steps": [1]}),
            "The ranks that train wait for others: 90 % of step time",
        ),
        (finding("INPUT_BOUND", cost_share=0.4), "Training waits for data: 40 % of step time"),
        (finding("COMPUTE_BOUND", phase="backward"), "The model's own compute limits this run, most of it in backward"),
        (
            finding("RESIDUAL_HEAVY", phase="other", cost_share=0.4),
            "40 % of step time is spent in code outside the known phases",
        ),
        (
            finding("RANK_LOST", ranks=[1], phase="forward", evidence={"signal": 9, "step": 37}),
            "Rank 1 ended by SIGKILL at step 37, in forward",
        ),
        (
            finding("RANK_LOST", ranks=[0], evidence={"exception": "ValueError: no\nmore"}),
            "Rank 0 ended by ValueError",
        ),
        (finding("RANK_LOST", ranks=[2], evidence={"code": 3}), "Rank 2 ended with exit code 3"),
        (finding("RANK_LOST"), "All ranks ended"),
        (
            finding("SOME_NEW_KIND", ranks=[2], phase="comm"),
            "Some new kind on rank 2, in communication (unknown to this version of traceml)",
        ),
    ],
)
def test_headline(verdict, words):
    """Each kind, also one that is not known here, has a plain sentence with rank, phase and share."""
    assert verdict.headline == words


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_has_a_headline(kind):
    """A headline is one sentence without a full stop, and no template is left open."""
    headline = finding(kind, ranks=[1], phase="forward", cost_share=0.2).headline

    assert headline[0] == headline[0].upper()
    assert not set("{}.") & set(headline)


def test_severity_follows_the_cost_unless_declared():
    """Timing kinds weigh by their cost; others always the same."""
    assert Kind.INPUT_BOUND.severity_for(0.12) is Severity.WARNING
    assert Kind.INPUT_BOUND.severity_for(0.60) is Severity.CRITICAL
    assert Kind.RANK_LOST.severity_for(0.0) is Severity.CRITICAL
    assert Kind.HEALTHY.severity_for(1.0) is Severity.INFO


def test_no_rule_repeats_a_severity():
    """A finding's severity is declared with its kind, or follows from its cost or from facts."""
    constant = [
        f"{path.name}:{node.lineno}"
        for path in source_files()
        for node in nodes_of(path, ast.Call)
        if getattr(node.func, "id", "") == "Finding"
        for given in node.keywords
        if given.arg == "severity" and ast.unparse(given.value) in _SEVERITIES
    ]

    assert constant == []


def test_no_other_module_spells_a_kind():
    """A kind is compared as a member of `Kind`: a text would outlive a renamed kind unnoticed."""
    kinds = {str(each) for each in Kind}
    spelled = [
        f"{path.name}:{node.lineno}: {node.value}"
        for path in source_files()
        if path.name != "kinds.py"
        for node in nodes_of(path, ast.Constant)
        if isinstance(node.value, str) and node.value in kinds
    ]

    assert spelled == []


def test_an_unknown_kind_is_no_member():
    """A kind of a newer traceml is accepted by its name, and is not in the list of kinds."""
    assert Kind("SOME_NEW_KIND") == "SOME_NEW_KIND"
    assert "SOME_NEW_KIND" not in list(Kind)
