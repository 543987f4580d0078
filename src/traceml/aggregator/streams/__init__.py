"""Streams: what one process of a rank sends, from its admission to an attempt of the run until its end.

Runs in the aggregator. May import what `aggregator` may.
"""
