"""The interfaces and metadata of plugins, and the registry that turns a name into one.

Runs in every process that uses a plugin: the rank, its collectors, and delivery. It imports no other part of `track`.
"""
