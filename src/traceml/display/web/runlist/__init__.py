"""Parts of the list of runs: its query, its table, and changes of the runs that are picked.

Runs in the page's process. May import what `display` may.
"""
