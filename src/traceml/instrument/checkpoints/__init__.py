"""Saving and loading of checkpoints: their time, the line that saves, their folder, and the step that they hold.

Runs in the rank. May import what `instrument` may.
"""
