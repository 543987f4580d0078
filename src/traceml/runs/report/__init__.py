"""The report of a run: its types, what fills each section, and the file.

Made in the report's process, in commands and in notebooks. Imports `runs.rows`, `diagnosis`, `track` and `database`.
"""
