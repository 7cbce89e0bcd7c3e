"""cluster/kuberay against the schemas of its kinds: pods, network, kustomize; each check is shown to find a fault."""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from manifests import (
    CLUSTER,
    CLUSTERFILE,
    KUBERAY,
    ROOT,
    SERVICEFILE,
    changed,
    check,
    cluster_specs,
    documents,
    only,
    ray_pods,
    rendered,
)
from pod_rules import faults

FILES = sorted(KUBERAY.rglob("*.yaml"))
SPECS = [spec for path in (CLUSTERFILE, SERVICEFILE) for spec in cluster_specs(only(path))]
PODS = [pytest.param(*pod, id=f"{n}-{pod[0]}") for n, spec in enumerate(SPECS) for pod in ray_pods(spec)]


# -- schemas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KUBERAY)))
def test_every_document_is_what_its_kind_documents(path: Path) -> None:
    found = documents(path)
    assert found
    for document in found:
        check(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.authOption", {"mode": "token"}),
        ("spec.authOptions.mode", "password"),
        ("spec.autoscalerOptions.version", "v3"),
        ("spec.headGroupSpec.template.spec.containers.0.securityContext.runAsRoot", False),
        ("spec.workerGroupSpecs.0.minReplica", 0),
        ("spec.workerGroupSpecs.0.minReplicas", "0"),
        ("spec.workerGroupSpecs.2.maxReplicas", ...),
        ("spec.workerGroupSpecs.0.rayStartParams.num-cpus", 4),
        ("spec.workerGroupSpecs.0.template.spec.containers.0.livenessProbe.httpGet.url", "/"),
        ("spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory", "64 GB"),
        ("spec.workerGroupSpecs.0.template.spec.containers.0.environment", []),
        ("spec.workerGroupSpecs.0.labels.role", "a judge"),
        ("spec.rayVersion", 2.6),
        ("kind", "RayClusters"),
    ],
)
def test_a_cluster_with_a_mistake_is_refused(path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(changed(only(CLUSTERFILE), path, value))


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("rayjob.yaml", "spec.entryPoint", "true"),
        ("rayjob.yaml", "spec.submissionMode", "HttpMode"),
        ("rayjob.yaml", "spec.backoffLimit", 3),  # of a job that has no cluster of its own
        ("judges/rayservice.yaml", "spec.serveConfig", ""),
        ("judges/rayservice.yaml", "spec.rayClusterConfig.headGroupSpec.replicas", 1),
        ("judges/networkpolicy.yaml", "spec.ingress.0.to", []),
        ("cluster/storage.yaml", "spec.accessModes", ["ReadWriteAll"]),
        ("cluster/podmonitor.yaml", "spec.podMetricsEndpoints.0.interval_s", 15),
        ("cluster/kustomization.yaml", "resource", ["raycluster.yaml"]),
    ],
)
def test_other_kinds_with_a_mistake_are_refused(file: str, path: str, value: Any) -> None:
    document = only(KUBERAY / file)
    check(document)
    with pytest.raises(jsonschema.ValidationError):
        check(changed(document, path, value))


# -- pods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "template"), PODS)
def test_every_ray_pod_is_unprivileged_probed_and_has_time_to_go(group: str, template: Any) -> None:
    assert faults(group, template) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.containers.0.securityContext.runAsUser", 0, "root"),
        ("spec.containers.0.securityContext.allowPrivilegeEscalation", ..., "privileges"),
        ("spec.containers.0.securityContext.capabilities.add", ["SYS_PTRACE"], "capabilities"),
        ("spec.containers.0.securityContext.seccompProfile", ..., "seccomp"),
        ("spec.containers.0.resources.requests.cpu", "1", "limits"),
        ("spec.containers.0.readinessProbe", ..., "readinessProbe"),
        ("spec.containers.0.lifecycle", ..., "drain"),
        ("spec.containers.0.volumeMounts", [], "mount"),
        ("spec.terminationGracePeriodSeconds", 60, "killed before"),
        ("spec.restartPolicy", "Always", "restart"),
        ("spec.automountServiceAccountToken", True, "token"),
    ],
)
def test_a_pod_with_a_fault_is_reported(path: str, value: Any, said: str) -> None:
    group, template = list(ray_pods(SPECS[0]))[-1]
    (fault,) = faults(group, changed(template, path, value))
    assert said in fault


