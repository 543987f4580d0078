"""Pure functions: windows of steps in, findings out."""

from __future__ import annotations

from traceml.diagnosis.findings import Finding, Kind, Severity
from traceml.diagnosis.job_facts import JobFacts, JobFactsBuilder, LoaderFacts, RankExit
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.window import StepWindow, Window, slots_for

__all__ = [
    "Finding",
    "JobFacts",
    "JobFactsBuilder",
    "Kind",
    "LoaderFacts",
    "RankExit",
    "Severity",
    "StepWindow",
    "Window",
    "diagnose",
    "slots_for",
]
