"""All text on a terminal: verdict card, live panel, tables of `traceml top`, comparisons, trace analyses, Markdown.

Runs in the CLI and the supervisor. Makes rich text from view models; may import `renderers`, `runs` and `diagnosis`.
"""
