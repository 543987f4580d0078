"""Alerts: commands and webhooks that are notified of findings."""
