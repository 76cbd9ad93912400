"""As much of kustomize as the overlays under deploy/ use: resources, namespace, images, JSON patches."""

import copy
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}


def build(folder: Path) -> list[dict[str, Any]]:
    """The objects that `kubectl apply -k` would send; a key that is not known here is an error."""
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(plan) <= KNOWN, set(plan) - KNOWN
    objects: list[dict[str, Any]] = []
    for name in plan["resources"]:
        path = folder / name
        objects += build(path) if path.is_dir() else [o for o in yaml.safe_load_all(path.read_text()) if o]
    objects = copy.deepcopy(objects)
    for patch in plan.get("patches", []):
        target = patch["target"]
        chosen = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (target["kind"], target["name"])]
        assert len(chosen) == 1, target
        at = objects.index(chosen[0])
        objects[at] = jsonpatch.apply_patch(chosen[0], yaml.safe_load((folder / patch["path"]).read_text()))
    for image in plan.get("images", []):
        for one in objects:
            retag(one, image["name"], image["newTag"])
    if namespace := plan.get("namespace"):
        for one in objects:
            if one["kind"] != "Namespace":
                one["metadata"]["namespace"] = namespace
    return objects


def retag(node: Any, name: str, tag: str) -> None:
    """Every container image of this name, wherever it is."""
    if isinstance(node, dict):
        if str(node.get("image", "")).rpartition(":")[0] == name:
            node["image"] = f"{name}:{tag}"
        for value in node.values():
            retag(value, name, tag)
    elif isinstance(node, list):
        for value in node:
            retag(value, name, tag)
