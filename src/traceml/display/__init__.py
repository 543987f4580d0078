"""Output devices: terminal, web page, monitoring systems, notebook, report files.

What they show is made elsewhere: the lines of a terminal in `renderers/text/`, charts in `renderers/charts/`, the
written report page in `renderers/html/`, and figures in `runs/`. Only the layout of the web page is in `web/`.

`terminal/` runs in the supervisor and in `traceml top`, `web/` and `monitoring/` in a process each, `notebook` in the
user's kernel, `report_files` in the supervisor and the CLI. May import `renderers`, `runs`, `diagnosis` and
`database`.
"""
