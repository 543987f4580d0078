"""`traceml profile`: asks ranks of a running job for traces, and merges them.

Runs in the process of the command. May import what `cli` may.
"""
