"""Commands of `traceml runs` that change runs: remove, tag, note, archive.

Runs in the process of the command. May import what `cli` may.
"""
