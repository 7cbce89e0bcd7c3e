"""JSON schemas of what cluster/kuberay holds, pruned to the documented fields that a cluster of ours could want.

Written from the field references of KubeRay 1.6 (`ray.io/v1`), Kubernetes' core and networking API and Prometheus'
operator. An unknown key fails, as it would (or would silently be dropped) in a real cluster.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string", "minLength": 1}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
PORT: Schema = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, STRING]}
LABELS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"},
    "additionalProperties": {"type": "string", "pattern": r"^[A-Za-z0-9]?([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"},
}
STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def array(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def struct(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# -- Kubernetes ---------------------------------------------------------------------------------------

METADATA = struct(name=STRING, generateName=STRING, namespace=STRING, labels=LABELS, annotations=STRINGS)
METADATA["anyOf"] = [{"required": ["name"]}, {"required": ["generateName"]}]
TEMPLATE_METADATA = struct(labels=LABELS, annotations=STRINGS)
SELECTOR = struct(
    matchLabels=LABELS,
    matchExpressions=array(
        struct("key", "operator", key=STRING, operator=one_of("In", "NotIn", "Exists", "DoesNotExist"),
               values=array(STRING))
    ),
)  # fmt: skip
RESOURCES = struct(
    limits={"type": "object", "additionalProperties": QUANTITY},
    requests={"type": "object", "additionalProperties": QUANTITY},
)
CAPABILITIES = struct(drop=array(STRING), add=array(STRING))
SECCOMP = struct("type", type=one_of("RuntimeDefault", "Localhost", "Unconfined"), localhostProfile=STRING)
SECURITY = struct(
    allowPrivilegeEscalation=BOOLEAN, capabilities=CAPABILITIES, privileged=BOOLEAN, readOnlyRootFilesystem=BOOLEAN,
    runAsGroup=COUNT, runAsNonRoot=BOOLEAN, runAsUser=COUNT, seccompProfile=SECCOMP,
)  # fmt: skip
POD_SECURITY = struct(
    fsGroup=COUNT, fsGroupChangePolicy=one_of("OnRootMismatch", "Always"), runAsGroup=COUNT, runAsNonRoot=BOOLEAN,
    runAsUser=COUNT, seccompProfile=SECCOMP, supplementalGroups=array(COUNT),
)  # fmt: skip
EXEC = struct("command", command=array(STRING, 1))
HTTP_GET = struct("port", path=STRING, port=PORT, scheme=one_of("HTTP", "HTTPS"))
PROBE = struct(
    exec=EXEC, httpGet=HTTP_GET, tcpSocket=struct("port", port=PORT), initialDelaySeconds=COUNT, periodSeconds=COUNT,
    timeoutSeconds=COUNT, failureThreshold=COUNT, successThreshold=COUNT,
)  # fmt: skip
PROBE["oneOf"] = [{"required": [way]} for way in ("exec", "httpGet", "tcpSocket")]
KEY_REF = struct("name", "key", name=STRING, key=STRING, optional=BOOLEAN)
VALUE_FROM = struct(secretKeyRef=KEY_REF, configMapKeyRef=KEY_REF, fieldRef=struct("fieldPath", fieldPath=STRING))
ENV = struct("name", name=STRING, value={"type": "string"}, valueFrom=VALUE_FROM)
NAMED_REF = struct("name", name=STRING, optional=BOOLEAN)
ENV_FROM = struct(secretRef=NAMED_REF, configMapRef=NAMED_REF, prefix=STRING)
MOUNT = struct("name", "mountPath", name=STRING, mountPath=STRING, subPath=STRING, readOnly=BOOLEAN)
HANDLER = struct(exec=EXEC, httpGet=HTTP_GET, sleep=struct("seconds", seconds=COUNT))
PULL_POLICY = one_of("Always", "IfNotPresent", "Never")
CONTAINER = struct(
    "name", "image", name=STRING, image=STRING, imagePullPolicy=PULL_POLICY, command=array(STRING), args=array(STRING),
    workingDir=STRING, env=array(ENV), envFrom=array(ENV_FROM), resources=RESOURCES, securityContext=SECURITY,
    ports=array(struct("containerPort", name=STRING, containerPort=COUNT, protocol=one_of("TCP", "UDP"))),
    volumeMounts=array(MOUNT), lifecycle=struct(preStop=HANDLER, postStart=HANDLER),
    startupProbe=PROBE, readinessProbe=PROBE, livenessProbe=PROBE,
)  # fmt: skip
VOLUME = struct(
    "name", name=STRING, emptyDir=struct(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
    persistentVolumeClaim=struct("claimName", claimName=STRING, readOnly=BOOLEAN),
    configMap=struct("name", name=STRING, optional=BOOLEAN), secret=struct("secretName", secretName=STRING),
)  # fmt: skip
TOLERATION = struct(
    key=STRING, operator=one_of("Exists", "Equal"), value=STRING, tolerationSeconds=COUNT,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)  # fmt: skip
POD = struct(
    "containers", containers=array(CONTAINER, 1), initContainers=array(CONTAINER), volumes=array(VOLUME),
    restartPolicy=one_of("Always", "OnFailure", "Never"), terminationGracePeriodSeconds=COUNT, nodeSelector=LABELS,
    securityContext=POD_SECURITY, tolerations=array(TOLERATION), serviceAccountName=STRING, priorityClassName=STRING,
    automountServiceAccountToken=BOOLEAN, imagePullSecrets=array(struct("name", name=STRING)),
)  # fmt: skip
POD_TEMPLATE = struct("spec", metadata=TEMPLATE_METADATA, spec=POD)
SERVICE_SPEC = struct(
    clusterIP=STRING, selector=LABELS, type=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    ports=array(struct("port", name=STRING, port=COUNT, targetPort=PORT, protocol=one_of("TCP", "UDP"))),
)  # fmt: skip
CLAIM_SPEC = struct(
    "accessModes", "resources",
    accessModes=array(one_of("ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"), 1),
    resources=RESOURCES, storageClassName=STRING, volumeMode=one_of("Filesystem", "Block"),
)  # fmt: skip
STATEFUL_SET_SPEC = struct(
    "serviceName", "selector", "template", serviceName=STRING, replicas=COUNT, selector=SELECTOR, template=POD_TEMPLATE,
    volumeClaimTemplates=array(struct("metadata", "spec", metadata=struct("name", name=STRING), spec=CLAIM_SPEC)),
)  # fmt: skip
PEER = struct(
    podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock=struct("cidr", cidr=STRING, **{"except": array(STRING)})
)
POLICY_PORT = struct(protocol=one_of("TCP", "UDP", "SCTP"), port=PORT, endPort=COUNT)
NETWORK_POLICY_SPEC = struct(
    "podSelector", podSelector=SELECTOR, policyTypes=array(one_of("Ingress", "Egress"), 1),
    ingress=array(struct(ports=array(POLICY_PORT), **{"from": array(PEER, 1)})),
    egress=array(struct(to=array(PEER, 1), ports=array(POLICY_PORT))),
)  # fmt: skip

# -- KubeRay ------------------------------------------------------------------------------------------

AUTH_OPTIONS = struct(mode=one_of("token", "disabled"), secretName=STRING, enableK8sTokenAuth=BOOLEAN)
AUTOSCALER_OPTIONS = struct(
    version=one_of("v1", "v2"), upscalingMode=one_of("Default", "Aggressive", "Conservative"), image=STRING,
    idleTimeoutSeconds=COUNT, imagePullPolicy=PULL_POLICY, securityContext=SECURITY, resources=RESOURCES,
    env=array(ENV), envFrom=array(ENV_FROM), volumeMounts=array(MOUNT),
)  # fmt: skip
CREDENTIAL = struct(value=STRING, valueFrom=VALUE_FROM)
GCS_OPTIONS = struct(
    redisAddress=STRING, redisUsername=CREDENTIAL, redisPassword=CREDENTIAL, externalStorageNamespace=STRING
)
SERVICE = struct(metadata=TEMPLATE_METADATA, spec=SERVICE_SPEC)
HEAD_GROUP = struct(
    "template", template=POD_TEMPLATE, rayStartParams=STRINGS, labels=LABELS, resources=STRINGS, headService=SERVICE,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"), enableIngress=BOOLEAN,
)  # fmt: skip
WORKER_GROUP = struct(
    "groupName", "minReplicas", "maxReplicas", "template", groupName=STRING, replicas=COUNT, minReplicas=COUNT,
    maxReplicas=COUNT, numOfHosts=COUNT, idleTimeoutSeconds=COUNT, suspend=BOOLEAN, rayStartParams=STRINGS,
    labels=LABELS, resources=STRINGS, template=POD_TEMPLATE, scaleStrategy=struct(workersToDelete=array(STRING)),
)  # fmt: skip
RAY_CLUSTER_SPEC = struct(
    "headGroupSpec", "rayVersion", headGroupSpec=HEAD_GROUP, workerGroupSpecs=array(WORKER_GROUP), rayVersion=STRING,
    authOptions=AUTH_OPTIONS, enableInTreeAutoscaling=BOOLEAN, autoscalerOptions=AUTOSCALER_OPTIONS, suspend=BOOLEAN,
    gcsFaultToleranceOptions=GCS_OPTIONS, headServiceAnnotations=STRINGS, managedBy=STRING,
)  # fmt: skip
RAY_JOB_SPEC = struct(
    "entrypoint", entrypoint=STRING, activeDeadlineSeconds=COUNT, backoffLimit=COUNT, clusterSelector=LABELS,
    rayClusterSpec=RAY_CLUSTER_SPEC, submitterPodTemplate=POD_TEMPLATE, metadata=STRINGS, runtimeEnvYAML=STRING,
    jobId=STRING, submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), suspend=BOOLEAN,
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, entrypointResources=STRING,
    shutdownAfterJobFinishes=BOOLEAN, ttlSecondsAfterFinished=COUNT, submitterConfig=struct(backoffLimit=COUNT),
    managedBy=STRING,
)  # fmt: skip
# What its own cluster would have, a job on somebody else's must not say.
RAY_JOB_SPEC["oneOf"] = [
    {"required": ["rayClusterSpec"]},
    {"required": ["clusterSelector"], "properties": {"shutdownAfterJobFinishes": False, "backoffLimit": False}},
]
RAY_SERVICE_SPEC = struct(
    "serveConfigV2", "rayClusterConfig", serveConfigV2=STRING, rayClusterConfig=RAY_CLUSTER_SPEC, serveService=SERVICE,
    upgradeStrategy=struct(type=one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None")),
    excludeHeadPodFromServeSvc=BOOLEAN,
)  # fmt: skip

# -- Prometheus' operator, kustomize ------------------------------------------------------------------

RELABELING = struct(
    action=one_of("replace", "keep", "drop", "labelmap", "labeldrop", "labelkeep"), sourceLabels=array(STRING),
    targetLabel=STRING, regex=STRING, replacement=STRING, separator=STRING,
)  # fmt: skip
POD_MONITOR_SPEC = struct(
    "selector", "podMetricsEndpoints", selector=SELECTOR, jobLabel=STRING, podTargetLabels=array(STRING),
    namespaceSelector=struct(any=BOOLEAN, matchNames=array(STRING)),
    podMetricsEndpoints=array(
        struct(port=STRING, path=STRING, interval=STRING, scrapeTimeout=STRING, relabelings=array(RELABELING)), 1
    ),
)  # fmt: skip
ALERT = struct(
    "alert", "expr", alert={"type": "string", "pattern": "^SaeRay[A-Za-z]+$"}, expr=STRING, labels=STRINGS,
    annotations=struct("summary", "description", summary=STRING, description=STRING),
    **{"for": {"type": "string", "pattern": r"^\d+[smhd]$"}},
)  # fmt: skip
RULES = struct("groups", groups=array(struct("name", "rules", name=STRING, rules=array(ALERT, 1), interval=STRING), 1))


def document(api: str, kind: str, spec: Schema) -> Schema:
    return struct(
        "apiVersion", "kind", "metadata", "spec",
        apiVersion={"const": api}, kind={"const": kind}, metadata=METADATA, spec=spec,
    )  # fmt: skip


DISRUPTION_BUDGET_SPEC = struct(
    "selector", selector=SELECTOR, minAvailable=COUNT, maxUnavailable=COUNT,
    unhealthyPodEvictionPolicy=one_of("IfHealthyBudget", "AlwaysAllow"),
)  # fmt: skip
DISRUPTION_BUDGET_SPEC["oneOf"] = [{"required": ["minAvailable"]}, {"required": ["maxUnavailable"]}]


_SPECS = {
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER_SPEC,
    ("ray.io/v1", "RayJob"): RAY_JOB_SPEC,
    ("ray.io/v1", "RayService"): RAY_SERVICE_SPEC,
    ("v1", "Service"): SERVICE_SPEC,
    ("v1", "PersistentVolumeClaim"): CLAIM_SPEC,
    ("apps/v1", "StatefulSet"): STATEFUL_SET_SPEC,
    ("networking.k8s.io/v1", "NetworkPolicy"): NETWORK_POLICY_SPEC,
    ("policy/v1", "PodDisruptionBudget"): DISRUPTION_BUDGET_SPEC,
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR_SPEC,
    ("monitoring.coreos.com/v1", "PrometheusRule"): RULES,
}
SCHEMAS: dict[str, Schema] = {kind: document(api, kind, spec) for (api, kind), spec in _SPECS.items()}
SCHEMAS["Kustomization"] = struct(
    "apiVersion", "kind", "resources",
    apiVersion={"const": "kustomize.config.k8s.io/v1beta1"}, kind={"const": "Kustomization"}, namespace=STRING,
    resources=array(STRING, 1),
    patches=array(struct("patch", patch=STRING, target=struct(group=STRING, version=STRING, kind=STRING, name=STRING))),
)  # fmt: skip
