"""Findings about memory: growth, pressure, and differences between ranks.

Runs in the aggregator and in readers. Imports kinds, findings, `diagnosis.facts`, `diagnosis.steps` and `database`.
"""
