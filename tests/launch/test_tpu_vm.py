"""launch/tpu_vm.sh and launch/tpu_host.sh: the commands that they print and call, and what `keep`
makes of what it sees.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.launch.helpers import IMAGE, LAUNCH, ROOT, Stubs, bash, mutated

TPU_VM, TPU_HOST = LAUNCH / "tpu_vm.sh", LAUNCH / "tpu_host.sh"
GOLDEN = Path(__file__).parent / "golden"
SET = {
    "NAME": "llama",
    "ZONE": "us-west4-a",
    "TYPE": "v5litepod-16",
    "IMAGE": IMAGE,
    "STORE": "gs://bucket",
}
RUN = [
    "--config",
    "configs/llama3_8b_lora.py",
    "--config.method.rank=8",
    "--config.data.train=two words.jsonl",
]
SLICES = {
    "SLICES": "2",
    "SPOT": "0",
    "PROJECT": "mine",
    "STORE": "10.0.0.2:/share",
    "RUNTIME": "v2-alpha-tpuv5-lite",
}


@pytest.mark.parametrize(("name", "more"), [("one_slice", {}), ("two_slices", SLICES)])
def test_dry_run_prints_what_the_golden_file_has(
    name: str, more: dict[str, str], stubs: Stubs
) -> None:
    assert printed(TPU_VM, stubs, more) == (GOLDEN / f"tpu_vm_{name}.txt").read_text()
    assert stubs.calls() == []  # a dry run calls nothing


def printed(script: Path, stubs: Stubs, more: dict[str, str]) -> str:
    stubs.add("gcloud")
    said = ""
    for verb in ("create", "setup", "run", "status", "logs", "stop", "delete", "keep"):
        words = [verb, *(RUN if verb in {"run", "keep"} else [])]
        done = bash(script, *words, env=stubs.environment(**(SET | more), DRY_RUN="1"))
        assert (done.returncode, done.stderr) == (0, "")
        said += f"$ launch/tpu_vm.sh {shlex.join(words)}\n{done.stdout}"
    return said.replace(str(script.parent.parent), "ROOT")


def test_a_script_that_asks_for_no_spot_machines_would_be_noticed(
    stubs: Stubs, tmp_path: Path
) -> None:
    without = mutated(TPU_VM, "options+=(--spot)", "true", tmp_path)
    assert printed(without, stubs, {}) != (GOLDEN / "tpu_vm_one_slice.txt").read_text()


def test_what_is_printed_is_what_is_called(stubs: Stubs) -> None:
    stubs.add("gcloud")
    for verb in ("create", "setup", "run", "delete"):
        words = [verb, *(RUN if verb == "run" else [])]
        dry = bash(TPU_VM, *words, env=stubs.environment(**(SET | SLICES), DRY_RUN="1")).stdout
        before = len(stubs.calls())
        assert bash(TPU_VM, *words, env=stubs.environment(**(SET | SLICES))).returncode == 0
        assert stubs.calls()[before:] == [shlex.split(line) for line in dry.splitlines()]


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({"NAME": ""}, ["create"], "NAME=: is not 1 to 28 characters"),
        ({"ZONE": ""}, ["create"], "ZONE=: is not a zone"),
        ({"TYPE": ""}, ["create"], "TYPE=: is not an accelerator type"),
        ({"IMAGE": ""}, ["setup"], "IMAGE=: is not an image with a tag"),
        ({"IMAGE": "foo"}, ["run", *RUN], "IMAGE=foo: is not an image with a tag"),
        ({"IMAGE": "foo:latest"}, ["keep", *RUN], "IMAGE=foo:latest: latest may be another image"),
        ({"STORE": ""}, ["keep", *RUN], "STORE=: is not gs://BUCKET or HOST:/PATH"),
        (
            {"STORE": "s3://bucket"},
            ["setup"],
            "STORE=s3://bucket: is not gs://BUCKET or HOST:/PATH",
        ),
        ({"SPOT": "no"}, ["create"], "SPOT=no: is not 0 or 1"),
        ({"EVERY": "1m"}, ["keep", *RUN], "EVERY=1m: is not a number of seconds"),
        ({}, ["keep", *RUN, "--name=x"], "--name: its folder is not on the store"),
        ({"NAME": "Llama_1"}, ["create"], "NAME=Llama_1: is not 1 to 28 characters"),
        ({"NAME": "a" * 29}, ["create"], "is not 1 to 28 characters"),
        ({"SLICES": "none"}, ["create"], "SLICES=none: is not a count"),
        ({}, ["run"], "--config: is missing"),
        ({}, ["keep"], "--config: is missing"),
        (
            {},
            ["start"],
            "start: is not one of create, setup, run, status, logs, stop, delete, keep",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_called(
    change: dict[str, str], words: list[str], said: str, stubs: Stubs
) -> None:
    stubs.add("gcloud")
    done = bash(TPU_VM, *words, env=stubs.environment(**(SET | change)))
    assert done.returncode == 2 and said in done.stderr
    assert stubs.calls() == []


def test_every_problem_is_said_at_once(stubs: Stubs) -> None:
    done = bash(TPU_VM, "keep", env=stubs.environment(SLICES="0"))
    assert done.returncode == 2
    said = [line.removeprefix("tpu_vm.sh: ").split(":")[0] for line in done.stderr.splitlines()]
    assert said == ["NAME=", "ZONE=", "SLICES=0", "TYPE=", "IMAGE=", "STORE=", "--config"]


@pytest.mark.parametrize("verb", ["status", "delete"])
def test_a_verb_asks_for_what_it_needs_alone(verb: str, stubs: Stubs) -> None:
    done = bash(TPU_VM, verb, env=stubs.environment(NAME="llama", ZONE="us-west4-a", DRY_RUN="1"))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dry_run_of_0_is_none(stubs: Stubs) -> None:
    stubs.add("gcloud")
    assert bash(TPU_VM, "create", env=stubs.environment(**SET, DRY_RUN="0")).returncode == 0
    assert len(stubs.calls("gcloud")) == 1


def test_help_is_the_head_of_the_file(stubs: Stubs) -> None:
    done = bash(TPU_VM, "--help", env=stubs.environment())
    assert (
        done.returncode == 0
        and done.stdout.startswith("Train on Cloud TPU VMs")
        and "set -euo" not in done.stdout
    )


# --------------------------------------------------------------------------------------------- keep

# gcloud answers the n-th look at the request, and the n-th at the hosts, with the n-th line of a
# file; the last line stays.
GCLOUD = """
next() {
  n=$(($(cat "$1.n" 2> /dev/null || echo 0) + 1)); echo "$n" > "$1.n"
  sed -n "${n}p;\\$p" "$1" | head -1 | sed 's/; /\\n/g'
}
case "$*" in
  *describe*) echo "WARNING: a newer gcloud is there" >&2; said="$(next FOLDER/requests)"; [[ "$said" != NONE ]] || { echo "NOT_FOUND: none" >&2; exit 1; }; echo "$said" ;;
  *"jaxpeft_host.sh status"*) said="$(next FOLDER/hosts)"; [[ "$said" != LOST ]] || exit 255; echo "$said" ;;
