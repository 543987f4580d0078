"""Ranks of this host whose recorder does not answer: their snapshots are taken by another process.

Runs in the aggregator. May import what `aggregator` may.
"""
