"""Capture of TensorBoard's `SummaryWriter`, torch's and tensorboardX's.

Scalars, groups of scalars, texts, images, figures, histograms and hyperparameters are captured; video, audio, meshes,
embeddings, graphs and curves are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from traceml.clock import own_time as time
from traceml.database.schema import MetricKind
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.track.plugins.interfaces import OrchestratorInterface
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata
from traceml.track.rank.frameworks.framework_capture import FrameworkCapture, is_captured
from traceml.track.rank.media_encoding import histogram_of

__all__ = ["TensorBoardCapture"]

_BINS = 64


class TensorBoardCapture(FrameworkCapture):
    """Captures `SummaryWriter`: `walltime` is kept, and values in full, not as the float32 of event files."""

    metadata = PluginMetadata(name="tensorboard", version="1", description="SummaryWriter of torch and tensorboardX")
    kind = MetricKind.TENSORBOARD

    def targets(self) -> Mapping[str, Callable[[ModuleType], None]]:
        """Return the modules of both writers."""
        return {"torch.utils.tensorboard.writer": self._patch, "tensorboardX.writer": self._patch}

    def _patch(self, module: ModuleType) -> None:
        writer = module.SummaryWriter
        convert = _converter(module.__name__)
        self.around(writer, "add_scalar", _scalar, self._values)
        self.around(writer, "add_scalars", _scalars, self._values)
        self.around(writer, "add_text", _text, _given_to("log_text"))
        self.around(writer, "add_histogram", _histogram, _given_to("log_histogram"), is_number=False)
        self.around(writer, "add_histogram_raw", _histogram_raw, _given_to("log_histogram"), is_number=False)
        # Figures and lists of figures go through add_image(s), and the metrics of add_hparams through add_scalar.
        self.around(writer, "add_image", convert, _given_to("log_image"), is_number=False)
        self.around(writer, "add_images", convert, _given_to("log_image"), is_number=False)
        self._patch_hparams(writer)

    @uncounted
    def _patch_hparams(self, writer: Any) -> None:
        """Capture the parameters of `add_hparams`; it writes its metrics through `add_scalar` of another writer."""
        original = writer.add_hparams

        def add_hparams(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            orchestrator = self._orchestrator
            if orchestrator is not None and not is_captured():
                with self.guard("add_hparams"):
                    orchestrator.log_params(_hparams(*args, **kwargs))

            return result

        self._patches.wrap(writer, "add_hparams", add_hparams)

    def _values(self, orchestrator: OrchestratorInterface, call: tuple[Mapping[str, Any], int | None, float]) -> None:
        values, step, timestamp = call
        for name, value in values.items():
            orchestrator.route_metric(Metric(name, value, step, timestamp, kind=self.kind))


# --- calls, with the arguments that the writers declare ----------------------------------------------------------


def _scalar(
    _writer: Any,
    tag: str,
    scalar_value: Any,
    global_step: Any = None,
    walltime: float | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Mapping[str, Any], int | None, float]:
    return {tag: scalar_value}, _step(global_step), _time(walltime)


def _scalars(
    _writer: Any,
    main_tag: str,
    tag_scalar_dict: Mapping[str, Any],
    global_step: Any = None,
    walltime: float | None = None,
) -> tuple[Mapping[str, Any], int | None, float]:
    return {f"{main_tag}/{tag}": value for tag, value in tag_scalar_dict.items()}, _step(global_step), _time(walltime)


def _text(
    _writer: Any, tag: str, text_string: str, global_step: Any = None, walltime: float | None = None
) -> tuple[str, str, int | None, float]:
    return tag, text_string, _step(global_step), _time(walltime)


def _histogram(
    _writer: Any,
    tag: str,
    values: Any,
    global_step: Any = None,
    bins: Any = "tensorflow",
    walltime: float | None = None,
    max_bins: int | None = None,
) -> tuple[str, Sequence[float], Sequence[float], int | None, float]:
    """Count now: the values may change after the call. TensorBoard's 1,500 default bins become 64."""
    numpy = sys.modules["numpy"]
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()

    del max_bins
    array = numpy.asarray(values, dtype=float).reshape(-1)
    if isinstance(bins, str) and bins == "tensorflow":
        counts, edges, _ = histogram_of(array, _BINS)
    else:  # the writer has counted them in this way
        counts, edges = (found.tolist() for found in numpy.histogram(array[numpy.isfinite(array)], bins=bins))

    return tag, counts, edges, _step(global_step), _time(walltime)


def _histogram_raw(
    _writer: Any,
    tag: str,
    min: float,  # noqa: A002 - the writers' own name
    max: float,  # noqa: A002, ARG001
    num: float,  # noqa: ARG001
    sum: float,  # noqa: A002, ARG001
    sum_squares: float,  # noqa: ARG001
    bucket_limits: Any,
    bucket_counts: Any,
    global_step: Any = None,
    walltime: float | None = None,
) -> tuple[str, list[float], list[float], int | None, float]:
    edges = [float(min), *(float(limit) for limit in bucket_limits)]
    return tag, [float(count) for count in bucket_counts], edges, _step(global_step), _time(walltime)


def _hparams(_writer: Any, hparam_dict: Mapping[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
    return dict(hparam_dict)


def _converter(module: str) -> Callable[..., tuple[str, Any, int | None, float]]:
    """Return a function that converts the image of a call to pixels, as the writer does."""
    package = module.rpartition(".")[0]
    if package == "tensorboardX":
        to_array, to_rows = (
            import_module("tensorboardX.x2num").make_np,
            import_module("tensorboardX.utils").convert_to_HWC,
        )
    else:
        to_array = import_module(f"{package}._convert_np").make_np
        to_rows = import_module(f"{package}._utils").convert_to_HWC

    def image(
        _writer: Any,
        tag: str,
        img_tensor: Any,
        global_step: Any = None,
        walltime: float | None = None,
        dataformats: str | None = None,
    ) -> tuple[str, Any, int | None, float]:
        array = to_array(img_tensor)
        rows = to_rows(array, dataformats or ("CHW" if array.ndim < 4 else "NCHW"))
        scale = 1 if array.dtype == "uint8" else 255
        return tag, (rows.astype("float32") * scale).clip(0, 255).astype("uint8"), _step(global_step), _time(walltime)

    return image


def _given_to(name: str) -> Callable[[OrchestratorInterface, tuple[Any, ...]], None]:
    """Return a function that gives the values of a call to a method of the orchestrator."""
    return lambda orchestrator, call: getattr(orchestrator, name)(*call)


def _step(step: Any) -> int | None:
    return step if step is None or type(step) is int else int(step)


def _time(walltime: float | None) -> float:
    return time.time() if walltime is None else float(walltime)
