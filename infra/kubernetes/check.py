"""Check the Kubernetes manifests without a cluster: ``python infra/kubernetes/check.py [FOLDER]``.

Ray's own objects are compared with the schemas of KubeRay's definitions (``schemas/``, made by ``make_schemas.py`` from
KubeRay 1.7.0, Apache-2.0), ``serveConfigV2`` with Serve's schema key by key, ``runtimeEnvYAML`` with Ray's
``RuntimeEnv``, and all of them with each other: image, Ray's version and the lock; names of volumes, ports, config
files and claims; the import path of the server. Overlays are applied, with the patches of RFC 6902 that they hold, and
checked like the rest; so are ``infra/cluster*.yaml``, with the schema of Ray's launcher.
Prints what is wrong, a line each, and ends with 1; or with 0.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonpatch
import jsonschema
import ray
import yaml
from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PART_OF = {"app.kubernetes.io/part-of": "somaflow"}
CLUSTERS = {
    "RayJob": ("spec", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
    "RayCluster": ("spec",),
}
PLAIN = {"PersistentVolumeClaim", "ConfigMap", "NetworkPolicy", "PodMonitor", "PrometheusRule"}
Objects = list[tuple[str, dict[str, Any]]]
"""File and object."""


def read(folder: Path) -> Objects:
    """Read the objects of every manifest in a folder; kustomizations are no objects."""
    texts = ((path.name, path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml")))
    found = ((name, item) for name, text in texts for item in yaml.safe_load_all(text))
    return [(name, item) for name, item in found if item and item.get("kind") != "Kustomization"]


def overlaid(folder: Path, base: Objects) -> Objects:
    """Apply an overlay's patches to the base.

    Raises:
        ValueError: A patch finds nothing to change.
    """
    made = list(base)
    told = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    for patch in told.get("patches", []):
        target, hit = patch["target"], False
        for position, (name, item) in enumerate(made):
            if item["kind"] == target["kind"] and item["metadata"]["name"] == target["name"]:
                hit = True
                try:
                    changed = jsonpatch.apply_patch(item, yaml.safe_load(patch["patch"]))
                except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
                    raise ValueError(f"{folder.name}: a patch of {target['name']} finds nothing: {error}") from None
                made[position] = (f"{folder.name}/{name}", changed)
        if not hit:
            raise ValueError(f"{folder.name}: there is no {target['kind']} {target['name']} to patch")
    return made


def check(objects: Objects) -> Iterator[str]:
    """Tell what is wrong with these objects, alone and together."""
    for name, item in objects:
        where = f"{name}: {item.get('kind')} {item.get('metadata', {}).get('name')}"
        yield from (f"{where}: {what}" for what in _alone(item))
    yield from _together(objects)


def _alone(item: dict[str, Any]) -> Iterator[str]:
    kind = item.get("kind", "")
    if kind not in CLUSTERS:
        if kind not in PLAIN:
            yield f"no kind that is known here; known: {', '.join(sorted({*CLUSTERS, *PLAIN}))}"
        return
    schema = json.loads((HERE / "schemas" / f"{kind.lower()}.json").read_text(encoding="utf-8"))
    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(item), key=lambda error: list(error.path))
    yield from (f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in errors)
    if errors:
        return
    spec = item["spec"]
    if "serveConfigV2" in spec:
        yield from _serve(spec["serveConfigV2"])
    if "runtimeEnvYAML" in spec:
        yield from _runtime(spec["runtimeEnvYAML"])
    if "entrypoint" in spec:
        yield from _entrypoint(spec["entrypoint"])
        yield from _job(item)
    if kind == "RayService":
        yield from _drain(_cluster_of(item))
        gpus = "nvidia.com/gpu" in json.dumps(_cluster_of(item))
        if gpus != ("device: cuda" in spec["serveConfigV2"]):
            yield "device: cuda in the arguments and nvidia.com/gpu in the limits go together"
    yield from _cluster(_cluster_of(item))


def _serve(text: str) -> Iterator[str]:
    config = yaml.safe_load(text)
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        for one in error.errors():
            yield f"serveConfigV2.{'.'.join(map(str, one['loc']))}: {one['msg']}"
        return
    yield from (f"serveConfigV2.{what}" for what in _unknown(config, ServeDeploySchema, ""))
    for app in config["applications"]:
        module, _, attribute = app["import_path"].partition(":")
        try:
            built = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            yield f"serveConfigV2: import_path {app['import_path']}: {error}"
            continue
        try:
            application = built(app.get("args", {}))
        except Exception as error:  # noqa: BLE001 - whatever the builder says of its arguments
            yield f"serveConfigV2: args: {error}"
            continue
        named = {one["name"] for one in app.get("deployments", [])}
        known = set(_deployments(application))
        yield from (f"serveConfigV2: there is no deployment {name}; there are {known}" for name in named - known)


def _deployments(application: Any) -> Iterator[str]:
    deployment = application._bound_deployment  # Serve tells the names nowhere else before it runs
    yield deployment.name
    for part in [*deployment.init_args, *deployment.init_kwargs.values()]:
        if hasattr(part, "_bound_deployment"):
            yield from _deployments(part)


def _unknown(value: Any, model: type[BaseModel], where: str) -> Iterator[str]:
    """Find keys that Serve's schema would drop in silence."""
    if isinstance(value, list):
        for position, part in enumerate(value):
            yield from _unknown(part, model, f"{where}{position}.")
        return
    if not isinstance(value, dict):
        return
    for key, part in value.items():
        if key not in model.model_fields:
            yield f"{where}{key}: Serve knows no such key"
            continue
        inner = _model_in(model.model_fields[key].annotation)
        if inner is not None:
            yield from _unknown(part, inner, f"{where}{key}.")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _runtime(text: str) -> Iterator[str]:
    try:
        RuntimeEnv(**yaml.safe_load(text), _validate=True)
    except (TypeError, ValueError) as error:
        yield f"runtimeEnvYAML: {error}"
        return
    known = {"env_vars", "working_dir", "py_modules", "pip", "uv", "conda", "config", "image_uri", "excludes"}
    yield from (f"runtimeEnvYAML: {key}: Ray knows no such key" for key in yaml.safe_load(text) if key not in known)


