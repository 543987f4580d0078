"""Submission of a launch by the command line. Imports what `cli` imports."""
