"""Sums over the columns of events: statistics by group, self time, overlap, pairs of begin and end, external sorting.

Runs where traces are analyzed: in the command, a notebook, or a Dask worker. Imports numpy and `traces.native` only.
"""
