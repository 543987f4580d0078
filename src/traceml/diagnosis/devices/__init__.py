"""Findings about devices: faults that they report, lowered clocks, and programs of others that compute on them.

Runs in the aggregator and in readers. Imports kinds, findings, `diagnosis.facts`, `diagnosis.steps` and `database`.
"""
