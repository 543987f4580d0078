"""Facts to repeat a run, as page and report list them."""

from __future__ import annotations

import pytest

from tests.renderers.reports import healthy
from traceml.renderers.about_text import about_facts, nothing_logged
from traceml.renderers.views import run_view
from traceml.runs.about import About
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import BUILT_IN


def test_what_was_not_read_is_listed_with_the_reason() -> None:
    """It stands beside what is known; without a reason nothing is said."""
    short = About(git={"commit": "abc"}, unread=("git", "environment"), not_read="the run was shorter than 10 s")
    facts = dict(about_facts(run_view(healthy()), short))

    assert facts["git commit"] == "abc"
    assert facts["not read"] == "uncommitted changes, packages, variables: the run was shorter than 10 s"
    assert "not read" not in dict(about_facts(run_view(healthy()), About(unread=("git",))))


@pytest.mark.parametrize(
    ("line", "argv", "shown"),
    [
        ("-m pkg.train --lr 1", ["/home/me/pkg/train.py", "--lr", "1"], "python -m pkg.train --lr 1"),
        ("train.py --lr 1", ["train.py", "--lr", "1"], "python train.py --lr 1"),
        ("train.py", ["/home/me/train.py"], "python /home/me/train.py"),
        ("ray", [], "ray"),
        ("-m pkg.train", [], "python -m pkg.train"),
    ],
)
def test_the_command_starts_the_same_program(line: str, argv: list[str], shown: str) -> None:
    """The file of a module, started alone, finds none of its relative imports."""
    view = run_view(healthy())
    view.report.run.command = line

    assert dict(about_facts(view, About(process={"argv": argv})))["command"] == shown


def test_hosts_beyond_the_listed_ones_are_counted() -> None:
    """A job of a thousand ranks has more hosts than anybody reads."""
    view = run_view(healthy())
    view.report.run.world_size, view.report.run.hosts = 1000, [f"node{number}" for number in range(125)]
    facts = dict(about_facts(view, About()))

    assert facts["ranks"].startswith("1,000 on node0, node1, ")
    assert facts["ranks"].endswith(", node15 and 109 more")


def test_what_a_center_has_not_is_not_said_to_be_missing() -> None:
    """Whether a host has logged parameters is not known there."""
    assert nothing_logged(About(), "Parameters", "None were logged.") == "None were logged."
    text = nothing_logged(About(relayed=True), "Parameters", "None were logged.")
    assert text.startswith("Parameters stay with the aggregator of the host")


def test_versions_of_all_trackers_are_listed() -> None:
    """Of many installed packages the important ones are shown, those of each tracker among them."""
    trackers = sorted(set(BUILT_IN[PluginType.BACKEND]) - {"jsonl"})  # it needs no library
    installed = [f"{name}==1.2" for name in ("torch", "unrelated", *trackers)]

    facts = dict(about_facts(run_view(healthy()), About(environment={"packages": installed})))

    shown = facts["packages"].split(", ")
    assert sorted(shown) == sorted(["torch 1.2", *(f"{name} 1.2" for name in trackers)])


def test_model_loader_and_optimizer_are_told_in_words() -> None:
    """The rows have facts that only the rules need; what is not known is left out."""
    model = {"model": "Net", "parameters": 136_714, "trainable": 714, "dense_embeddings": 0, "device": "cuda:0"}
    loader = {"loader": "DataLoader", "dataset": "Images", "length": 6400, "num_workers": 4, "batch_size": 32}
    optimizer = {"optimizer": "AdamW", "groups": 2, "tensors": 16, "lr": 0.001, "fused": True, "step": 0}
    about = About(
        model={**model, "dtype": "torch.float32", "compiled": True, "parallel": "ddp", "step": 0},
        loader={**loader, "pin_memory": True, "persistent_workers": True, "start_method": "spawn", "objects": []},
        optimizer={**optimizer, "foreach": None},
    )
    facts = dict(about_facts(run_view(healthy()), about))

    assert facts["model"] == "Net, 136,714 parameters, 714 of them trained, float32 on cuda:0, compiled, ddp"
    told = "DataLoader of Images, 6,400 samples, batches of 32, 4 workers (spawn, persistent), pinned memory"
    assert facts["data loader"] == told
    assert facts["optimizer"] == "AdamW, learning rate 0.001, 16 tensors in 2 groups, fused"

    few = About(
        model={"model": "Net"}, loader={"loader": "generator", "num_workers": 0}, optimizer={"optimizer": "Own"}
    )
    facts = dict(about_facts(run_view(healthy()), few))

    assert (facts["model"], facts["data loader"], facts["optimizer"]) == ("Net", "generator, no workers", "Own")
    assert "model" not in dict(about_facts(run_view(healthy()), About()))
