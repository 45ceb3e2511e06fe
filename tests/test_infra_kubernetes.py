"""The Kubernetes manifests: right as they are, and an error planted of each kind is found."""

from __future__ import annotations

import copy
import importlib
import re
import shutil
import subprocess
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from ingest.job import JobSettings
from store.settings import parse_settings
from train.settings import RunSettings

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "infra" / "kubernetes"


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's schema of Serve uses what pydantic will remove
        return importlib.import_module("infra.kubernetes.check")


@pytest.fixture(scope="module")
def base(checker: ModuleType) -> Any:
    return checker.read(FOLDER / "base")


def test_the_manifests_are_as_they_should_be(checker: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert checker.main() == 0, capsys.readouterr().out


def test_every_kind_is_there(base: Any) -> None:
    assert [item["kind"] for _, item in base].count("RayJob") == 2
    assert {"RayCluster", "RayService", "NetworkPolicy", "PodMonitor", "PrometheusRule"} <= {
        item["kind"] for _, item in base
    }


def test_an_overlay_changes_what_it_says(checker: ModuleType, base: Any) -> None:
    changed = {item["metadata"]["name"]: item for _, item in checker.overlaid(FOLDER / "overlays" / "gpu", base)}
    worker = changed["somaflow-serve"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    assert worker["containers"][0]["image"].endswith("-gpu")
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    trains = {item["metadata"]["name"]: item for _, item in checker.overlaid(FOLDER / "overlays" / "train-gpu", base)}
    spec = trains["somaflow-train"]["spec"]["rayClusterSpec"]
    (worker,) = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert worker["image"].endswith("-gpu")
    assert worker["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": "1"}
    assert "nvidia.com/gpu" not in str(spec["headGroupSpec"])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("overlay", ["gpu", "train-gpu"])
def test_kustomize_makes_of_an_overlay_what_is_checked(checker: ModuleType, base: Any, overlay: str) -> None:
    command = ["kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(FOLDER / "overlays" / overlay)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr
    made = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(told.stdout)}
    checked = {
        (item["kind"], item["metadata"]["name"]): item
        for _, item in checker.overlaid(FOLDER / "overlays" / overlay, base)
    }
    assert made.keys() <= checked.keys()
    assert ("RayJob", "somaflow-train") in made or ("RayService", "somaflow-serve") in made
    for name, item in made.items():
        part = "spec" if "spec" in item else "data"
        assert bare(item[part]) == bare(checked[name][part]), name


def bare(value: Any) -> Any:
    """Leave out the ends of texts, where kustomize drops an empty line."""
    if isinstance(value, dict):
        return {key: bare(part) for key, part in value.items()}
    if isinstance(value, list):
        return [bare(part) for part in value]
    return value.rstrip() if isinstance(value, str) else value


Plant = Callable[[dict[str, Any]], Any]


def head(spec: dict[str, Any]) -> Any:
    return spec["headGroupSpec"]["template"]


PLANTED: dict[str, tuple[str, Plant, str]] = {
    "a key that the definition does not know": (
        "RayJob",
        lambda job: job["spec"].update(backOffLimit=3),
        "'backOffLimit' was unexpected",
    ),
    "a value of another type": ("RayJob", lambda job: job["spec"].update(backoffLimit="three"), "backoffLimit"),
    "a misspelled key in a pod": (
        "RayCluster",
        lambda cluster: head(cluster["spec"])["spec"]["containers"][0].update(volumeMount=[]),
        "'volumeMount' was unexpected",
    ),
    "a key that Serve drops in silence": (
        "RayService",
        lambda one: one["spec"].update(serveConfigV2=one["spec"]["serveConfigV2"].replace("route_prefix", "prefix")),
        "applications.0.prefix: Serve knows no such key",
    ),
    "a deployment that is not there": (
        "RayService",
        lambda one: one["spec"].update(serveConfigV2=one["spec"]["serveConfigV2"].replace("ModelReplica", "Model")),
        "there is no deployment Model",
    ),
    "an import path that leads nowhere": (
        "RayService",
        lambda one: one["spec"].update(serveConfigV2=one["spec"]["serveConfigV2"].replace(":build", ":built")),
        "import_path serve.deploy:built",
    ),
    "an argument that the server does not know": (
        "RayService",
        lambda one: one["spec"].update(serveConfigV2=one["spec"]["serveConfigV2"].replace("threads:", "thread:")),
        "args: ",
    ),
    "a runtime environment that Ray refuses": (
        "RayJob",
        lambda job: job["spec"].update(runtimeEnvYAML="env_vars:\n  A: 1\n"),
        "runtimeEnvYAML: ",
    ),
    "a key that Ray's environments do not have": (
        "RayJob",
        lambda job: job["spec"].update(runtimeEnvYAML="envvars: {}\n"),
        "runtimeEnvYAML: envvars",
    ),
    "another version of Ray": (
        "RayCluster",
        lambda one: one["spec"].update(rayVersion="2.59.0"),
        "rayVersion 2.59.0 is not the lock's",
    ),
    "another image": (
        "RayCluster",
        lambda one: head(one["spec"])["spec"]["containers"][0].update(image="somaflow:latest"),
        "image somaflow:latest is not",
    ),
    "pods without a profile of system calls": (
        "RayCluster",
        lambda one: head(one["spec"])["spec"]["securityContext"].pop("seccompProfile"),
        "no seccompProfile RuntimeDefault",
    ),
    "a volume that is not there": (
        "RayCluster",
        lambda one: head(one["spec"])["spec"]["volumes"].pop(0),
        "there is no volume shared",
    ),
    "a claim that is not there": (
        "PersistentVolumeClaim",
        lambda claim: claim["metadata"].update(name="other"),
        "there is no PersistentVolumeClaim somaflow-shared",
    ),
    "a config file that is not there": (
        "ConfigMap",
        lambda config: config["data"].pop("train.toml"),
        "/config/train.toml is in no ConfigMap",
    ),
    "a port that nobody has": (
        "PodMonitor",
        lambda one: one["spec"]["podMetricsEndpoints"][0].update(port="metric"),
        "no pod that it selects has a port metric",
    ),
    "a port of pods that are not selected": (
        "PodMonitor",
        lambda one: one["spec"]["selector"]["matchLabels"].update({"ray.io/node-type": "tail"}),
        "no pod that it selects has a port metrics",
    ),
    "a job for which an alert waits": (
        "PodMonitor",
        lambda one: one["spec"]["podMetricsEndpoints"][0].pop("relabelings"),
        "none names its job 'ray'",
    ),
    "metrics that Prometheus may not read": (
        "NetworkPolicy",
        lambda one: one["spec"]["ingress"][2]["ports"].pop(),
        "Prometheus may not reach 8000",
    ),
    "a rule for a port where nobody listens": (
        "NetworkPolicy",
        lambda one: one["spec"]["ingress"][1]["ports"][0].update(port=8001),
        "no pod listens at 8001",
    ),
    "pods that no policy covers": (
        "RayCluster",
        lambda one: head(one["spec"])["metadata"].update(labels={}),
        "lack the label",
    ),
    "memory that may grow beyond what was asked for": (
        "RayCluster",
        lambda one: head(one["spec"])["spec"]["containers"][0]["resources"]["requests"].update(memory="1Gi"),
        "memory asked for and its limit differ",
    ),
    "rules and the flag that they replace": (
        "RayJob",
        lambda job: job["spec"].update(shutdownAfterJobFinishes=True),
        "go with neither shutdownAfterJobFinishes",
    ),
    "a cluster that stays after a failure": (
        "RayJob",
        lambda job: job["spec"]["deletionStrategy"]["deletionRules"].pop(),
        "the cluster stays for ever",
    ),
    "a rule that KubeRay refuses": (
        "RayJob",
        lambda job: job["spec"]["deletionStrategy"]["deletionRules"].append(
            {"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED", "ttlSeconds": 0}}
        ),
        "KubeRay refuses DeleteWorkers",
    ),
    "a GPU that nobody uses": (
        "RayService",
        lambda one: head(one["spec"]["rayClusterConfig"])["spec"]["containers"][0]["resources"]["limits"].update(
            {"nvidia.com/gpu": "1"}
        ),
        "device: cuda",
    ),
    "a job without a deadline": (
        "RayJob",
        lambda job: job["spec"].pop("preRunningDeadlineSeconds"),
        "without preRunningDeadlineSeconds",
    ),
    "workers that are never fewer": (
        "RayJob",
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=9),
        "cannot shrink or grow",
    ),
    "a job that waits for more pods than it needs": (
        "RayJob",
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(replicas=2),
        "submits the job only when all 2 replicas run",
    ),
    "a server that does not answer what it has": (
        "RayService",
        lambda one: head(one["spec"]["rayClusterConfig"])["spec"]["containers"][0].pop("lifecycle"),
        "head: no preStop",
    ),
    "an operator that is shut out": (
        "NetworkPolicy",
        lambda one: one["spec"]["ingress"].pop(),
        "operator may not reach 8265",
    ),
    "an autoscaler that may not ask for pods": (
        "RayCluster",
        lambda one: head(one["spec"])["spec"].update(automountServiceAccountToken=False),
        "the autoscaler beside it starts no worker",
    ),
    "a job beside the cluster": (
        "RayJob",
        lambda job: job["spec"].update(entrypoint="python -m ingest run /config/ingest.toml"),
        "without --address auto",
    ),
    "a kind that nobody knows": ("PodMonitor", lambda one: one.update(kind="PodMonitors"), "no kind that is known"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_found(checker: ModuleType, base: Any, planted: str) -> None:
    kind, plant, expected = PLANTED[planted]
    objects = copy.deepcopy(base)
    plant(next(item for _, item in objects if item["kind"] == kind))
    wrong = list(checker.check(objects))
    assert any(expected in line for line in wrong), wrong


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_node_types": {}}, "head_node_types: Ray's launcher knows no such key"),
        ({"max_workers": "two"}, "'two'"),
        ({"provider": {}}, "type"),
        ({"setup_commands": ["pip install torch==2.0.0"]}, "torch==2.0.0 is not the lock's"),
    ],
)
def test_an_error_planted_in_the_launchers_file_is_found(
    checker: ModuleType, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    config = yaml.safe_load((ROOT / "infra" / "cluster.yaml").read_text()) | changes
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config))
    wrong = list(checker.launcher(tmp_path / "cluster.yaml"))
    assert any(expected in line for line in wrong), wrong


