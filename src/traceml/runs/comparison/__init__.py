"""Comparison of two runs: its types, what became slower, and whether that is significant.

Runs in the command and the page's process. Imports `runs.report`, `runs.rows`, `diagnosis` and `database`.
"""
