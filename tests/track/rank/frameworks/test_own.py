"""Collectors and frameworks of the user's own: from the script itself, and names that mean nothing."""

from __future__ import annotations

from tests.track.rank.frameworks.conftest import RunScript
from traceml.database.schema import MetricKind


def test_plugins_of_the_script_itself(captured: RunScript) -> None:
    """A collector of the script reads there, a framework of the script is patched; an unknown name is only told."""
    found = captured(
        """
        import json, logging, os, signal, time
        import traceml
        from traceml.track.plugins.interfaces import CollectorInterface, FrameworkInterface
        from traceml.track.plugins.metric import Metric
        from traceml.track.plugins.plugin_base import CollectorPlugin, FrameworkPlugin
        from traceml.track.plugins.plugin_metadata import PluginMetadata

        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("traceml").addHandler(handler)

        class Engine:
            def report(self, value):
                return value * 2

        class Capture(FrameworkInterface):
            def patch(self, orchestrator):
                self.original = Engine.report

                def report(engine, value):
                    result = self.original(engine, value)
                    orchestrator.route_metric(Metric("engine", value, 7))
                    return result

                Engine.report = report

            def unpatch(self):
                Engine.report = self.original

        @traceml.register
        class OwnFramework(FrameworkPlugin):
            @classmethod
            def get_metadata(cls):
                return PluginMetadata(name="engine", version="1")

            def create_framework(self):
                return Capture()

        class Depth(CollectorInterface):
            interval = 0.1
            readings = 0

            def collect(self):
                Depth.readings += 1
                blocks = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
                facts = {"pid": os.getpid(), "password": "hunter2", "blocks": blocks}
                return [Metric("depth", float(len(said))), facts]

        @traceml.register
        class OwnCollector(CollectorPlugin):
            @classmethod
            def get_metadata(cls):
                return PluginMetadata(name="depth", version="1")

            def create_collector(self, config):
                return Depth()

        original = Engine.report
        traceml.init(backend=["jsonl"], frameworks=["engine", "enjine"], collectors=["depth"])
        assert Engine().report(21.5) == 43.0
        while Depth.readings < 3:
            time.sleep(0.02)
        traceml.shutdown()
        print(json.dumps({"pid": os.getpid(), "put_back": Engine.report is original, "said": said}))
        """
    )
    assert ("engine", 7, 21.5) in found.values(MetricKind.USER)
    assert len([row for row in found.metrics if row.name == "depth"]) >= 2
    facts = next(row["facts"] for row in found.logged["collected"] if row["name"] == "depth")
    assert facts == {"pid": found.said["pid"], "password": "[masked:secret]", "blocks": True}
    assert found.said["put_back"]
    assert any("Did you mean 'engine'" in text for text in found.said["said"])
