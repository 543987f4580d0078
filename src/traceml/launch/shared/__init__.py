"""Code that two or more processes of a launch share: channel, tunnel, payloads, log records, process clean-up.

Process: each module names its own, `Process:`, as the last line of its docstring.
May import the leaves and `database` only.
"""
