"""Progress of the ranks, as rows and snapshots show it.

Gathered in the aggregator and by readers. Imports `database`.
"""
