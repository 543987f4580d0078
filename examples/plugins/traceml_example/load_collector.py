"""A collector: the machine's load, every so often."""

from __future__ import annotations

import os

from traceml import CollectorInterface, CollectorPlugin, Metric, PluginMetadata


class LoadCollector(CollectorInterface):
    """Reads the load averages; runs in a process beside the training, so it may take its time."""

    interval = 0.2  # seconds; None would read once

    def collect(self):
        one, five, fifteen = os.getloadavg()
        return [Metric("load/1min", one), Metric("load/5min", five), Metric("load/15min", fifteen)]


class LoadPlugin(CollectorPlugin):
    @classmethod
    def get_metadata(cls):
        return PluginMetadata(name="load", version="0.1.0", description="the machine's load averages")

    def create_collector(self, _config):
        return LoadCollector()
