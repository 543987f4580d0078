"""Code that two processes of a launch share: channel, tunnel, payloads, log records, process clean-up.

May import the leaves and `database` only.
"""
