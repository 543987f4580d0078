"""Uncommitted changes, packages and variables of runs that only are traced, read beside their training.

Runs in the aggregator, and in a process that it starts. May import what `aggregator` may.
"""
