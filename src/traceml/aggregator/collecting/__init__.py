"""Uncommitted changes, packages and variables of runs that are only traced, read while they train.

Runs in the aggregator, and in a process that it starts. May import what `aggregator` may.
"""
