"""What a Ray pod of ours must be beside valid: unprivileged, probed, of one quality class, and with time to go."""

from __future__ import annotations

from typing import Any

# Between the end of a pod's own drain and the moment it is killed: Ray's own way down.
SECONDS_TO_STOP = 20


def faults(group: str, template: dict[str, Any]) -> list[str]:
    """What is wrong with a pod template, in words; nothing if all is well."""
    spec, found = template["spec"], []
    (container,) = spec["containers"]
    security, resources = container.get("securityContext", {}), container.get("resources", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        found.append("may run as root")
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        found.append("may gain privileges")
    if security.get("capabilities", {}).get("drop") != ["ALL"] or "add" in security.get("capabilities", {}):
        found.append("keeps capabilities")
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        found.append("has no seccomp profile")
    if not {"cpu", "memory"} <= resources.get("limits", {}).keys() or resources["limits"] != resources.get("requests"):
        found.append("requests are not its limits")
    found += [
        f"has no {probe}" for probe in ("startupProbe", "readinessProbe", "livenessProbe") if probe not in container
    ]
    if spec.get("restartPolicy") != "Never":
        found.append("would restart under the name of a node that Ray has given up")
    mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
    if mounted != {volume["name"] for volume in spec.get("volumes", ())}:
        found.append("mounts what it has not, or has what it does not mount")
    if group != "head":
        if spec.get("automountServiceAccountToken") is not False:
            found.append("holds a token for Kubernetes' API")
        found += _drain_faults(spec, container)
    return found


def _drain_faults(spec: dict[str, Any], container: dict[str, Any]) -> list[str]:
    command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if len(command) != 2 or command[0] != "drain-node":
        return ["does not drain before it stops"]
    if int(command[1]) + SECONDS_TO_STOP > spec.get("terminationGracePeriodSeconds", 30):
        return [f"is killed before its drain of {command[1]} s and Ray's way down are over"]
    return []
