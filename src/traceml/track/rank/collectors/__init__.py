"""Collectors of git, environment and system facts, and the process in which they run.

`collector_process.py` is the handle in the rank; `collector_main.py` is the process itself, a child of the rank or of
the aggregator (`aggregator/collecting`). May import what `track.rank` may.
"""
