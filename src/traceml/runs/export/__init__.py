"""Exports of a run: a trace (pfw, Perfetto) or tables (Parquet, CSV).

Runs in the process that asks for them: a command or a notebook. Imports `runs`, `traces` and `database`.
"""
