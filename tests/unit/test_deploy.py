"""Every manifest for a cluster, against the schemas of what reads it, and against each other."""

import gzip
import json
import re
import shlex
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kustomize import build
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from ray_app import cli
from ray_app.config.serve import EndpointConfig
from serve.deployment import replica_options

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
LAUNCHED = [ROOT / "cluster.yaml", *sorted((DEPLOY / "launcher").glob("*.yaml"))]
OVERLAYS = sorted((DEPLOY / "kuberay" / "overlays").iterdir())
JOBS = sorted((DEPLOY / "kuberay").rglob("jobs/*.yaml"))
KUBERNETES = "1.34"
PINNED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and line[0] != "#"
)


def closed(schema: Any) -> Any:
    """A schema that refuses names it does not know: Kubernetes would drop them in silence."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields", False))
    return made


@cache
def kuberay(kind: str) -> jsonschema.Draft202012Validator:
    path = ROOT / "tests" / "schemas" / f"kuberay-1.7.0-{kind.lower()}.json.gz"
    schema = json.loads(gzip.decompress(path.read_bytes()))
    schema = closed(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def check(thing: dict[str, Any]) -> None:
    if thing["apiVersion"] == "ray.io/v1":
        kuberay(thing["kind"]).validate(thing)
    else:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)


def containers(node: Any) -> list[dict[str, Any]]:
    """All containers below a node."""
    if isinstance(node, list):
        return [found for item in node for found in containers(item)]
    if not isinstance(node, dict):
        return []
    own = node.get("containers", [])
    return [*own, *(found for key, value in node.items() if key != "containers" for found in containers(value))]


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.name)
def test_rays_launcher_accepts_the_file(path: Path) -> None:
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.name)
def test_a_launched_cluster_asks_for_its_token_and_keeps_its_dashboard_to_itself(path: Path) -> None:
    plan = yaml.safe_load(path.read_text())
    head = " ".join(plan["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    for commands in (plan["head_start_ray_commands"], plan["worker_start_ray_commands"]):
        assert ". ~/ray-app.env" in " ".join(commands), "which sets RAY_AUTH_MODE=token"
    assert "/home/ray/.ray/auth_token" in plan["file_mounts"]
    assert "chmod 600 ~/.ray/auth_token" in " ".join(plan["setup_commands"])
    assert "IpPermissions" not in plan["provider"].get("security_group", {}), "Ray's own rules: ssh, and the group"


def environment_of_nodes() -> dict[str, str]:
    lines = (DEPLOY / "ray-app.env.example").read_text().splitlines()
    words = [shlex.split(line) for line in lines if line and line[0] != "#"]
    assert all(len(word) == 1 for word in words), "a shell reads it"
    return dict(word.split("=", 1) for (word,) in words)


def environment_of_pods() -> dict[str, str]:
    return dict(next(o for o in build(OVERLAYS[0]) if o["kind"] == "ConfigMap")["data"])


def test_the_environment_example_turns_authentication_on_and_holds_no_secret() -> None:
    values = environment_of_nodes()
    assert values["RAY_AUTH_MODE"] == "token"
    assert values["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert not values["MLFLOW_TRACKING_TOKEN"]


def test_nodes_and_pods_get_the_same() -> None:
    nodes, pods = environment_of_nodes(), environment_of_pods()
    elsewhere = {"RAY_AUTH_MODE", "MLFLOW_TRACKING_TOKEN"}  # KubeRay's authOptions; a secret, of which pods need none
    assert set(nodes) - set(pods) == elsewhere
    assert set(pods) <= set(nodes)
    places = {"RAY_APP_STORAGE", "MLFLOW_TRACKING_URI"}
    assert {k: v for k, v in nodes.items() if k not in places | elsewhere} == {
        k: v for k, v in pods.items() if k not in places
    }


@pytest.mark.parametrize("path", [path for path in LAUNCHED if path.name != "on-premise.yaml"], ids=lambda p: p.name)
def test_a_launched_node_may_use_the_bucket_and_spot_instances_have_a_fallback(path: Path) -> None:
    plan = yaml.safe_load(path.read_text())
    types = plan["available_node_types"]
    workers = {name: kind for name, kind in types.items() if name != plan["head_node_type"]}
    for kind in types.values():  # Ray gives the head alone a role by itself
        assert kind["node_config"].keys() & {"IamInstanceProfile", "serviceAccounts"}
    spot = {name for name, kind in workers.items() if re.search("spot", json.dumps(kind["node_config"]), re.I)}
    assert {"GPU" in workers[name]["resources"] for name in spot} == {True, False}
    for name in spot:
        alike = [kind for other, kind in workers.items() if other not in spot]
        (fallback,) = (kind for kind in alike if kind["resources"] == workers[name]["resources"])
        assert workers[name]["priority"] > fallback.get("priority", 0)
    assert all(kind["min_workers"] == 0 for kind in workers.values())


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_kubernetes_and_kuberay_accept_every_object(folder: Path) -> None:
    objects = build(folder)
    assert {"RayCluster", "RayService", "Deployment", "StatefulSet", "NetworkPolicy"} <= {o["kind"] for o in objects}
    for thing in objects:
        check(thing)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(DEPLOY / "kuberay")))
def test_kuberay_accepts_every_job_and_we_accept_its_command(path: Path) -> None:
    job = yaml.safe_load(path.read_text())
    check(job)
    words = shlex.split(Template(job["spec"]["entrypoint"]).substitute(environment_of_pods()))
    assert words[:3] == ["python", "-m", "ray_app"]
    name, rest = cli.find_command(words[3:])
    cfg = cli.parse(name, cli.COMMANDS[name], None, rest)
    assert bool(getattr(cfg, "use_gpu", False)) == ("gpu" in path.parts)
    assert set(yaml.safe_load(job["spec"]["runtimeEnvYAML"])) == {"env_vars"}


def test_the_gpu_overlay_has_jobs_that_ask_for_what_its_workers_have() -> None:
    folder = DEPLOY / "kuberay" / "overlays" / "gpu"
    assert {path.stem for path in JOBS if folder in path.parents} == {"train", "tune"}
    cluster = next(o for o in build(folder) if o["kind"] == "RayCluster")
    limits = [one["resources"]["limits"] for one in containers(cluster["spec"]["workerGroupSpecs"])]
    assert any(limit.get("nvidia.com/gpu") for limit in limits)
    for path in JOBS:
        assert (
            yaml.safe_load(path.read_text())["spec"]["clusterSelector"]["ray.io/cluster"]
            == cluster["metadata"]["name"]
        )


def test_an_unknown_name_in_a_manifest_is_found() -> None:
    cluster = next(o for o in build(OVERLAYS[0]) if o["kind"] == "RayCluster")
    cluster["spec"]["autoscalerOptions"]["idleTimeout"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idleTimeout"):
        check(cluster)


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_pods_run_as_a_user_without_powers_and_with_limits(folder: Path) -> None:
    found = [one for thing in build(folder) for one in containers(thing)]
    assert len(found) >= 6
    for one in found:
        assert one["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert one["resources"]["limits"]["memory"]
        assert not re.search(r"latest$|^[^:]+$", one["image"]), one["image"]
    text = json.dumps(build(folder))
    assert "privileged" not in text
    assert "hostNetwork" not in text


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_one_version_of_ray_everywhere(folder: Path) -> None:
    versions = set(re.findall(r'"rayVersion": "([^"]+)"', json.dumps(build(folder))))
    assert versions == {PINNED["ray"]}
    assert f"'{PINNED['ray']}'" in (ROOT / "cluster.yaml").read_text()


def test_the_endpoint_on_kubernetes_is_the_one_of_this_repository() -> None:
    service = next(o for o in build(OVERLAYS[0]) if o["kind"] == "RayService")
    theirs = yaml.safe_load(service["spec"]["serveConfigV2"])
    ours = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    ServeDeploySchema.model_validate(theirs)
    assert theirs == ours
    for application in ours["applications"]:
        assert "tracking_uri" not in application["args"], "MLFLOW_TRACKING_URI of the nodes sets it"


def test_the_gpu_overlay_is_the_endpoint_of_the_base_with_a_gpu_for_each_replica() -> None:
    services = {folder.name: next(o for o in build(folder) if o["kind"] == "RayService") for folder in OVERLAYS}
    found = {name: yaml.safe_load(service["spec"]["serveConfigV2"]) for name, service in services.items()}
    (gpu,), (cpu,) = found["gpu"]["applications"], found["cpu"]["applications"]
    assert "use_gpu" not in cpu["args"]
    cpu["args"]["use_gpu"] = True
    assert found["gpu"] == found["cpu"]
    options = replica_options(EndpointConfig.model_validate(gpu["args"]))
    assert options["ray_actor_options"]["num_gpus"] == 1
    for worker in containers(services["gpu"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]):
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
