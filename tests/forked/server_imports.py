"""What a process that forks imports once for all of its children."""

from __future__ import annotations

__all__ = ["BY_DEFAULT", "OWN", "PLAIN", "SHARED", "SMALL", "WITHHELD"]

# Imports that cost much, by kind of server; of each, the ones that it needs. torch imports `_dynamo` only when an
# optimizer is made.
_TORCH: dict[str, tuple[str, ...]] = {
    "numpy": (),
    "numpy.typing": ("numpy",),
    "pydantic": (),
    "pydantic_settings": ("pydantic",),
    "torch": ("numpy",),
    "torch._dynamo": ("torch",),
    "torch.distributed.run": ("torch",),
}
_LIGHTNING = {"lightning.pytorch": ("torch", "torch._dynamo"), "pytorch_lightning": ("torch", "torch._dynamo")}
SHARED = {"torch": _TORCH, "lightning": _TORCH | _LIGHTNING}
# Of other kinds: what most of ours import.
BY_DEFAULT = {"numpy": (), "numpy.typing": ("numpy",)}
# Of ours, the commands and what writes reports, with all that they import. What runs in ranks is imported anew there.
OWN = ("traceml.cli.run", "traceml.cli.serve", "traceml.display.report_files")
# Those that need not be hidden: of the standard library, small ones, and what trackers import. Some trackers start
# threads when they are imported, or read variables that tests set; of these, only what they need is imported.
SMALL = (
    "argparse", "asyncio", "concurrent.futures.thread", "ctypes", "difflib", "html", "importlib.metadata", "mmap",
    "msgpack", "msgspec", "psutil", "rich.console", "rich.table", "sqlite3", "ssl", "statistics", "tempfile",
    "urllib.request", "zstandard",
)  # fmt: skip
PLAIN = {
    "aim": ("aim", "alembic.command", "alembic.config"),
    "clearml": ("PIL.Image", "attr", "furl", "jsonschema", "requests", "yaml"),
    "mlflow": ("aiohttp", "alembic", "fastapi", "graphene", "mlflow.store.tracking.sqlalchemy_store"),
    "trackio": ("gradio_client", "huggingface_hub"),
    "wandb": ("wandb",),
}
# Optional modules of trackers that start threads when they are imported. MLflow has no support for it then.
WITHHELD = {"mlflow": ("polars",)}
