"""Three plugins for traceml; see README.md."""
