"""Running jobs, as commands find them and ask their aggregator.

Runs in the process of the command. May import what `cli` may.
"""
