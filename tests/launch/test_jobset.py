"""launch/jobset.sh, tpu_jobset.yaml, gpu_jobset.yaml: by schema, by meaning, and by what becomes of
every exit code.
"""

from __future__ import annotations

import re
import string
from pathlib import Path

import jsonschema
import pytest

from jaxpeft.processes import clusters
from tests.launch.helpers import IMAGE, LAUNCH, Stubs, bash, mutated
from tests.launch.manifests import SCHEMA, job, jobset, outcome, parse, require_sound, trainer

JOBSET = LAUNCH / "jobset.sh"
RUN = [
    "--config",
    "configs/llama3_8b_lora.py",
    '--config.data.train=a "b" \\ c: &d #e ${NAME} ${GPUS} ${CHIPS}',
]
TPU = {"NAME": "llama", "IMAGE": IMAGE, "TOPOLOGY": "4x4", "SLICES": "2"}
GPU = {"NAME": "llama", "IMAGE": IMAGE, "NODES": "2"}
SET = {"tpu": TPU, "gpu": GPU}


def rendered(kind: str, stubs: Stubs, *, script: Path = JOBSET, **more: str) -> str:
    done = bash(script, kind, *RUN, env=stubs.environment(**(SET[kind] | more), DRY_RUN="1"))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_manifest_is_as_it_should_be(kind: str, stubs: Stubs) -> None:
    stubs.add("kubectl")
    objects = parse(rendered(kind, stubs))
    require_sound(objects)
    assert trainer(jobset(objects))["args"] == [*RUN, "--workdir=/runs/llama"]
    assert stubs.calls() == []  # a dry run calls nothing


@pytest.mark.parametrize(
    ("more", "hosts", "slices"),
    [
        ({"TOPOLOGY": "2x4", "SLICES": "1"}, 2, 1),
        ({"TOPOLOGY": "16x16", "SLICES": "4", "ACCELERATOR": "tpu-v6e-slice"}, 64, 4),
        ({"TOPOLOGY": "4x4x8", "ACCELERATOR": "tpu-v5p-slice"}, 32, 2),
        ({"TOPOLOGY": "2x4", "CHIPS": "8"}, 1, 2),
    ],
)
def test_hosts_follow_from_the_topology(
    more: dict[str, str], hosts: int, slices: int, stubs: Stubs
) -> None:
    objects = parse(rendered("tpu", stubs, **more))
    require_sound(objects)
    assert (job(jobset(objects))["parallelism"], job(jobset(objects))["replicas"]) == (
        hosts,
        slices,
    )


