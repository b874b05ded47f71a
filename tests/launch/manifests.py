"""What must hold of a JobSet beyond its schema, and what JobSet makes of a Pod that ends."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SCHEMA = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
TPUS = {"tpu-v4-podslice": 3, "tpu-v5-lite-podslice": 2, "tpu-v5p-slice": 3, "tpu-v6e-slice": 2}
"""Names that GKE has for TPUs, and of how many numbers their topology is."""
ADDED_BY_JAX = {("", "pods", "list"), ("", "services", "list"), ("batch", "jobs", "get")}
"""What JAX asks Kubernetes for, in order to find the other Pods: API group, resource, verb."""


def parse(text: str) -> list[dict[str, Any]]:
    """Return the objects of a manifest, checked by the schema.

    Raises:
        ValueError: naming the place and what is wrong there.
    """
    found = list(yaml.safe_load_all(text))
    for one in found:
        # of one kind: an error of `oneOf` over all kinds would say nothing
        kind = (
            {"$ref": f"#/$defs/{one.get('kind')}"} if one.get("kind") in SCHEMA["$defs"] else SCHEMA
        )
        error = jsonschema.Draft202012Validator({**kind, "$defs": SCHEMA["$defs"]}).iter_errors(one)
        if first := next(iter(error), None):
            raise ValueError(
                f"{'/'.join(str(part) for part in first.absolute_path)}: {first.message}"
            )
    return found


def jobset(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JobSet of a manifest."""
    (found,) = (one for one in objects if one["kind"] == "JobSet")
    return found


def job(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the one kind of job of a JobSet."""
    (found,) = manifest["spec"]["replicatedJobs"]
    return found["template"]["spec"] | {"replicas": found["replicas"]}


def trainer(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the one container of a JobSet's Pods."""
    (found,) = job(manifest)["template"]["spec"]["containers"]
    return found


def require_sound(objects: list[dict[str, Any]]) -> None:
    """Refuse what a cluster would take, but which would not run, or not go on.

    Raises:
        ValueError: naming everything that is wrong.
    """
    manifest = jobset(objects)
    spec, one = job(manifest), trainer(manifest)
    pod = spec["template"]["spec"]
    requests, limits = (one.get("resources", {}).get(name) for name in ("requests", "limits"))
    mounts = {mount["name"]: mount["mountPath"] for mount in one.get("volumeMounts", ())}
    volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
    tag = re.search(r"[:@]([^/]+)$", one["image"])
    wrong = {
        "name": len(manifest["metadata"]["name"]) > 28,
        "backoffLimit": spec["backoffLimit"] != 0,
        "maxRestarts": manifest["spec"]["failurePolicy"]["maxRestarts"] < 1,
        "parallelism": spec["parallelism"] != spec["completions"],
        "completionMode": spec.get("completionMode") != "Indexed",
        "terminationGracePeriodSeconds": pod.get("terminationGracePeriodSeconds", 30) < 120,
        "restartPolicy": pod["restartPolicy"] != "Never",  # what a podFailurePolicy asks for
        "image": tag is None or tag[1] == "latest",
        "resources": requests is None or requests != limits,
        "runs": (
            mounts.get("runs") != "/runs" or "persistentVolumeClaim" not in volumes.get("runs", {})
        ),
        "shm": (
            mounts.get("shm") != "/dev/shm"
            or volumes.get("shm", {}).get("emptyDir", {}).get("medium") != "Memory"
        ),
        "volumeMounts": mounts.keys() != volumes.keys(),
        "args": (
            "--config" not in " ".join(one.get("args", ()))
            or "--workdir" not in " ".join(one.get("args", ()))
        ),
        "command": "command" in one,  # the image's entry point is the trainer
    }
    more = _tpu(manifest) if "google.com/tpu" in (limits or {}) else _gpu(manifest, objects)
    if names := [name for name, bad in {**wrong, **more}.items() if bad]:
        raise ValueError(", ".join(names))


def _tpu(manifest: Mapping[str, Any]) -> dict[str, bool]:
    spec, chips = job(manifest), trainer(manifest)["resources"]["limits"]["google.com/tpu"]
    selector = spec["template"]["spec"].get("nodeSelector", {})
    sides = [
        int(side) for side in selector.get("cloud.google.com/gke-tpu-topology", "0").split("x")
    ]
    alone = (
        manifest["metadata"]
        .get("annotations", {})
        .get("alpha.jobset.sigs.k8s.io/exclusive-topology")
    )
    return {
        "topology": math.prod(sides) != chips * spec["parallelism"],
        "accelerator": TPUS.get(selector.get("cloud.google.com/gke-tpu-accelerator")) != len(sides),
        "exclusive-topology": alone != "cloud.google.com/gke-nodepool",
    }


def _gpu(manifest: Mapping[str, Any], objects: list[dict[str, Any]]) -> dict[str, bool]:
    account = job(manifest)["template"]["spec"].get("serviceAccountName")
    by_kind = {one["kind"]: one for one in objects}
    role, binding = by_kind.get("Role", {}), by_kind.get("RoleBinding", {})
    allowed = {
        (group, resource, verb)
        for rule in role.get("rules", ())
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    names = {
        one.get("metadata", {}).get("name")
        for one in (by_kind.get("ServiceAccount", {}), role, binding)
    }
    subject = {one["name"] for one in binding.get("subjects", ())}
    dns = manifest["spec"].get("network", {})
    return {
        "gpu": "nvidia.com/gpu" not in trainer(manifest)["resources"]["limits"],
        "replicas": job(manifest)["replicas"] != 1,  # JAX counts the Pods of one Job
        "serviceAccountName": (
            names != {account} or subject != {account} or binding["roleRef"]["name"] != account
        ),
        "rules too few": not allowed >= ADDED_BY_JAX,
        "rules too many": any(
            verb not in ("get", "list") or resource == "secrets" for _, resource, verb in allowed
        ),
        "network": not (dns.get("enableDNSHostnames") and dns.get("publishNotReadyAddresses")),
        "runAsNonRoot": (
            not job(manifest)["template"]["spec"].get("securityContext", {}).get("runAsNonRoot")
        ),
    }


def outcome(manifest: Mapping[str, Any], code: int, *, disrupted: bool = False) -> str:
    """Return what the JobSet does when a Pod ends, as the controllers of Job and JobSet do: the
    first rule that fits.

    Args:
        manifest: a checked JobSet.
        code: exit code of the container.
        disrupted: whether Kubernetes has ended the Pod (the condition DisruptionTarget).

    Returns:
        `RestartJobSet`, which counts, or the action of a rule.
    """
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job(manifest)["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        if codes and (code in codes["values"]) == (codes["operator"] == "In"):
            said = (
                f"Container {codes['containerName']} for pod default/x failed with exit code {code}"
            )
        elif disrupted and any(
            condition["type"] == "DisruptionTarget" for condition in rule.get("onPodConditions", ())
        ):
            said = "Pod default/x has condition DisruptionTarget"
        else:
            continue
        if rule["action"] == "FailJob":
            reason, message = "PodFailurePolicy", f"{said} matching FailJob rule at index {index}"
        break
    for rule in manifest["spec"]["failurePolicy"].get("rules", ()):
        patterns = rule.get("onJobFailureMessagePatterns")
        if reason in rule.get("onJobFailureReasons", [reason]) and (
            not patterns or any(re.search(pattern, message) for pattern in patterns)
        ):
            return rule["action"]
    return "RestartJobSet"
