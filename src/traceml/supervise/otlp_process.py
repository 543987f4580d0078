"""Handle of the process that sends metrics and spans to an OpenTelemetry collector.

Process: aggregator, started by `traceml serve`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from traceml.installation import install_command
from traceml.loopback import is_on_this_machine
from traceml.settings import Config
from traceml.supervise.processes import spawn_server
from traceml.supervise.restarting_process import RestartingProcess

__all__ = ["OtlpProcess", "otlp_beside", "otlp_endpoint"]

_NICE = 10
# For the last spans. A collector that is down must not hold up the end of a job: the process ends by itself later.
_END_S = 2.0
_VARIABLES = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
)

_log = logging.getLogger("traceml")


class OtlpProcess(RestartingProcess):
    """The exporter of this process's runs. A context manager: its exit has it send the last spans."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config

    def __repr__(self) -> str:
        return "<OTLP process>"

    def spawn_process(self) -> subprocess.Popen[bytes]:
        """Start the exporter."""
        config = self._config
        options = {"endpoint": config.otlp_endpoint, "runs_dir": str(config.runs_dir.absolute()), "nice": _NICE}
        return spawn_server("traceml.display.monitoring", {**options, "owner": os.getpid(), "mask": config.mask})

    def close(self) -> None:
        """Have it send the last spans, and end; it may take some seconds longer than this call."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return

        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)


def otlp_endpoint(config: Config, environ: Mapping[str, str]) -> str | None:
    """Return the collector's address as far as it is asked for; None: nothing is sent."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None

    return config.otlp_endpoint or next((environ[name] for name in _VARIABLES if environ.get(name)), None)


@contextlib.contextmanager
def otlp_beside(config: Config, environ: Mapping[str, str]) -> Iterator[OtlpProcess | None]:
    """Send metrics and spans during the block, if that is asked for and possible; else log why not."""
    endpoint = otlp_endpoint(config, environ)
    if endpoint is None or (why := _obstacle(config, endpoint)):
        if endpoint is not None:
            level = logging.DEBUG if config.otlp_endpoint is None else logging.WARNING  # not asked of us in particular
            _log.log(level, "nothing is sent to the OpenTelemetry collector at %s: %s", endpoint, why)

        yield None
        return

    with OtlpProcess(config) as process:
        try:
            process.start()
        except OSError as error:
            _log.warning("nothing is sent to the OpenTelemetry collector at %s: %s", endpoint, error)

        yield process


def _obstacle(config: Config, endpoint: str) -> str:
    """Return why nothing can be sent; "" if it can."""
    if config.local_only and not is_on_this_machine(endpoint):
        return "local_only is set"

    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter.otlp.proto.http") is None:
        return f"its library is not installed: {install_command('otlp')}"

    return ""
