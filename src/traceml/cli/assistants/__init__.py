"""Interfaces for programs and assistants: JSON Schemas of all documents, and the server of `traceml mcp`."""