esac
"""
R, D = "jaxpeft: runs", "jaxpeft: done"
KEEP = {
    "from nothing to the end": (
        ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE"],
        ["jaxpeft: none", f"{R}; {R}", f"{D}; {D}"],
        0,
        ["create", "scp", "setup", "run"],
    ),
    "taken away, asked for again": (
        ["ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "ACTIVE"],
        [f"{R}; {R}", "jaxpeft: none", D],
        0,
        ["delete", "create", "scp", "setup", "run"],
    ),
    "done on one host, not yet on the other": (["ACTIVE"], [f"{D}; {R}", f"{D}; {D}"], 0, []),
    "a host does not answer": (["ACTIVE"], ["LOST", f"{R}; {R}", D], 0, []),
    "stopped by hand before": (
        ["ACTIVE"],
        ["jaxpeft: stopped; jaxpeft: stopped", D],
        0,
        ["scp", "setup", "run"],
    ),
    "bad input is not started again": (["ACTIVE"], [f"{R}; {R}", f"{R}; jaxpeft: failed 2"], 2, []),
    "failed after its restarts": (["ACTIVE"], [R, "jaxpeft: failed 1; jaxpeft: failed 1"], 1, []),
    "a code that begins with a 2": (["ACTIVE"], [R, "jaxpeft: failed 203"], 1, []),
    "the one before is done": (
        ["ACTIVE"],
        [f"{D}; {D}", f"{R}; {R}", f"{D}; {D}"],
        0,
        ["scp", "setup", "run"],
    ),
    "the one before was refused": (
        ["ACTIVE"],
        ["jaxpeft: failed 2", R, D],
        0,
        ["scp", "setup", "run"],
    ),
    "the one before has failed": (
        ["ACTIVE"],
        ["jaxpeft: failed 1", R, D],
        0,
        ["scp", "setup", "run"],
    ),
    "refused again": (["ACTIVE"], ["jaxpeft: failed 2"], 2, ["scp", "setup", "run"]),
    "another one runs": (["ACTIVE"], ["jaxpeft: none; jaxpeft: other"], 2, []),
    "the request has failed": (["WAITING_FOR_RESOURCES", "FAILED"], [D], 1, []),
}


@pytest.mark.parametrize(("requests", "hosts", "code", "did"), KEEP.values(), ids=list(KEEP))
@pytest.mark.representatives(
    "from nothing to the end",
    "the one before is done",
    "a host does not answer",
    "the one before has failed",
    "refused again",
    "failed after its restarts",
    "bad input is not started again",
    "another one runs",
)
def test_keep(
    requests: list[str], hosts: list[str], code: int, did: list[str], stubs: Stubs, tmp_path: Path
) -> None:
    assert kept(TPU_VM, requests, hosts, stubs, tmp_path)[:2] == (code, did)


def kept(
    script: Path, requests: list[str], hosts: list[str], stubs: Stubs, tmp_path: Path
) -> tuple[int, list[str], str]:
    (tmp_path / "requests").write_text("\n".join(requests) + "\n")
    (tmp_path / "hosts").write_text("\n".join(hosts) + "\n")
    stubs.add("gcloud", GCLOUD.replace("FOLDER", str(tmp_path)))
    done = bash(script, "keep", *RUN, env=stubs.environment(**SET, EVERY="0"), seconds=20)
    words = ("create", "delete", "scp", "jaxpeft_host.sh setup", "jaxpeft_host.sh run")
    did = [
        word.split()[-1]
        for call in stubs.calls()
        for word in words
        if f" {word}" in f" {' '.join(call)} "
    ]
    return done.returncode, did, done.stderr


def test_a_keep_that_starts_bad_input_again_would_be_noticed(stubs: Stubs, tmp_path: Path) -> None:
    forgets = mutated(TPU_VM, "printf 'failed 2' ;;", "printf 'stopped' ;;", tmp_path)
    requests, hosts, *_ = KEEP["bad input is not started again"]
    assert kept(forgets, requests, [*hosts, D], stubs, tmp_path)[:2] == (0, ["scp", "setup", "run"])


@pytest.mark.parametrize(
    "before", ["the one before is done", "the one before was refused", "the one before has failed"]
)
def test_a_keep_that_answers_for_an_earlier_command_would_be_noticed(
    before: str, stubs: Stubs, tmp_path: Path
) -> None:
    requests, hosts, *_ = KEEP[before]
    hasty = mutated(TPU_VM, "started=no unknown", "started=yes unknown", tmp_path)
    assert kept(hasty, requests, hosts, stubs, tmp_path)[1] == []


def test_hosts_are_asked_about_the_command_that_is_wanted(stubs: Stubs, tmp_path: Path) -> None:
    kept(TPU_VM, ["ACTIVE"], ["jaxpeft: none", D], stubs, tmp_path)
    commands = [
        word.removeprefix("--command=")
        for call in stubs.calls()
        for word in call
        if word.startswith("--command=")
    ]
    asked, _, ran, _ = commands
    assert (
        asked
        == ran.replace("jaxpeft_host.sh run", "jaxpeft_host.sh status")
        + " 2> /dev/null || echo jaxpeft: none"
    )


@pytest.mark.parametrize(("word", "code", "tries"), [("half", 0, 2), ("yes", 2, 1)])
def test_a_start_that_did_not_reach_every_host_is_tried_again(
    word: str, code: int, tries: int, stubs: Stubs, tmp_path: Path
) -> None:
    # with `yes` it believes what an earlier one left
    script = mutated(TPU_VM, "started=half", f"started={word}", tmp_path)
    (tmp_path / "requests").write_text("ACTIVE\n")
    (tmp_path / "hosts").write_text(f"jaxpeft: failed 2\n{R}; jaxpeft: failed 2\n{R}\n{D}\n")
    lost = (
        f'case "$*" in *"host.sh run"*) [[ -e {tmp_path}/tried ]] || {{ touch {tmp_path}/tried;'
        " exit 255; } ;; esac\n"
    )
    stubs.add("gcloud", lost + GCLOUD.replace("FOLDER", str(tmp_path)))
    done = bash(script, "keep", *RUN, env=stubs.environment(**SET, EVERY="0"))
    assert done.returncode == code
    assert sum("jaxpeft_host.sh run" in " ".join(call) for call in stubs.calls()) == tries


def test_a_state_that_is_not_known_is_said_once(stubs: Stubs, tmp_path: Path) -> None:
    waiting = [
        "ACCEPTED",
        "PROVISIONING",
        "CREATING",
        "WAITING_FOR_RESOURCES",
        "SUSPENDING",
        "DELETING",
    ]
    code, _, said = kept(TPU_VM, [*waiting, "ODD", "ODD", "ACTIVE"], [R, D], stubs, tmp_path)
    assert code == 0
    assert said == 'tpu_vm.sh: unknown state of the request: "ODD"; waiting for it to change\n'


def test_keep_ends_if_the_request_is_refused(stubs: Stubs) -> None:
    stubs.add(
        "gcloud",
        'case "$*" in *describe*) echo NOT_FOUND >&2; exit 1 ;; *create*) echo quota >&2; exit 1 ;;'
        " esac",
    )
    done = bash(TPU_VM, "keep", *RUN, env=stubs.environment(**SET, EVERY="0"))
    assert done.returncode == 1 and "quota" in done.stderr


# ---------------------------------------------------------------------------------------- on a host

SHOW = """case "$*" in
  *LoadState*) echo "$LOAD" ;; *ActiveState*) echo "$ACTIVE" ;; *ExecMainStatus*) echo "$STATUS" ;;
  *ExecMainCode*) echo "$CODE" ;; *Job*) [[ -z "$JOB" ]] || echo "$JOB" ;;
