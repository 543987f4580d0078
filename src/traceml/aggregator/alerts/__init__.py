"""Alerts: commands and webhooks that are notified of findings.

Runs in the aggregator. May import what `aggregator` may.
"""
