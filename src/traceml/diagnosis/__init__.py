"""Pure functions: windows of steps in, findings out."""

from __future__ import annotations

from traceml.diagnosis.facts import Facts, FactsBuilder, LoaderFacts, RankExit
from traceml.diagnosis.findings import Finding, Kind, Severity
from traceml.diagnosis.rules import diagnose
from traceml.diagnosis.window import StepWindow, Window, slots_for

__all__ = [
    "Facts",
    "FactsBuilder",
    "Finding",
    "Kind",
    "LoaderFacts",
    "RankExit",
    "Severity",
    "StepWindow",
    "Window",
    "diagnose",
    "slots_for",
]
