"""Relay of a host's ranks to another aggregator: `upstream` runs in that of the host, `relayed_hosts` in the center,
the aggregator of all hosts.

May import what `aggregator` may.
"""
