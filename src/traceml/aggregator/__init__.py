"""Aggregator: stores every rank's rows once, diagnoses them live, and detects dead ranks.

Runs in one process per host or job (`traceml serve`). May import `diagnosis`, `track`, `transport` and `database`.
"""
