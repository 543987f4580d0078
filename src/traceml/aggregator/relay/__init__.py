"""Relay of a host's ranks to another aggregator: `upstream` runs in that of the host, `relayed_hosts` in the center.

May import what `aggregator` may.
"""