def _entrypoint(command: str) -> Iterator[str]:
    words = shlex.split(command)
    if words[:2] != ["python", "-m"] or words[2] not in ("ingest", "train", "serve"):
        yield f"entrypoint: {command!r} is no command of this project"
    elif "--address" not in words:
        yield "entrypoint: without --address auto the job starts a Ray of its own on the head"


def _job(item: dict[str, Any]) -> Iterator[str]:
    """Tell what lets a job wait or cost for ever, and what an operator refuses."""
    spec = item["spec"]
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if rules and (spec.get("shutdownAfterJobFinishes") or "ttlSecondsAfterFinished" in spec):
        yield "deletionRules go with neither shutdownAfterJobFinishes nor ttlSecondsAfterFinished"
    ends = {(rule["policy"], next(iter(rule["condition"].values()))) for rule in rules}
    if not {("DeleteCluster", "SUCCEEDED"), ("DeleteCluster", "FAILED"), ("DeleteCluster", "Failed")} <= ends:
        yield "deletionRules: the cluster stays for ever after some of: SUCCEEDED, FAILED, Failed"
    if _cluster_of(item).get("enableInTreeAutoscaling") and any(rule["policy"] == "DeleteWorkers" for rule in rules):
        yield "deletionRules: KubeRay refuses DeleteWorkers where the cluster scales itself"
    waits = [key for key in ("preRunningDeadlineSeconds", "activeDeadlineSeconds", "backoffLimit") if key not in spec]
    if waits:
        yield f"without {', '.join(waits)} it may wait or be tried for ever, or never again"
    for group in _cluster_of(item).get("workerGroupSpecs", []):
        if group["minReplicas"] >= group["maxReplicas"]:
            yield f"{group['groupName']}: minReplicas is not below maxReplicas, so that the job cannot shrink or grow"
        if group.get("replicas", 0) > group["minReplicas"]:
            yield (
                f"{group['groupName']}: KubeRay submits the job only when all {group['replicas']} replicas run, more "
                "than minReplicas; the autoscaler adds the others"
            )


def _drain(cluster: dict[str, Any]) -> Iterator[str]:
    """Tell which pods of a server end before they have answered."""
    for name, template in _groups(cluster):
        grace_s = template["spec"].get("terminationGracePeriodSeconds", 30)
        for container in template["spec"]["containers"]:
            words = " ".join(container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []))
            slept = re.search(r"sleep (\d+); ray stop", words)
            if slept is None or int(slept[1]) >= grace_s:
                yield f"{name}: no preStop that sleeps and then stops Ray within {grace_s} s, to answer what it has"


