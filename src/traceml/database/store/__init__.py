"""The store of a run, one SQLite file: written and kept small by the aggregator, read by all others.

Runs in the aggregator and in readers, never in a rank. Imports `database.schema`.
"""
