"""Code that two processes of a launch share: channel, tunnel, payloads, log records, process clean-up.

`signals` and `process_cleanup` also run in the zygote and the worker.
May import the leaves and `database` only.
"""
