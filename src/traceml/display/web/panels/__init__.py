"""Sections of a run's page that show what was logged: overview, media, logs."""