OUTCOMES = {
    "bad input ends it": (2, False, "FailJobSet"),
    "bad input of a Pod that is taken away": (2, True, "FailJobSet"),
    "stopped and saved": (143, False, "RestartJobSetAndIgnoreMaxRestarts"),
    "taken away and saved": (143, True, "RestartJobSetAndIgnoreMaxRestarts"),
    "taken away and killed": (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
    "a failure counts": (1, False, "RestartJobSet"),
    "a lost peer counts": (134, False, "RestartJobSet"),
    "out of memory counts": (137, False, "RestartJobSet"),
}


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
@pytest.mark.parametrize(("code", "disrupted", "action"), OUTCOMES.values(), ids=list(OUTCOMES))
def test_what_becomes_of_an_exit_code(
    kind: str, code: int, disrupted: bool, action: str, stubs: Stubs
) -> None:
    assert outcome(jobset(parse(rendered(kind, stubs))), code, disrupted=disrupted) == action


def test_rules_that_end_a_preempted_job_would_be_noticed(stubs: Stubs, tmp_path: Path) -> None:
    """All rules for Pods fail a Job for one reason: without the message, a preemption looks like
    bad input.
    """
    without = mutated(
        LAUNCH / "tpu_jobset.yaml",
        '        onJobFailureMessagePatterns: ["exit code 2 matching"]\n',
        "",
        tmp_path,
    )
    text = rendered("tpu", stubs, script=without.parent / "jobset.sh")
    assert outcome(jobset(parse(text)), 143) == "FailJobSet"


MISSPELT = {
    "maxRestarts": ("maxRestarts: 50", "maxRestart: 50", "spec/failurePolicy: .*maxRestart"),
    "nodeSelector": ("nodeSelector:", "nodeselector:", "nodeselector"),
    "a count as a text": (
        "parallelism: 4",
        'parallelism: "4"',
        "parallelism: '4' is not of type 'integer'",
    ),
    "no container": ("containers:", "initContainers:", "'containers' is a required property"),
    "grace": ("terminationGracePeriodSeconds", "terminationGracePeriod", "terminationGracePeriod"),
    "no image": (f"image: {IMAGE}", "image:", "image: None is not of type 'string'"),
    "restartPolicy": (
        "restartPolicy: Never",
        "restartPolicy: Sometimes",
        "'Sometimes' is not one of",
    ),
    "action of the JobSet": (
        "action: FailJobSet",
        "action: StopJobSet",
        "'StopJobSet' is not one of",
    ),
    "action of the Job": ("action: FailJob\n", "action: Fail\n", "'Fail' is not one of"),
    "a condition's status as a truth value": (
        'status: "True"',
        "status: true",
        "True is not one of",
    ),
    "exit code 0": ("values: [2]", "values: [0]", "0 is less than the minimum"),
    "reason": (
        "onJobFailureReasons: [PodFailurePolicy]",
        "onJobFailureReasons: [PodFailure]",
        "'PodFailure' is not one of",
    ),
    "kind": ("kind: JobSet", "kind: Jobset", "is not valid under any of the given schemas"),
    "apiVersion": ("v1alpha2", "v1", "was expected"),
}


@pytest.mark.parametrize(("before", "after", "said"), MISSPELT.values(), ids=list(MISSPELT))
def test_a_misspelt_manifest_is_refused(before: str, after: str, said: str, stubs: Stubs) -> None:
    text = rendered("tpu", stubs)
    assert before in text
    with pytest.raises(ValueError, match=said):
        parse(text.replace(before, after, 1))


UNSOUND = {
    "the topology has other hosts": (
        "tpu",
        "parallelism: 4",
        "parallelism: 2",
        "parallelism, topology",
    ),
    "other chips than the topology": ("tpu", "google.com/tpu: 4", "google.com/tpu: 8", "resources"),
    "a topology of another TPU": ("tpu", "tpu-v5-lite-podslice", "tpu-v5p-slice", "accelerator"),
    "slices may share a node pool": (
        "tpu",
        "exclusive-topology:",
        "exclusive:",
        "exclusive-topology",
    ),
    "pods are tried one by one": ("tpu", "backoffLimit: 0", "backoffLimit: 6", "backoffLimit"),
    "no restart": ("tpu", "maxRestarts: 50", "maxRestarts: 0", "maxRestarts"),
    "no time to save": (
        "gpu",
        "GracePeriodSeconds: 300",
        "GracePeriodSeconds: 30",
        "terminationGracePeriodSeconds",
    ),
    "restarted on the node": (
        "gpu",
        "restartPolicy: Never",
        "restartPolicy: OnFailure",
        "restartPolicy",
    ),
    "a name that is too long": ("tpu", "name: llama", f"name: {'a' * 29}", "name"),
    "an image that may change": ("gpu", IMAGE, "jaxpeft:latest", "image"),
    "no number of the Pod": (
        "gpu",
        "completionMode: Indexed",
        "completionMode: NonIndexed",
        "completionMode",
    ),
    "no shared memory": ("gpu", "medium: Memory", 'medium: ""', "shm"),
    "the runs go with the Pod": ("gpu", "mountPath: /runs", "mountPath: /run", "runs"),
    "another shell in front": (
        "gpu",
        "          args:",
        "          command: [bash]\n                  args:",
        "command",
    ),
    "a role that is too small": (
        "gpu",
        "resources: [jobs]",
        "resources: [cronjobs]",
        "rules too few",
    ),
    "a role that is too large": (
        "gpu",
        "verbs: [get, list]",
        "verbs: [get, list, delete]",
        "rules too many",
    ),
    "a role for secrets": (
        "gpu",
        "[pods, services]",
        "[pods, services, secrets]",
        "rules too many",
    ),
    "another account": (
        "gpu",
        "serviceAccountName: llama",
        "serviceAccountName: default",
        "serviceAccountName",
    ),
    "root": ("gpu", "runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot"),
    "no names": ("gpu", "enableDNSHostnames: true", "enableDNSHostnames: false", "network"),
}


@pytest.mark.parametrize(("kind", "before", "after", "said"), UNSOUND.values(), ids=list(UNSOUND))
def test_an_unsound_manifest_is_refused(
    kind: str, before: str, after: str, said: str, stubs: Stubs
) -> None:
    text = rendered(kind, stubs)
    assert before in text
    objects = parse(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=f"^{said}$"):
        require_sound(objects)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_envsubst_would_fill_in_the_same(kind: str, stubs: Stubs) -> None:
    text = (LAUNCH / f"{kind}_jobset.yaml").read_text()
    once = rendered(kind, stubs)
    manifest = jobset(parse(once))
    args = re.search(r"args: (.*)", once)
    assert args is not None
    values = {
        "NAME": "llama",
        "IMAGE": IMAGE,
        "CLAIM": "runs",
        "ARGS": args[1],
        "SLICES": "2",
        "HOSTS": "4",
        "CHIPS": "4",
        "TOPOLOGY": "4x4",
        "NODES": "2",
        "GPUS": "8",
        "ACCELERATOR": next(iter(job(manifest)["template"]["spec"]["nodeSelector"].values())),
    }
    assert string.Template(text).substitute(values) == once


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_it_is_applied(kind: str, stubs: Stubs) -> None:
    stubs.add("kubectl")
    done = bash(JOBSET, kind, *RUN, env=stubs.environment(**SET[kind], NAMESPACE="team"))
    assert done.returncode == 0, done.stderr
    asked, applied = stubs.noted()
    assert asked["arguments"] == [
        "--namespace=team",
        "get",
        "jobset",
        "llama",
        "--ignore-not-found",
        "--output=jsonpath={.status.terminalState}",
    ]
    assert applied["arguments"] == ["--namespace=team", "apply", "--filename=-"]
    assert applied["stdin"] == rendered(kind, stubs)


@pytest.mark.parametrize(
    ("state", "verbs"), [("Failed", ["get", "delete", "apply"]), ("", ["get", "apply"])]
)
def test_a_job_that_has_ended_is_deleted_first(state: str, verbs: list[str], stubs: Stubs) -> None:
    stubs.add("kubectl", f'[[ "$1" != get ]] || printf "{state}"')
    assert bash(JOBSET, "gpu", *RUN, env=stubs.environment(**GPU)).returncode == 0
    assert [call[0] for call in stubs.calls("kubectl")] == verbs
    if state:
        assert stubs.calls("kubectl")[1] == [
            "delete",
            "jobset",
            "llama",
            "--cascade=foreground",
            "--wait=true",
        ]


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("tpu", {"NAME": ""}, "NAME=: is not 1 to 28 characters"),
        ("tpu", {"NAME": "x" * 29}, "is not 1 to 28 characters"),
        ("tpu", {"IMAGE": "jaxpeft"}, "IMAGE=jaxpeft: is not an image with a tag"),
        ("gpu", {"IMAGE": "jaxpeft:latest"}, "latest may be another image after a restart"),
        (
            "gpu",
            {"IMAGE": "localhost:5000/jaxpeft"},
            "localhost:5000/jaxpeft: is not an image with a tag",
        ),
        ("tpu", {"TOPOLOGY": "4"}, "TOPOLOGY=4: is not a topology"),
        (
            "tpu",
            {"TOPOLOGY": "3x3"},
            "TOPOLOGY=3x3: has 9 chips, not a multiple of CHIPS=4 per host",
        ),
        ("tpu", {"SLICES": "0"}, "SLICES=0: is not a count"),
        ("gpu", {"NODES": "two"}, "NODES=two: is not a count"),
        ("gpu", {"CLAIM": "a b"}, "CLAIM=a b: is not the name of a claim"),
        ("cpu", {}, "cpu: is not tpu or gpu"),
    ],
)
def test_bad_input_is_refused(kind: str, change: dict[str, str], said: str, stubs: Stubs) -> None:
    stubs.add("kubectl")
    done = bash(JOBSET, kind, *RUN, env=stubs.environment(**(SET.get(kind, TPU) | change)))
    assert done.returncode == 2 and said in done.stderr
    assert stubs.calls() == []


