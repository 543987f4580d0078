"""Sections of a run's page that show what was logged: overview, media, logs.

Runs in the page's process. May import what `display` may.
"""
