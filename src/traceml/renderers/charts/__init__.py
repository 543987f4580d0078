"""Charts as ECharts options, and as SVG where there is no browser.

Runs in the page's process, the supervisor and notebooks. May import the view models and `runs`.
"""