def test_every_problem_is_said_at_once(stubs: Stubs) -> None:
    done = bash(JOBSET, "gpu", env=stubs.environment(NAME="a_b", NODES="0"))
    assert done.returncode == 2
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        "NODES=0",
        "NAME=a_b",
        "IMAGE=",
        "--config",
    ]


def test_a_topology_and_what_else_is_wrong_are_said_at_once(stubs: Stubs) -> None:
    done = bash(
        JOBSET, "tpu", *RUN, env=stubs.environment(**(TPU | {"TOPOLOGY": "3x3", "SLICES": "0"}))
    )
    assert "TOPOLOGY=3x3: has 9 chips" in done.stderr and "SLICES=0: is not a count" in done.stderr


@pytest.mark.parametrize("name", [["--name", "x"], ["--name=x"], ["-name=x"]])
def test_a_folder_in_the_container_is_refused(name: list[str], stubs: Stubs) -> None:
    done = bash(JOBSET, "gpu", *RUN, *name, env=stubs.environment(**GPU, DRY_RUN="1"))
    assert (
        done.returncode == 2 and "jobset.sh: --name: its folder is not on the store" in done.stderr
    )


def test_a_workdir_that_is_given_stays(stubs: Stubs) -> None:
    done = bash(
        JOBSET, "gpu", *RUN, "--workdir", "/runs/mine", env=stubs.environment(**GPU, DRY_RUN="1")
    )
    assert trainer(jobset(parse(done.stdout)))["args"] == [*RUN, "--workdir", "/runs/mine"]