def test_a_patch_that_finds_nothing_is_an_error(checker: ModuleType, base: Any) -> None:
    without = [(name, item) for name, item in base if item["kind"] != "RayService"]
    with pytest.raises(ValueError, match="there is no RayService somaflow-serve to patch"):
        checker.overlaid(FOLDER / "overlays" / "gpu", without)


def test_the_jobs_settings_are_understood(base: Any) -> None:
    (data,) = (item["data"] for _, item in base if item["kind"] == "ConfigMap")
    run = parse_settings(RunSettings, tomllib.loads(data["train.toml"]), where="train.toml")
    job = parse_settings(JobSettings, tomllib.loads(data["ingest.toml"]), where="ingest.toml")
    trainers = next(item for _, item in base if item["metadata"]["name"] == "somaflow-train")
    (group,) = trainers["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (run.workers_min, run.workers) == (group["minReplicas"], group["maxReplicas"])
    assert job.lake == run.lake


def test_the_rule_for_an_ingress_controller_holds_once_it_is_no_comment_any_more() -> None:
    text = (FOLDER / "base" / "network.yaml").read_text()
    rules = yaml.safe_load(re.sub(r"(?m)^    # (?=[- ])", "    ", text))["spec"]["ingress"]
    assert len(rules) == len(yaml.safe_load(text)["spec"]["ingress"]) + 1
    ingress = [rule for rule in rules if "ingress" in str(rule.get("from"))]
    selector = {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}
    assert ingress == [{"ports": [{"port": 8000}], "from": [{"namespaceSelector": selector}]}]
