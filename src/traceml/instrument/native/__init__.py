"""The hot path of the step clock in C: the fields of the open step, and the hooks around the calls of a loop.

Runs in the rank. May import what `instrument` may.
"""
