"""Saving and loading of checkpoints: their time, the line that saves, their folder, and the step that they hold."""
