"""Runs as objects: find, load, follow, report, compare and export them.

Used in commands, notebooks, the page's process and the process that writes a report. Imports `diagnosis`, `track`,
`traces` and `database`.
"""
