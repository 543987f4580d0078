"""`traceml fleet`: a run next to earlier ones of its model, and hosts that are often slow.

Runs in the process of the command. May import what `cli` may.
"""
