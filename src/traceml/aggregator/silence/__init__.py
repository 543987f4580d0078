"""Ranks that do not answer: looked at from outside, by a process of their host.

Runs in the aggregator. May import what `aggregator` may.
"""