esac"""


def host(stubs: Stubs, tmp_path: Path, *words: str, script: Path = TPU_HOST, **env: str):
    stubs.add("sudo", 'exec "$@"')
    stubs.add("systemctl", SHOW)
    for name in ("docker", "gcloud", "mount", "apt-get", "gcsfuse", "journalctl"):
        stubs.add(name)
    stubs.add("mountpoint", "exit 1")
    stubs.add("mkdir", 'case "$*" in *runs*) ;; *) /bin/mkdir "$@" ;; esac')
    places = {
        "UNIT_DIR": str(tmp_path),
        "COMMAND_DIR": str(tmp_path),
        "FSTAB": str(tmp_path / "fstab"),
    }
    (tmp_path / "fstab").touch()
    unit = {"LOAD": "not-found", "ACTIVE": "inactive", "STATUS": "0", "CODE": "0", "JOB": ""} | env
    return bash(script, *words, env=stubs.environment(**places, **unit))


HOST = {
    "no unit": ("not-found", "inactive", "0", "0", "", "none"),
    "active": ("loaded", "active", "0", "0", "", "runs"),
    "between two tries": ("loaded", "activating", "1", "1", "", "runs"),
    "done": ("loaded", "inactive", "1", "0", "", "done"),
    "bad input": ("loaded", "failed", "1", "2", "", "failed 2"),
    "stopped and saved": ("loaded", "failed", "1", "143", "", "stopped"),
    "an error": ("loaded", "failed", "1", "1", "", "failed 1"),
    "killed": ("loaded", "failed", "2", "9", "", "failed 137"),
    "killed by SIGINT, which is no bad input": ("loaded", "failed", "2", "2", "", "failed 130"),
    "the host was started, and the unit waits for it": (
        "loaded",
        "inactive",
        "0",
        "0",
        "117",
        "runs",
    ),
    "the host was started, and the unit is not": ("loaded", "inactive", "0", "0", "", "none"),
    "what it needs could not be started": ("loaded", "failed", "0", "0", "", "none"),
}


@pytest.mark.parametrize(
    ("load", "active", "code", "status", "job", "said"), HOST.values(), ids=list(HOST)
)
def test_status_of_a_host(
    load: str,
    active: str,
    code: str,
    status: str,
    job: str,
    said: str,
    stubs: Stubs,
    tmp_path: Path,
) -> None:
    done = host(
        stubs, tmp_path, "status", LOAD=load, ACTIVE=active, CODE=code, STATUS=status, JOB=job
    )
    assert (done.returncode, done.stdout) == (0, f"jaxpeft: {said}\n")


OF_A_COMMAND = {
    "this one runs": ({"ACTIVE": "active"}, RUN, "runs"),
    "another one runs": ({"ACTIVE": "active"}, ["--config", "b.py"], "other"),
    "this one is done": ({"CODE": "1"}, RUN, "done"),
    "another one is done": ({"CODE": "1"}, ["--config", "b.py"], "none"),
    "this one was refused": ({"CODE": "1", "STATUS": "2"}, RUN, "failed 2"),
    "another one was refused": ({"CODE": "1", "STATUS": "2"}, ["--config", "b.py"], "none"),
}


@pytest.mark.parametrize(("unit", "words", "said"), OF_A_COMMAND.values(), ids=list(OF_A_COMMAND))
@pytest.mark.representatives("this one runs", "this one was refused", "another one runs")
def test_status_of_a_command(
    unit: dict[str, str], words: list[str], said: str, stubs: Stubs, tmp_path: Path
) -> None:
    host(stubs, tmp_path, "run", IMAGE, *RUN)
    done = host(stubs, tmp_path, "status", IMAGE, *words, LOAD="loaded", **unit)
    assert (done.returncode, done.stdout) == (0, f"jaxpeft: {said}\n")


def test_status_of_a_command_on_a_new_host(stubs: Stubs, tmp_path: Path) -> None:
    assert host(stubs, tmp_path, "status", IMAGE, *RUN).stdout == "jaxpeft: none\n"


def unit_of(folder: Path) -> dict[str, str]:
    lines = (
        line.split("=", 1)
        for line in (folder / "jaxpeft.service").read_text().splitlines()
        if "=" in line
    )
    return dict(lines)


def require_contract(unit: dict[str, str]) -> None:
    """Refuse a unit that starts bad input again, lets a failure lie, or kills a run that is
    saving.
    """
    assert unit["Restart"] == "on-failure"
    assert unit["RestartPreventExitStatus"].split() == ["2"]
    # a run that was stopped on one host goes on
    assert "143" not in unit.get("SuccessExitStatus", "")
    assert int(unit["TimeoutStopSec"]) >= 120
    assert "docker.service" in unit["After"] and unit["RequiresMountsFor"] == "/runs"
    assert unit["WantedBy"] == "multi-user.target"


def test_run_writes_a_unit_that_keeps_the_contract(stubs: Stubs, tmp_path: Path) -> None:
    assert host(stubs, tmp_path, "run", IMAGE, *RUN).returncode == 0
    require_contract(unit_of(tmp_path))
    calls = [call[1:] for call in stubs.calls() if call[0] == "systemctl" and call[1] != "show"]
    assert calls == [
        ["daemon-reload"],
        ["reset-failed", "jaxpeft.service"],
        ["enable", "jaxpeft.service"],
        ["restart", "jaxpeft.service"],
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("RestartPreventExitStatus=2\n", ""),
        ("Restart=on-failure", "Restart=always"),
        ("TimeoutStopSec=300", "TimeoutStopSec=10"),
        ("RequiresMountsFor=/runs\n", ""),
    ],
)
def test_a_unit_that_breaks_the_contract_is_refused(
    before: str, after: str, stubs: Stubs, tmp_path: Path
) -> None:
    script = mutated(TPU_HOST, before, after, tmp_path)
    assert host(stubs, tmp_path, "run", IMAGE, *RUN, script=script).returncode == 0
    with pytest.raises((AssertionError, KeyError)):
        require_contract(unit_of(tmp_path))


def test_the_command_of_a_host_is_what_was_given(stubs: Stubs, tmp_path: Path) -> None:
    host(stubs, tmp_path, "run", IMAGE, *RUN)
    assert bash(tmp_path / "run.sh", env=stubs.environment()).returncode == 0
    (call,) = stubs.calls("docker")
    at = call.index(IMAGE)
    assert call[at + 1 :] == RUN
    assert call[:at] == shlex.split(
        "run --rm --init --name jaxpeft --user root --privileged --network host --shm-size 16g"
        " --ulimit memlock=-1 --volume /runs:/runs"
    )


def test_the_same_command_is_left_alone_and_another_refused(stubs: Stubs, tmp_path: Path) -> None:
    host(stubs, tmp_path, "run", IMAGE, *RUN)
    stubs.log.unlink()
    same = host(stubs, tmp_path, "run", IMAGE, *RUN, LOAD="loaded", ACTIVE="active")
    assert (same.returncode, same.stdout) == (0, "jaxpeft: already running\n")
    other = host(stubs, tmp_path, "run", IMAGE, "--config", "b.py", LOAD="loaded", ACTIVE="active")
    assert other.returncode == 2 and "another command is running; stop it first" in other.stderr
    assert all(call[1] == "show" for call in stubs.calls() if call[0] == "systemctl")


@pytest.mark.parametrize(
    ("store", "line"),
    [
        (
            "gs://bucket",
            "bucket /runs gcsfuse rw,_netdev,allow_other,implicit_dirs,rename_dir_limit=200000 0 0",
        ),
        ("10.0.0.2:/share", "10.0.0.2:/share /runs nfs rw,_netdev,hard 0 0"),
    ],
)
def test_setup_mounts_the_store_now_and_after_a_reboot(
    store: str, line: str, stubs: Stubs, tmp_path: Path
) -> None:
    assert host(stubs, tmp_path, "setup", IMAGE, store).returncode == 0
    assert (tmp_path / "fstab").read_text() == f"{line}\n"
    assert host(stubs, tmp_path, "setup", IMAGE, store).returncode == 0
    assert (tmp_path / "fstab").read_text() == f"{line}\n"  # once
    assert ["mount", "/runs"] in stubs.calls() and ["docker", "pull", IMAGE] in stubs.calls()
    assert ["gcloud", "auth", "configure-docker", "us-docker.pkg.dev", "--quiet"] in stubs.calls()


def test_a_store_of_another_kind_is_refused(stubs: Stubs, tmp_path: Path) -> None:
    done = host(stubs, tmp_path, "setup", IMAGE, "s3://bucket")
    assert (
        done.returncode == 2
        and "the store s3://bucket: is not gs://BUCKET or HOST:/PATH" in done.stderr
    )


def test_the_golden_files_are_of_this_script() -> None:
    assert {path.name for path in GOLDEN.glob("tpu_vm_*")} == {
        "tpu_vm_one_slice.txt",
        "tpu_vm_two_slices.txt",
    }
    assert ROOT.name not in "".join(path.read_text() for path in GOLDEN.glob("*.txt"))
