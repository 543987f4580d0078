"""Parts of the list of runs: its query, its table, and changes of the runs that are selected.

The table is written twice, for a browser (`runs_table.js`) and as the HTML of the first paint (`RunsTable.html`):
`tests/display/web/test_pages.py` compares both.

Runs in the page's process. May import what `display` may.
"""
