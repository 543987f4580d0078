"""Facts other than the steps: loaders, hosts, exits, wall time, limits, sampled lines. Rules judge by them.

Gathered in the aggregator and by readers. Imports `database`.
"""
