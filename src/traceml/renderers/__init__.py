"""View models of a run (`views`), and how they look: as text, as charts, as HTML. `display` puts them on devices.

Runs in the supervisor, the CLI, the page's process and notebooks, never in a rank. Reads and writes no files but the
report it is given; may import `runs`, `whatif`, `diagnosis` and `database`.
"""
