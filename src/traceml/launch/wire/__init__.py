"""Code that two or more processes of a launch share: channel, tunnel, payloads, log records, process clean-up.

The docstring of each module names its processes.
May import the leaves and `database` only.
"""
