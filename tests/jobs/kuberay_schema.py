"""JSON Schemas of the Kubernetes objects in jobs/k8s, written by hand, for the used fields only.

RayJob and RayCluster follow KubeRay's custom resource definitions (ray.io_rayjobs.yaml, ray.io/v1),
the others the API of Kubernetes 1.30 (batch/v1, rbac.authorization.k8s.io/v1, v1). Only the named
fields are allowed, so that a misspelt one is refused,
which an API server may drop in silence.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
BOOL: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}


def struct(*required: str, **fields: Schema) -> Schema:
    """An object of these fields and no other."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def many(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def mapping(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def kind(api: str, name: str, *required: str, **fields: Schema) -> Schema:
    """A whole object of one kind."""
    about = {"apiVersion": {"const": api}, "kind": {"const": name}, "metadata": META}
    return struct("apiVersion", "kind", "metadata", *required, **about, **fields)


META = struct("name", name=NAME, namespace=NAME, labels=mapping(TEXT), annotations=mapping(TEXT))

RESOURCES = struct("requests", "limits", requests=mapping(QUANTITY), limits=mapping(QUANTITY))
POD_SECURITY = struct(
    runAsNonRoot=BOOL,
    runAsUser=COUNT,
    fsGroup=COUNT,
    seccompProfile=struct("type", type=one_of("RuntimeDefault", "Unconfined")),
)
CONTAINER = struct(
    "name",
    "image",
    "resources",
    name=NAME,
    image=TEXT,
    command=many(TEXT),
    args=many(TEXT),
    ports=many(struct("containerPort", containerPort=PORT, name=NAME)),
    env=many(struct("name", "value", name=TEXT, value={"type": "string"})),
    envFrom=many(struct("secretRef", secretRef=struct("name", name=NAME, optional=BOOL))),
    resources=RESOURCES,
    lifecycle=struct("preStop", preStop=struct("exec", exec=struct("command", command=many(TEXT)))),
    securityContext=struct(
        allowPrivilegeEscalation=BOOL,
        readOnlyRootFilesystem=BOOL,
        capabilities=struct("drop", drop=many(one_of("ALL"))),
    ),
    volumeMounts=many(struct("name", "mountPath", name=NAME, mountPath=TEXT, readOnly=BOOL)),
)
TOLERATION = struct(
    key=TEXT,
    operator=one_of("Exists", "Equal"),
    value=TEXT,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
POD = struct(
    "containers",
    containers=many(CONTAINER),
    restartPolicy=one_of("Never", "OnFailure", "Always"),
    serviceAccountName=NAME,
    automountServiceAccountToken=BOOL,
    terminationGracePeriodSeconds=COUNT,
    securityContext=POD_SECURITY,
    nodeSelector=mapping(TEXT),
    tolerations=many(TOLERATION),
    volumes=many(struct("name", "configMap", name=NAME, configMap=struct("name", name=NAME))),
)
TEMPLATE = struct(
    "spec", metadata=struct(labels=mapping(TEXT), annotations=mapping(TEXT)), spec=POD
)

HEAD = struct(
    "rayStartParams",
    "template",
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    rayStartParams=mapping(TEXT),
    template=TEMPLATE,
)
WORKERS = struct(
    "groupName",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    rayStartParams=mapping(TEXT),
    template=TEMPLATE,
)
RAY_CLUSTER = struct(
    "headGroupSpec",
    "workerGroupSpecs",
    "rayVersion",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=struct(mode=one_of("disabled", "token")),
    enableInTreeAutoscaling=BOOL,
    autoscalerOptions=struct(
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=COUNT,
        version=one_of("v1", "v2"),
        resources=RESOURCES,
    ),
    headGroupSpec=HEAD,
    workerGroupSpecs=many(WORKERS),
)
RAY_JOB = kind(
    "ray.io/v1",
    "RayJob",
    "spec",
    spec=struct(
        "entrypoint",
        "rayClusterSpec",
        entrypoint=TEXT,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        backoffLimit=COUNT,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        shutdownAfterJobFinishes=BOOL,
        ttlSecondsAfterFinished=COUNT,
        submitterConfig=struct(backoffLimit=COUNT),
        submitterPodTemplate=TEMPLATE,
        runtimeEnvYAML=TEXT,
        entrypointNumCpus={"type": "number", "minimum": 0},
        metadata=mapping(TEXT),
        suspend=BOOL,
        rayClusterSpec=RAY_CLUSTER,
    ),
)

CRON_JOB = kind(
    "batch/v1",
    "CronJob",
    "spec",
    spec=struct(
        "schedule",
        "jobTemplate",
        schedule={"type": "string", "pattern": r"^(\S+ ){4}\S+$"},
        timeZone=TEXT,
        concurrencyPolicy=one_of("Allow", "Forbid", "Replace"),
        startingDeadlineSeconds=COUNT,
        successfulJobsHistoryLimit=COUNT,
        failedJobsHistoryLimit=COUNT,
        suspend=BOOL,
        jobTemplate=struct(
            "spec",
            spec=struct(
                "template", backoffLimit=COUNT, activeDeadlineSeconds=COUNT, template=TEMPLATE
            ),
        ),
    ),
)
RULE = struct(
    "apiGroups",
    "resources",
    "verbs",
    apiGroups=many(TEXT),
    resources=many(TEXT),
    verbs=many(TEXT),
    resourceNames=many(NAME),
)
GROUP = "rbac.authorization.k8s.io"

SCHEMAS: dict[str, Schema] = {
    "RayJob": RAY_JOB,
    "CronJob": CRON_JOB,
    "Namespace": kind("v1", "Namespace"),
    "ServiceAccount": kind("v1", "ServiceAccount"),
    "Role": kind(f"{GROUP}/v1", "Role", "rules", rules=many(RULE)),
    "RoleBinding": kind(
        f"{GROUP}/v1",
        "RoleBinding",
        "roleRef",
        "subjects",
        roleRef=struct(
            "apiGroup",
            "kind",
            "name",
            apiGroup={"const": GROUP},
            kind=one_of("Role", "ClusterRole"),
            name=NAME,
        ),
        subjects=many(
            struct(
                "kind",
                "name",
                "namespace",
                kind={"const": "ServiceAccount"},
                name=NAME,
                namespace=NAME,
            )
        ),
    ),
    "Kustomization": struct(
        "apiVersion",
        "kind",
        "resources",
        apiVersion={"const": "kustomize.config.k8s.io/v1beta1"},
        kind={"const": "Kustomization"},
        resources=many(TEXT),
        namespace=NAME,
        images=many(struct("name", "newName", "newTag", name=NAME, newName=TEXT, newTag=TEXT)),
        patches=many(
            struct("target", "patch", target=struct("kind", kind=TEXT, name=NAME), patch=TEXT)
        ),
        replacements=many(
            struct(
                "source",
                "targets",
                source=struct("kind", "fieldPath", kind=TEXT, name=NAME, fieldPath=TEXT),
                targets=many(
                    struct(
                        "select",
                        "fieldPaths",
                        select=struct("kind", kind=TEXT, name=NAME),
                        fieldPaths=many(TEXT),
                    )
                ),
            )
        ),
    ),
}
"""By kind."""
