"""Output devices for what `renderers` makes: terminal, web page, monitoring systems, notebook, report files.

`terminal/` runs in the supervisor and in `traceml top`, `web/` and `monitoring/` in a process each, `notebook` in the
user's kernel, `report_files` in the supervisor and the CLI. May import `renderers`, `runs` and `diagnosis`.
"""
