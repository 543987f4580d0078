"""View models of a run, and how they look as text, as charts and as HTML.

Runs in the supervisor, the CLI, the page's process and notebooks, never in a rank. Reads and writes no files but the
report it is given; may import `runs`, `diagnosis` and `database`.
"""
