"""Exports of a run: a trace (pfw, Perfetto) or tables (Parquet, CSV).

Runs in the process of a command or a notebook. Imports `runs.report`, `runs.rows`, `diagnosis`, `traces` and
`database`.
"""
