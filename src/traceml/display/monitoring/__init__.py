"""Metrics of running runs for monitoring systems: Prometheus reads them, OpenTelemetry collectors are sent them.

Runs in a separate process, started by an aggregator or a job. `active_runs` follows the runs, `metrics_server` answers
Prometheus, `otlp_exporter` sends to a collector. May import `renderers` and `runs`.
"""
