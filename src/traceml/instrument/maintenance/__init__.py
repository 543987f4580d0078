"""Work between steps, from time to time: searches and reports, and the measured cost of the hooks.

Runs in the rank. May import what `instrument` may.
"""
