"""The interfaces and metadata of plugins, and the registry that turns a name into one.

Runs in every process that names a plugin: the rank, its collectors, delivery, the aggregator, `traceml sync` and
`traceml doctor`. It imports no other part of `track`.
"""
