"""HTML: the report page and the notebook cell, each complete without a network.

Runs in the supervisor and in the user's kernel. May import the charts, the view models and `runs`.
"""
