"""Documents for programs and assistants: JSON Schemas of what commands print, and the tools of `traceml mcp`.

Runs in the process of the command. May import what `cli` may.
"""
