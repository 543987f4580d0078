"""Options of commands: parsing, ranges of numbers, options that commands share, examples in the help.

Runs in the process of the command. May import what `cli` may.
"""
