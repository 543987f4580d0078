"""The web page: NiceGUI behind a token, fed from the stores on disk.

`pages` has the routes. `runs_page`, `run_page` and `compare_page` are the pages, whose parts are in `runlist/`,
`run_details` and `panels/`; their charts come from `renderers/charts/`.

Runs in a process of its own, started by `traceml serve --web` or `run --live web`. May import `renderers` and `runs`.
"""
