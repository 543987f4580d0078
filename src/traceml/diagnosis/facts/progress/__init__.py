"""Progress of the ranks, as rows and snapshots tell it.

Gathered in the aggregator and by readers. Imports `database`.
"""
