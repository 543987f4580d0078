"""Findings about pauses: the interpreter, the compiler, or a signal stops the training.

Runs in the aggregator and in readers. Imports kinds, findings, `diagnosis.facts`, `diagnosis.steps` and `database`.
"""
