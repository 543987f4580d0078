"""Tracking: what the user logs, delivered to every tracker from processes of its own."""
