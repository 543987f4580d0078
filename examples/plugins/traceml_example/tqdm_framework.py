"""A framework: what `tqdm` shows behind its bar becomes metrics."""

from __future__ import annotations

from numbers import Real

from traceml import FrameworkInterface, FrameworkPlugin, Metric, PluginMetadata


class TqdmFramework(FrameworkInterface):
    """Wraps `tqdm.set_postfix(loss=…)`; without a step of its own, a value gets the training step, else a count."""

    def patch(self, orchestrator):
        from tqdm import std

        self.bar, self.original = std.tqdm, std.tqdm.set_postfix
        original = self.original

        def set_postfix(self, ordered_dict=None, refresh=True, **kwargs):
            result = original(self, ordered_dict, refresh, **kwargs)  # the original first, and its result is returned
            for name, value in {**(ordered_dict or {}), **kwargs}.items():
                if isinstance(value, Real):
                    orchestrator.route_metric(Metric(name, value))

            return result

        self.bar.set_postfix = set_postfix

    def unpatch(self):
        self.bar.set_postfix = self.original


class TqdmPlugin(FrameworkPlugin):
    @classmethod
    def get_metadata(cls):
        return PluginMetadata(name="tqdm", version="0.1.0", description="values shown behind tqdm's bar")

    def create_framework(self):
        return TqdmFramework()
