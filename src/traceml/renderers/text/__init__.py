"""Terminal output: verdict card, live panel, tables of `traceml top`, comparisons, trace analyses.

Runs in the CLI and the supervisor. Makes rich text from view models; may import `renderers`, `runs` and `diagnosis`.
"""