def _cluster_of(item: dict[str, Any]) -> dict[str, Any]:
    found: Any = item
    for key in CLUSTERS[item["kind"]]:
        found = found[key]
    return dict(found)


def _groups(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group["template"]


def _locked(package: str) -> str:
    """Return the version of a package in the lock; empty where it is not there."""
    found = re.search(rf"(?m)^{package}==(\S+)$", (ROOT / "requirements.lock").read_text(encoding="utf-8"))
    return found[1] if found else ""


def _cluster(cluster: dict[str, Any]) -> Iterator[str]:
    project = re.search(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ray_version = _locked("ray")
    wanted = f"somaflow:{project[1] if project else ''}-ray{ray_version}-"
    if cluster.get("rayVersion") != ray_version:
        yield f"rayVersion {cluster.get('rayVersion')} is not the lock's {ray_version}"
    told = cluster["headGroupSpec"]["template"]["spec"].get("automountServiceAccountToken")
    if cluster.get("enableInTreeAutoscaling") and told is False:
        yield "head: without its service account's token the autoscaler beside it starts no worker"
    for name, template in _groups(cluster):
        labels, spec = template.get("metadata", {}).get("labels", {}), template["spec"]
        if not PART_OF.items() <= labels.items():
            yield f"{name}: its pods lack the label {PART_OF}, by which network policy and monitor find them"
        if not spec.get("securityContext", {}).get("runAsNonRoot"):
            yield f"{name}: may run as root"
        if spec.get("securityContext", {}).get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: no seccompProfile RuntimeDefault, which the Pod Security Standard 'restricted' asks for"
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for container in spec["containers"]:
            image = container["image"]
            if not image.startswith(wanted) or image.removeprefix(wanted) not in ("cpu", "gpu"):
                yield f"{name}: image {image} is not {wanted}cpu or {wanted}gpu"
            resources = container.get("resources", {})
            if resources.get("requests", {}).get("memory") != resources.get("limits", {}).get("memory"):
                yield f"{name}: memory asked for and its limit differ; Ray believes the limit"
            mounts = container.get("volumeMounts", [])
            yield from (f"{name}: there is no volume {m['name']}" for m in mounts if m["name"] not in volumes)
            if "/dev/shm" not in {mount["mountPath"] for mount in mounts}:  # noqa: S108 - a path in a pod
                yield f"{name}: no memory at /dev/shm for Ray's objects"


def launcher(path: Path) -> Iterator[str]:
    """Compare a file of Ray's own launcher with Ray's schema; keys that it knows too."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    known = schema["properties"]
    yield from (f"{path.name}: {key}: Ray's launcher knows no such key" for key in config if key not in known)
    wrong = list(jsonschema.Draft7Validator(schema).iter_errors(config))
    yield from (f"{path.name}: {'.'.join(map(str, one.path))}: {one.message[:200]}" for one in wrong)
    if wrong:
        return
    locked = _locked("torch")
    said = re.findall(r"torch==(\S+)", " ".join(config.get("setup_commands", [])))
    if any(version != locked for version in said):
        yield f"{path.name}: setup_commands: torch=={said[0]} is not the lock's {locked}"
    try:
        validate_config(prepare_config(config))
    except Exception as error:  # noqa: BLE001 - whatever Ray says of it
        yield f"{path.name}: {str(error).splitlines()[0][:200]}"


def _together(objects: Objects) -> Iterator[str]:
    by_kind: dict[str, dict[str, dict[str, Any]]] = {}
    for _, item in objects:
        by_kind.setdefault(item["kind"], {})[item["metadata"]["name"]] = item
    clusters = [(file, item) for file, item in objects if item["kind"] in CLUSTERS]
    names = [item["metadata"]["name"] for _, item in clusters]
    yield from (f"{name}: two objects have this name" for name in sorted({n for n in names if names.count(n) > 1}))
    for file, item in clusters:
        where = f"{file}: {item['kind']} {item['metadata']['name']}"
        yield from (f"{where}: {what}" for what in _named(item, by_kind))
    yield from _ports([item for _, item in clusters], by_kind)


def _named(item: dict[str, Any], by_kind: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Tell what an object names that is not there."""
    claims, configs = by_kind.get("PersistentVolumeClaim", {}), by_kind.get("ConfigMap", {})
    files = {f"/config/{name}" for config in configs.values() for name in config["data"]}
    for word in shlex.split(item["spec"].get("entrypoint", "")):
        if word.startswith("/config/") and word not in files:
            yield f"{word} is in no ConfigMap; there are {', '.join(sorted(files)) or 'none'}"
    volumes = [one for _, template in _groups(_cluster_of(item)) for one in template["spec"].get("volumes", [])]
    for volume in volumes:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        config = volume.get("configMap", {}).get("name")
        if claim and claim not in claims:
            yield f"there is no PersistentVolumeClaim {claim}"
        if config and config not in configs:
            yield f"there is no ConfigMap {config}"


_OPERATOR = "kuberay-operator"
"""The operator's name in its labels."""
_REACHED = ("dashboard", "serve")
"""Names of the ports at which the operator submits jobs and asks whether proxies are well."""


def _ports(items: list[dict[str, Any]], by_kind: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Tell which ports are asked for that no pod has, or that Prometheus may not reach."""
    pods = [pod for item in items for pod in _pods(_cluster_of(item))]
    read, jobs = set[int](), set[str]()
    for name, monitor in by_kind.get("PodMonitor", {}).items():
        asked = monitor["spec"]["selector"]["matchLabels"].items()
        ports = [port for labels, ports in pods if asked <= labels.items() for port in ports]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            found = {port["containerPort"] for port in ports if port.get("name") == endpoint["port"]}
            if not found:
                yield f"PodMonitor {name}: no pod that it selects has a port {endpoint['port']}"
            read |= found
            named = [one["replacement"] for one in endpoint.get("relabelings", []) if one.get("targetLabel") == "job"]
            jobs |= set(named)
    wanted = set(re.findall(r'up\{job="(.+?)"\}', (ROOT / "infra/monitoring/alerts.yaml").read_text(encoding="utf-8")))
    yield from (f"PodMonitor: none names its job {job!r}, for which an alert asks" for job in sorted(wanted - jobs))
    listened = {port["containerPort"] for _, ports in pods for port in ports}
    for name, policy in by_kind.get("NetworkPolicy", {}).items():
        rules = policy["spec"].get("ingress", [])
        open_to = {port["port"] for rule in rules for port in rule.get("ports", [])}
        yield from (f"NetworkPolicy {name}: no pod listens at {port}" for port in sorted(open_to - listened))
        operator = [rule for rule in rules if _OPERATOR in json.dumps(rule)]
        asked_for = {port["containerPort"] for _, ports in pods for port in ports if port.get("name") in _REACHED}
        for who, let_in, needed in (
            ("Prometheus", _from_elsewhere(rules, operator), read),
            ("operator", operator, asked_for),
        ):
            shown = {port["port"] for rule in let_in for port in rule.get("ports", [])}
            yield from (f"NetworkPolicy {name}: {who} may not reach {port}" for port in sorted(needed - shown))


def _from_elsewhere(rules: list[dict[str, Any]], but: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rules that let other namespaces in, but for some."""
    return [rule for rule in rules if rule not in but and "namespaceSelector" in json.dumps(rule)]


def _pods(cluster: dict[str, Any]) -> Iterator[tuple[dict[str, str], list[dict[str, Any]]]]:
    """Yield the labels, KubeRay's own among them, and the ports of each kind of pod."""
    for name, template in _groups(cluster):
        labels = {"ray.io/node-type": "head" if name == "head" else "worker"} | template["metadata"].get("labels", {})
        yield labels, [port for container in template["spec"]["containers"] for port in container.get("ports", [])]


def main(folder: Path = HERE) -> int:
    """Check the base and each overlay; return the status to end with."""
    base = read(folder / "base")
    launchers = sorted((ROOT / "infra").glob("cluster*.yaml"))
    overlays = sorted((folder / "overlays").iterdir())
    wrong = [*check(base), *(what for path in launchers for what in launcher(path))]
    for overlay in overlays:
        try:
            wrong += check(overlaid(overlay, base))
        except ValueError as error:
            wrong.append(str(error))
    for line in dict.fromkeys(wrong):
        print(line)
    if not wrong:
        print(f"as they should be: {len(base)} objects, {len(overlays)} overlays, {len(launchers)} launcher files")
    return bool(wrong)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(*map(Path, sys.argv[1:])))
