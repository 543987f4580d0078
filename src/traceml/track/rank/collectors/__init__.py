"""Collectors of git, environment and system facts, and the process in which they run.

`collector_process` runs in the rank and starts `collector_main`, a child of the rank in which collectors read.
"""
