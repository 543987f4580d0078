"""Filters and masks of each experiment of a run for one tracker, as its announcement states them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from traceml.privacy import Masker
from traceml.settings import Config
from traceml.track.delivery.delivery_plan import PlannedExperiment, restricted
from traceml.track.filters import DeliveryFilter

__all__ = ["ExperimentRules", "RulesOfExperiments"]


class ExperimentRules(NamedTuple):
    """Rules by which one experiment is delivered."""

    filters: DeliveryFilter
    masker: Masker
    local_only: bool  # whether nothing of it may leave this machine


class RulesOfExperiments:
    """Rules of the experiments of one run for one backend.

    Args:
        config: settings of what no experiment has announced.
        current: current settings, which restrict those of each experiment further; None if there are none.
        options: options of the backend, in place of those of the experiments; None if there are none.

    Attributes:
        masked: number of values of each kind that were masked, for all experiments.
    """

    def __init__(self, backend: str, config: Config, current: Config | None, options: Mapping[str, Any] | None) -> None:
        self._backend, self._config, self._current, self._options = backend, config, current, options
        self._known: dict[str, tuple[dict[str, Any], ExperimentRules]] = {}  # with the announcement that they are of
        self.masked: Counter[str] = Counter()

    def of(self, experiment: PlannedExperiment) -> ExperimentRules:
        """Return the rules of an experiment.

        Raises:
            PluginError: one of its options is invalid.
            SettingsError: one of its patterns is.
        """
        row, rules = self._known.get(experiment.key, (None, None))
        if rules is None or row is not experiment.row:
            rules = self._made(experiment)
            self._known[experiment.key] = experiment.row, rules

        return rules

    def _made(self, experiment: PlannedExperiment) -> ExperimentRules:
        config = experiment.settings() if experiment.begun_on else self._config
        if experiment.begun_on and self._current is not None:
            config = restricted(config, self._current)

        options = experiment.options(self._backend) if self._options is None else self._options
        masker = Masker(config.mask)
        masker.counts = self.masked
        return ExperimentRules(DeliveryFilter.of(config.include, config.exclude, options), masker, config.local_only)
