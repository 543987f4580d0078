"""Interfaces for programs and assistants: JSON Schemas of all documents, and the server of `traceml mcp`.

Runs in the process of the command. May import what `cli` may.
"""