def test_a_dry_run_of_0_is_none(stubs: Stubs) -> None:
    stubs.add("kubectl")
    assert bash(JOBSET, "gpu", *RUN, env=stubs.environment(**GPU, DRY_RUN="0")).returncode == 0
    assert [call[0] for call in stubs.calls("kubectl")] == ["get", "apply"]


def test_pods_find_their_place_from_what_gke_sets(stubs: Stubs) -> None:
    spec = job(jobset(parse(rendered("tpu", stubs))))
    hosts, slices = spec["parallelism"], spec["replicas"]
    names = ",".join(f"llama-slice-0-{host}.llama" for host in range(hosts))
    places = [
        clusters.find(
            {
                "TPU_WORKER_HOSTNAMES": names,
                "TPU_WORKER_ID": str(host),
                "MEGASCALE_NUM_SLICES": str(slices),
                "MEGASCALE_SLICE_ID": str(one),
                "MEGASCALE_COORDINATOR_ADDRESS": "llama-slice-0-0.llama",
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
                "JOB_COMPLETION_INDEX": str(host),
            }
        )
        for one in range(slices)
        for host in range(hosts)
    ]
    assert [(place.by, place.processes, place.process) for place in places] == [
        ("TPU", 8, i) for i in range(8)
    ]


def test_pods_with_gpus_ask_kubernetes(stubs: Stubs) -> None:
    # which sets JOB_COMPLETION_INDEX
    assert job(jobset(parse(rendered("gpu", stubs))))["completionMode"] == "Indexed"
    place = clusters.find({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    assert (place.by, place.process, place.found_by_jax) == ("Kubernetes", 1, True)
