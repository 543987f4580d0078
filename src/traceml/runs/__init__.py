"""Runs as objects: find, load, follow, report, compare and export them.

`rows` reads and sums, `report`, `comparison` and `export` are made of it. Used in commands, notebooks, the page's
process and the process that writes a report. Imports `diagnosis`, `track`, `traces` and `database`.
"""
