"""A JSON schema of what our manifests use of JobSet v1alpha2 and of the objects inside it; it knows no other key.

Written from the API's reference (jobset.sigs.k8s.io, Kubernetes batch/v1 and core/v1): names, types, required keys,
enums and patterns.
"""

from __future__ import annotations

from typing import Any

NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}


def table(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def array(items: Any, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


CONTAINER = table(
    ("name", "image"),
    name=NAME,
    image=TEXT,
    command=array(TEXT, 1),
    args=array(TEXT),
    env=array(table(("name",), name=TEXT, value=TEXT)),
    ports=array(
        table(("containerPort",), containerPort={"type": "integer", "minimum": 1, "maximum": 65535}, name=NAME)
    ),
    resources=table(
        limits={"type": "object", "additionalProperties": QUANTITY},
        requests={"type": "object", "additionalProperties": QUANTITY},
    ),
    volumeMounts=array(table(("name", "mountPath"), name=NAME, mountPath=TEXT, readOnly={"type": "boolean"})),
)
VOLUME = table(
    ("name",),
    name=NAME,
    csi=table(("driver",), driver=TEXT, readOnly={"type": "boolean"}, volumeAttributes=TEXTS),
    persistentVolumeClaim=table(("claimName",), claimName=NAME, readOnly={"type": "boolean"}),
)
POD = table(
    ("containers",),
    restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=TEXTS,
    serviceAccountName=NAME,
    containers=array(CONTAINER, 1),
    volumes=array(VOLUME),
)
POD_FAILURE_RULE = {
    **table(
        ("action",),
        action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
        onExitCodes=table(
            ("operator", "values"),
            containerName=NAME,
            operator={"enum": ["In", "NotIn"]},
            values={"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 255},
        ),
        onPodConditions=array(table(("type", "status"), type=TEXT, status={"enum": ["True", "False", "Unknown"]}), 1),
    ),
    "oneOf": [{"required": ["onExitCodes"]}, {"required": ["onPodConditions"]}],
}
JOB = table(
    ("template",),
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit=COUNT,
    podFailurePolicy=table(("rules",), rules={**array(POD_FAILURE_RULE, 1), "maxItems": 20}),
    template=table(("spec",), metadata=table(annotations=TEXTS, labels=TEXTS), spec=POD),
)
SCHEMA = table(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=table(("name",), name=NAME, namespace=NAME, annotations=TEXTS, labels=TEXTS),
    spec=table(
        failurePolicy=table(
            maxRestarts=COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules=array(
                table(
                    ("name", "action"),
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    onJobFailureReasons=array(
                        {
                            "enum": [
                                "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            ]
                        }
                    ),
                    targetReplicatedJobs=array(NAME),
                )
            ),
        ),
        network=table(
            enableDNSHostnames={"type": "boolean"}, publishNotReadyAddresses={"type": "boolean"}, subdomain=NAME
        ),
        replicatedJobs=array(
            table(("name", "template"), name=NAME, replicas=COUNT, template=table(("spec",), spec=JOB)), 1
        ),
    ),
)  # fmt: skip
