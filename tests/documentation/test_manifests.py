"""Manifests for Kubernetes: valid by their schemas, and their commands run here, one process group per pod."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.aggregator.conftest import TOKEN, Serving
from tests.documentation.pages import ROOT
from tests.eventually import eventually
from tests.forked import client as forked
from tests.ports import free_port
from tests.recorder.conftest import serving
from traceml import settings

__all__ = ["serving"]

FOLDER = ROOT / "examples" / "kubernetes"
MODELS = {
    "PersistentVolumeClaim": "IoK8sApiCoreV1PersistentVolumeClaim",
    "Service": "IoK8sApiCoreV1Service",
    "Deployment": "IoK8sApiAppsV1Deployment",
    "JobSet": "JobsetV1alpha2JobSet",
    "TrainJob": "TrainerV1alpha1TrainJob",
}
# The two nodes train together, on one parameter.
SCRIPT = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(30):
    optimizer.zero_grad(); model(torch.randn(2, 4)).sum().backward(); optimizer.step()
dist.destroy_process_group()
"""


def _manifests(name: str = "*") -> list[dict[str, Any]]:
    return [each for path in sorted(FOLDER.glob(f"{name}.yaml")) for each in yaml.safe_load_all(path.read_text())]


def _checked(model: str, data: dict[str, Any]) -> None:
    """Check types by the model, and unknown names by comparing what comes back."""
    from kubeflow_trainer_api import models

    assert getattr(models, model).from_dict(data).to_dict() == data


@pytest.mark.parametrize("manifest", _manifests(), ids=lambda manifest: manifest["kind"])
def test_manifests_are_valid(manifest):
    """Each has the names and types of its schema, down to the containers."""
    if manifest["kind"] == "Deployment":  # the models have its parts only
        assert manifest["apiVersion"] == "apps/v1"
        assert manifest["spec"].keys() == {"replicas", "strategy", "selector", "template"}
        assert manifest["spec"]["selector"]["matchLabels"] == manifest["spec"]["template"]["metadata"]["labels"]
        manifest = manifest["spec"]["template"]
        _checked("IoK8sApiCoreV1PodTemplateSpec", manifest)
    else:
        _checked(MODELS[manifest["kind"]], manifest)


def test_a_wrong_name_is_found():
    """The check fails for a field that does not exist."""
    (jobset,) = _manifests("jobset")
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["containers"][0]["volumeMount"] = pod["containers"][0].pop("volumeMounts")

    with pytest.raises(AssertionError):
        _checked(MODELS["JobSet"], jobset)


def test_no_service_sets_our_variables():
    """Kubernetes makes `NAME_PORT` of each service; ours must not begin with the prefix of settings."""
    names = [each["metadata"]["name"] for each in _manifests() if each["kind"] == "Service"]

    assert names
    assert [name for name in names if name.startswith("traceml")] == []


def test_jobs_know_the_aggregator():
    """Host and token of the jobs are the service and the secret; each variable is a setting or the switch."""
    (service,) = [each for each in _manifests() if each["kind"] == "Service"]
    secret = {"secretKeyRef": {"name": "traceml", "key": "token"}}
    for manifest in [*_manifests("jobset"), *_manifests("trainjob")]:
        found = {each["name"]: each.get("value", each.get("valueFrom")) for each in _environ(manifest)}
        ours = {name: value for name, value in found.items() if name.startswith("TRACEML")}
        assert ours == {"TRACEML": "1", "TRACEML_HOST": service["metadata"]["name"], "TRACEML_TOKEN": secret}

    assert service["spec"]["ports"][0]["port"] == settings.Settings.model_fields["port"].default


def _environ(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    if manifest["kind"] == "TrainJob":
        return manifest["spec"]["trainer"]["env"]

    return _container(manifest)["env"]


def _container(jobset: dict[str, Any]) -> dict[str, Any]:
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.process
def test_the_pods_of_the_jobset_are_one_run(serving, tmp_path):
    """The command of each pod, run here, trains with the other, and both ranks are in one run of the aggregator."""
    (jobset,) = _manifests("jobset")
    (tmp_path / "train.py").write_text(SCRIPT)
    port = free_port()

    pods = [
        _start(jobset, {"JOB_COMPLETION_INDEX": str(index), "MASTER_PORT": str(port)}, serving, tmp_path)
        for index in range(2)
    ]

    assert [pod.wait(240) for pod in pods] == [0, 0]

    report = eventually(lambda: list(serving.folder.glob("2*/report.json")), "the report")
    (facts,) = [json.loads(path.read_text())["run"] for path in report]
    assert (facts["world_size"], facts["state"]) == (2, "finished")


def _start(jobset: dict[str, Any], pod: dict[str, str], serving: Serving, folder: Path) -> forked.Popen:
    """Start what a pod runs, on this host; its variables and one process instead of eight GPUs."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRACEML_")}
    environ |= {each["name"]: each.get("value", TOKEN) for each in _environ(jobset)}
    environ |= pod | {"MASTER": "127.0.0.1", "NPROC": "1"}
    environ |= {"TRACEML_HOST": "127.0.0.1", "TRACEML_PORT": str(serving.port), "OMP_NUM_THREADS": "1"}
    (script,) = _container(jobset)["args"]
    words = subprocess.check_output(["bash", "-c", f"printf '%s\\n' {script.removeprefix('exec ')}"], env=environ)
    program, *arguments = words.decode().split()
    assert program == "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return forked.Popen(command, cwd=folder, env=environ, forks=True)