def test_every_cluster_asks_for_a_token_and_no_file_holds_one() -> None:
    for spec in SPECS:
        assert spec["authOptions"] == {"mode": "token", "secretName": "sae-ray-token"}
    assert not [path for path in FILES if any(document["kind"] == "Secret" for document in documents(path))]


def session_settings() -> dict[str, str]:
    """What `session.py` sets for an own Ray before it starts it, and what a joined cluster must have been given."""
    tree = ast.parse((ROOT / "sae_ray/session.py").read_text())
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.setdefault"
    ]
    return {ast.literal_eval(call.args[0]): ast.literal_eval(call.args[1]) for call in calls}


@pytest.mark.parametrize(("group", "template"), PODS)
def test_nodes_have_the_settings_that_an_own_ray_is_given(group: str, template: Any) -> None:
    environment = {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}
    wanted = session_settings()
    assert len(wanted) >= 3
    assert wanted.items() <= environment.items()


@pytest.mark.parametrize("place", ["docker/compose.yaml", "cluster/aws.yaml", "cluster/slurm/sae-ray.sbatch"])
def test_so_have_the_nodes_of_every_other_cluster(place: str) -> None:
    text = (ROOT / place).read_text().replace('"', "").replace(": ", "=")
    assert not [f"{name}={value}" for name, value in session_settings().items() if f"{name}={value}" not in text]


def test_the_budget_is_of_the_head_that_runs_have_their_drivers_on() -> None:
    (budget,) = [doc for path in FILES for doc in documents(path) if doc["kind"] == "PodDisruptionBudget"]
    labels = budget["spec"]["selector"]["matchLabels"]
    assert labels.pop("ray.io/node-type") == "head"  # KubeRay's own label
    heads = [template for spec in SPECS for group, template in ray_pods(spec) if group == "head"]
    assert len([head for head in heads if labels.items() <= head["metadata"]["labels"].items()]) == 1
    # One head is all there is of it: a budget of more could never be met.
    assert budget["spec"]["minAvailable"] == 1


# -- the network --------------------------------------------------------------------------------------

POLICIES = [doc for path in FILES for doc in documents(path) if doc["kind"] == "NetworkPolicy"]
OUTSIDE = {"app.kubernetes.io/name", "kubernetes.io/metadata.name", "sae-ray/client"}  # labels of others' pods


def selectors(node: Any) -> list[dict[str, Any]]:
    """Every label selector below a node."""
    if isinstance(node, list):
        return [found for each in node for found in selectors(each)]
    if not isinstance(node, dict):
        return []
    here = [value for key, value in node.items() if key.endswith("Selector")]
    return here + [found for value in node.values() for found in selectors(value)]


def unknown_labels(policy: Any, ours: set[tuple[str, str]]) -> list[str]:
    """Labels that a policy selects by and that no pod of ours carries."""
    found = []
    for selector in selectors(policy["spec"]):
        found += [
            f"{k}={v}" for k, v in selector.get("matchLabels", {}).items() if (k, v) not in ours and k not in OUTSIDE
        ]
        keys = {key for key, _ in ours}
        found += [each["key"] for each in selector.get("matchExpressions", ()) if each["key"] not in keys]
    return found


def our_labels() -> set[tuple[str, str]]:
    stores = [doc["spec"]["template"] for path in FILES for doc in documents(path) if doc["kind"] == "StatefulSet"]
    pods = [template for spec in SPECS for _, template in ray_pods(spec)] + stores
    return {pair for pod in pods for pair in pod["metadata"]["labels"].items()}


def test_every_pod_is_behind_a_policy_that_selects_what_is_there() -> None:
    ours = our_labels()
    assert {pair for policy in POLICIES for pair in policy["spec"]["podSelector"]["matchLabels"].items()} == ours
    for policy in POLICIES:
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert unknown_labels(policy, ours) == []
        assert all("from" in rule for rule in policy["spec"]["ingress"])  # a rule without one lets everybody in
    mistaken = changed(POLICIES[0], "spec.podSelector.matchLabels", {"sae-ray/cluster": "run"})
    assert unknown_labels(mistaken, ours) == ["sae-ray/cluster=run"]


