"""Trainings of a run: their models, and whether the script or a library has the loop."""
