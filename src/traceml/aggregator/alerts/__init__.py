"""Alerts: commands and webhooks that are told of findings."""
