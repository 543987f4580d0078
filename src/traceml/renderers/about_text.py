"""Facts to repeat a run, as pairs of name and text, for report and page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from traceml.formatting import bytes_text, count_text, printable, shell_joined
from traceml.renderers.views import RunView
from traceml.runs.about import About, package_versions

__all__ = ["about_facts", "machine_text", "map_text", "nothing_logged"]

_PACKAGES = ("torch", "numpy", "lightning", "pytorch-lightning", "transformers", "accelerate", "deepspeed", "ray",
             "mlflow", "wandb", "clearml", "aim", "tensorboard", "trackio")  # fmt: skip
_HOSTS = 16
_COLLECTED = {"git": "uncommitted changes", "environment": "packages, variables", "system": "machine"}


def about_facts(view: RunView, about: About) -> list[tuple[str, str]]:
    """Return command, source, versions, machine and model; what is not known is left out."""
    git, process = about.git, about.process
    argv = process.get("argv")
    rows = [
        ("command", _runnable(shell_joined(map(str, argv)) if argv else view.run.command_line)),
        ("folder", process.get("folder")),
        ("git commit", _commit(git)),
        ("git branch", git.get("branch")),
        ("git remote", git.get("remote")),
        ("python", process.get("python")),
        ("interpreter", process.get("executable")),
        ("traceml", process.get("traceml") or view.report.traceml_version),
        ("packages", _packages(about)),
        ("ranks", f"{count_text(view.run.world_size)} on {_hosts(view.run.hosts)}"),
        ("machine", machine_text(about.system)),
        ("not read", _not_read(about)),
        *((name, map_text(facts)) for name, facts in _training(about)),
    ]
    return [(name, printable(str(value), lines=True)) for name, value in rows if value]


def nothing_logged(about: About, names: str, otherwise: str) -> str:
    """Return why there is nothing of what a training may have logged.

    Args:
        names: what is missing, as `Parameters`.
        otherwise: what to say of a run whose rows are all here.
    """
    stay = "stay with the aggregator of the host that logged them: its page and its reports have them."
    return f"{names} {stay}" if about.relayed else otherwise


def machine_text(system: Mapping[str, Any]) -> str:
    """Return processor, cores, memory, devices and system of a host."""
    memory = system.get("memory_bytes")
    parts = [system.get("cpu"), f"{system['cores']} cores" if system.get("cores") else None]
    parts += [bytes_text(memory) if memory else None, ", ".join(map(str, system.get("gpus") or ())), system.get("os")]
    return ", ".join(str(part) for part in parts if part)


def _runnable(command: str) -> str:
    """Return a command that a shell takes: a script alone is not found by it."""
    return f"python {command}" if command.partition(" ")[0].endswith(".py") else command


def _hosts(hosts: Sequence[str]) -> str:
    more = len(hosts) - _HOSTS
    return ", ".join(hosts[:_HOSTS]) + (f" and {count_text(more)} more" if more > 0 else "")


def _training(about: About) -> Iterable[tuple[str, Mapping[str, Any]]]:
    return ("model", about.model), ("data loader", about.loader), ("optimizer", about.optimizer)


def _commit(git: Mapping[str, Any]) -> str | None:
    commit = git.get("commit")
    return f"{commit}{' with uncommitted changes' if git.get('dirty') else ''}" if commit else None


def _not_read(about: About) -> str | None:
    """Return what was not read during the training though it should have been, and why; None if unknown."""
    return about.not_read and f"{', '.join(_COLLECTED[name] for name in about.unread)}: {about.not_read}"


def _packages(about: About) -> str | None:
    """Return the most important versions; the store has all."""
    installed = package_versions(about.environment)
    return ", ".join(f"{name} {installed[name]}" for name in _PACKAGES if name in installed) or None


def map_text(facts: Mapping[str, Any]) -> str:
    """Return a map as `name value, name value`, without what is None."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
