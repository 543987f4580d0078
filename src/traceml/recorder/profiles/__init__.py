"""A rank that is profiled on request: trace and sampled calls, sent in pieces.

Runs in the rank, on the recorder's thread. May import what `recorder` may.
"""
