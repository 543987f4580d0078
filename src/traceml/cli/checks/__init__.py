"""Checks of `traceml doctor`: this machine, trackers, other hosts.

Runs in the process of the command. May import what the command line may.
"""
