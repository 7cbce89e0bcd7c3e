"""The files of cluster/ and docker/ as tests read them: documents, what kustomize makes of them, Ray's pods."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from schemas import SCHEMAS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
CLUSTERFILE, SERVICEFILE = KUBERAY / "cluster/raycluster.yaml", KUBERAY / "judges/rayservice.yaml"
Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    """The YAML documents of a file; comments alone make none."""
    found = yaml.load_all(path.read_text(encoding="utf-8"), yaml.CSafeLoader)  # ten times as fast as safe_load_all
    return [each for each in found if each is not None]


def only(path: Path) -> Document:
    (found,) = documents(path)
    return found


def check(document: Document) -> None:
    """Checks a document against the schema of its kind.

    Raises:
        jsonschema.ValidationError: with the path of what is wrong.
    """
    if document.get("kind") not in SCHEMAS:
        raise jsonschema.ValidationError(f"kind {document.get('kind')!r} is none of {sorted(SCHEMAS)}")
    jsonschema.Draft202012Validator(SCHEMAS[document["kind"]]).validate(document)


def rendered(folder: Path) -> list[Document]:
    """What `kubectl kustomize` makes of a folder, as far as ours go: resources, a namespace, patches that add.

    Raises:
        NotImplementedError: the kustomization says something else.
    """
    kustomization = only(folder / "kustomization.yaml")
    check(kustomization)
    found: list[Document] = []
    for name in kustomization["resources"]:
        found += rendered(folder / name) if (folder / name).is_dir() else documents(folder / name)
    for each in kustomization.get("patches", ()):
        chosen = [document for document in found if document["kind"] == each["target"]["kind"]]
        if not chosen:
            raise NotImplementedError(f"{folder}: a patch of {each['target']}, which is not there")
        for document in chosen:
            for step in yaml.safe_load(each["patch"]):
                _add(document, step)
    for document in found:
        document["metadata"]["namespace"] = kustomization["namespace"]
    return found


def _add(document: Document, step: dict[str, Any]) -> None:
    if step["op"] != "add":
        raise NotImplementedError(f"op {step['op']}")
    *parents, leaf = step["path"].strip("/").split("/")
    node = document
    for parent in parents:
        node = node[parent]
    node[leaf] = copy.deepcopy(step["value"])


def cluster_specs(document: Document) -> list[Document]:
    """The RayCluster specs in a document."""
    places = {"RayCluster": ("spec",), "RayService": ("spec", "rayClusterConfig"), "RayJob": ("spec", "rayClusterSpec")}
    node: Any = document
    for key in places.get(document["kind"], ("none",)):
        node = node.get(key, {})
    return [node] if node else []


def ray_pods(spec: Document) -> Iterator[tuple[str, Document]]:
    """(group's name, pod template) of a RayCluster spec, the head's first."""
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def changed(document: Any, path: str, value: Any) -> Any:
    """A copy with `value` at the dotted `path` ("0" is a list's first element); `...` removes."""
    copied = node = copy.deepcopy(document)
    *parents, leaf = path.split(".")
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    if value is ...:
        del node[leaf]
    else:
        node[leaf] = value
    return copied
