"""Help on commands beyond their options: examples, and completion in the shell.

Runs in the process of the command. May import what `cli` may.
"""