def test_only_ports_that_a_container_serves_are_opened_to_others() -> None:
    stores = [doc["spec"] for path in FILES for doc in documents(path) if doc["kind"] == "StatefulSet"]
    pods = [template for spec in SPECS for _, template in ray_pods(spec)] + [store["template"] for store in stores]
    for policy in POLICIES:
        wanted = policy["spec"]["podSelector"]["matchLabels"].items()
        behind = [pod for pod in pods if wanted <= pod["metadata"]["labels"].items()]
        served = {port["containerPort"] for pod in behind for port in pod["spec"]["containers"][0]["ports"]}
        opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())}
        assert opened <= served, policy["metadata"]["name"]
        # Without ports only one's own kind may come.
        free = [rule["from"] for rule in policy["spec"]["ingress"] if "ports" not in rule]
        assert all(peers == [{"podSelector": policy["spec"]["podSelector"]}] for peers in free)


def test_metrics_are_scraped_of_every_ray_pod() -> None:
    monitor = only(KUBERAY / "cluster/podmonitor.yaml")["spec"]
    (key,) = [each["key"] for each in monitor["selector"]["matchExpressions"]]
    (endpoint,) = monitor["podMetricsEndpoints"]
    for spec in SPECS:
        ports = {spec["headGroupSpec"]["rayStartParams"]["metrics-export-port"]}
        ports |= {group["rayStartParams"]["metrics-export-port"] for group in spec["workerGroupSpecs"]}
        for _, template in ray_pods(spec):
            named = {each["name"]: each["containerPort"] for each in template["spec"]["containers"][0]["ports"]}
            assert key in template["metadata"]["labels"]
            assert ports == {str(named[endpoint["port"]])}


# -- kustomize ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["cluster", "judges", "gcs-fault-tolerance"])
def test_what_kustomize_makes_is_valid(folder: str) -> None:
    for document in rendered(KUBERAY / folder):
        check(document)
        assert document["metadata"]["namespace"] == "sae-ray"


def test_gcs_keeps_its_state_in_a_store_that_is_there() -> None:
    made = rendered(KUBERAY / "gcs-fault-tolerance")
    specs = [spec for document in made for spec in cluster_specs(document)]
    service, store = ([doc for doc in made if doc["kind"] == kind] for kind in ("Service", "StatefulSet"))
    host, _, port = specs[0]["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    assert len(specs) == 2
    assert specs[0]["gcsFaultToleranceOptions"] == specs[1]["gcsFaultToleranceOptions"]
    assert host == service[0]["metadata"]["name"]
    assert int(port) == service[0]["spec"]["ports"][0]["port"]
    assert service[0]["spec"]["selector"] == store[0]["spec"]["selector"]["matchLabels"]
    password = specs[0]["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    assert store[0]["spec"]["template"]["spec"]["containers"][0]["env"] == [{"name": "PASSWORD", "valueFrom": password}]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", ["cluster", "judges", "gcs-fault-tolerance"])
def test_kubectl_renders_the_same(folder: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", KUBERAY / folder], capture_output=True, text=True, check=True, timeout=60
    )
    key: Callable[[Any], tuple[str, str]] = lambda document: (document["kind"], document["metadata"]["name"])  # noqa: E731
    assert sorted(yaml.safe_load_all(done.stdout), key=key) == sorted(rendered(KUBERAY / folder), key=key)


def test_the_rules_become_a_prometheus_rule() -> None:
    script = CLUSTER / "prometheus/prometheusrule.sh"
    (made,) = yaml.safe_load_all(subprocess.run([script], capture_output=True, text=True, check=True).stdout)
    check(made)
    assert made["spec"] == only(CLUSTER / "prometheus/rules.yaml")
    with pytest.raises(jsonschema.ValidationError):
        check(changed(made, "spec.groups.0.rules.0.expression", "up"))
