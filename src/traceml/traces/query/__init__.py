"""Questions about traces: filters, fields, grouping, results, the overview; in one process or on a Dask cluster.

Runs where traces are analyzed: in the command, a notebook, or a Dask worker. Imports `reader` and `aggregate`.
"""
