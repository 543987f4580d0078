"""Facts to repeat a run, as pairs of name and text, for report and page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from traceml.formatting import bytes_text, count_text, names_text, plural, printable, shell_joined
from traceml.renderers.views import RunView
from traceml.runs.about import About, package_versions

__all__ = ["about_facts", "nothing_logged"]

_PACKAGES = ("torch", "numpy", "lightning", "pytorch-lightning", "transformers", "accelerate", "deepspeed", "ray",
             "mlflow", "wandb", "clearml", "aim", "tensorboard", "trackio")  # fmt: skip
_MODULE = "-m "
"""First word of the command line of a module."""
_HOSTS = 16
_COLLECTED = {"git": "uncommitted changes", "environment": "packages, variables", "system": "machine"}


def about_facts(view: RunView, about: About) -> list[tuple[str, str]]:
    """Return command, source, versions, machine and model; what is not known is left out."""
    git, process = about.git, about.process
    rows = [
        ("command", _command(process.get("argv"), view.report.run.command_line)),
        ("folder", process.get("folder")),
        ("git commit", _commit(git)),
        ("git branch", git.get("branch")),
        ("git remote", git.get("remote")),
        ("python", process.get("python")),
        ("interpreter", process.get("executable")),
        ("traceml", process.get("traceml") or view.report.traceml_version),
        ("packages", _packages(about)),
        ("ranks", f"{count_text(view.report.run.world_size)} on {names_text(view.report.run.hosts, _HOSTS)}"),
        ("machine", _machine_text(about.system)),
        ("not read", _not_read(about)),
        ("model", _model(about.model)),
        ("data loader", _loader(about.loader)),
        ("optimizer", _optimizer(about.optimizer)),
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


def _machine_text(system: Mapping[str, Any]) -> str:
    """Return processor, cores, memory, devices and system of a host."""
    memory = system.get("memory_bytes")
    return _joined(
        system.get("cpu"),
        f"{system['cores']} cores" if system.get("cores") else None,
        bytes_text(memory) if memory else None,
        _joined(*(system.get("gpus") or ())),
        system.get("os"),
    )


def _command(argv: Any, line: str) -> str:
    """Return a command that a shell takes: it does not find a script alone, and a module is not started by its file."""
    known = line if line.startswith(_MODULE) or not argv else shell_joined(map(str, argv))
    is_python = known.startswith(_MODULE) or known.partition(" ")[0].endswith(".py")
    return f"python {known}" if is_python else known


def _model(facts: Mapping[str, Any]) -> str:
    """Return `Net, 136,714 parameters, float32 on cuda:0, compiled, ddp`."""
    parameters, trained = facts.get("parameters"), facts.get("trainable")
    return _joined(
        facts.get("model"),
        _count(parameters, "parameter"),
        f"{count_text(trained)} of them trained" if isinstance(trained, int) and trained != parameters else None,
        _joined(str(facts.get("dtype") or "").removeprefix("torch."), facts.get("device"), between=" on "),
        "compiled" if facts.get("compiled") else None,
        facts.get("parallel"),
    )


def _loader(facts: Mapping[str, Any]) -> str:
    """Return `DataLoader of Images, 6,400 samples, batches of 32, 4 workers (spawn, persistent), pinned memory`."""
    batch_size = facts.get("batch_size")
    return _joined(
        _joined(facts.get("loader"), facts.get("dataset"), between=" of "),
        _count(facts.get("length"), "sample"),
        f"batches of {batch_size}" if batch_size else None,
        _workers(facts),
        "pinned memory" if facts.get("pin_memory") else None,
    )


def _workers(facts: Mapping[str, Any]) -> str | None:
    number = facts.get("num_workers")
    if not number:
        return None if number is None else "no workers"

    how = _joined(facts.get("start_method"), "persistent" if facts.get("persistent_workers") else None)
    return _joined(_count(number, "worker"), how and f"({how})", between=" ")


def _optimizer(facts: Mapping[str, Any]) -> str:
    """Return `AdamW, learning rate 0.001, 16 tensors in 2 groups, fused`."""
    rate = facts.get("lr")
    return _joined(
        facts.get("optimizer"),
        None if rate is None else f"learning rate {rate}",
        _joined(_count(facts.get("tensors"), "tensor"), _count(facts.get("groups"), "group"), between=" in "),
        *(name for name in ("fused", "foreach") if facts.get(name)),
    )


def _count(count: Any, word: str) -> str | None:
    return plural(count, word) if isinstance(count, int) and count else None


def _joined(*parts: Any, between: str = ", ") -> str:
    """Return the known parts as one text."""
    return between.join(str(part) for part in parts if part)


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
