"""Checks of the open runs once a second: verdict, alerts, ranks and programs to look at from outside, hangs to end.

Runs in the aggregator. May import what `aggregator` may.
"""
