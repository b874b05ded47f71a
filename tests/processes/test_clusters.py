"""Which process of how many this is, told from simulated environments: no cluster, and no JAX."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import pytest

from jaxpeft.errors import ConfigError
from jaxpeft.processes.clusters import Flags, Place, Waits, find, find_tpu_vm, waits

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_NTASKS": "24",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x3)",
    "SLURM_GPUS_ON_NODE": "8",
}
SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a-0.x,a-1.x,a-2.x,a-3.x", "TPU_WORKER_ID": "2"}
TWO_SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "a-0.x",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.1.0.1", "JOB_COMPLETION_INDEX": "3"}
BY_HAND = {"JAXPEFT_COORDINATOR": "host:1234", "JAXPEFT_PROCESSES": "4", "JAXPEFT_PROCESS": "3"}
OURS = "JAXPEFT_COORDINATOR and JAXPEFT_PROCESSES and JAXPEFT_PROCESS"


def without(environment: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        pytest.param({}, None, id="a laptop"),
        pytest.param(BY_HAND, Place(OURS, "host:1234", 4, 3), id="by hand"),
        pytest.param(
            {
                "JAX_COORDINATOR_ADDRESS": "[::1]:99",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "0",
                "JAXPEFT_PROCESS": "",
            },
            Place(
                "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES and JAX_PROCESS_ID", "[::1]:99", 2, 0
            ),
            id="JAX's names, and an empty one of ours",
        ),
        pytest.param(
            {"JAXPEFT_PROCESSES": "1"}, Place("JAXPEFT_PROCESSES", None, 1, 0), id="one by hand"
        ),
        pytest.param(
            SLURM, Place("SLURM", "gpu07:62016", 24, 9, (1,)), id="SLURM, a task for each GPU"
        ),
        pytest.param(
            SLURM
            | {
                "SLURM_NTASKS": "3",
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
            },
            Place("SLURM", "gpu07:62016", 3, 1, None),
            id="SLURM, a task a node uses all of its GPUs",
        ),
        pytest.param(
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,2(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            Place("SLURM", "gpu07:62016", 24, 9, (2, 3)),
            id="SLURM, two tasks share four GPUs",
        ),
        pytest.param(
            SLURM
            | {
                "SLURM_GPUS_ON_NODE": "",
                "JAX_COORDINATOR_PORT": "5000",
                "SLURM_STEP_NODELIST": "n1,n2",
            },
            Place("SLURM", "n1:5000", 24, 9, None),
            id="SLURM without GPUs",
        ),
        pytest.param(
            SLURM | {"JAXPEFT_LOCAL_DEVICES": "all"},
            Place("SLURM", "gpu07:62016", 24, 9, None),
            id="SLURM, all by hand",
        ),
        pytest.param(
            SLURM | {"JAX_LOCAL_DEVICE_IDS": "4,5"},
            Place("SLURM", "gpu07:62016", 24, 9, (4, 5)),
            id="SLURM, GPUs by hand",
        ),
        pytest.param(
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
            None,
            id="a batch script alone",
        ),
        pytest.param(
            SLURM | {"JAXPEFT_COORDINATOR": "other:1"},
            Place("JAXPEFT_COORDINATOR and SLURM", "other:1", 24, 9, (1,)),
            id="SLURM with another coordinator",
        ),
        pytest.param(SKYPILOT, Place("SkyPilot", "10.0.0.4:8476", 2, 1), id="SkyPilot"),
        pytest.param(
            {"SKYPILOT_NODE_IPS": "10.0.0.4", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"},
            Place("SkyPilot", None, 1, 0),
            id="SkyPilot, one node",
        ),
        pytest.param(GKE | SKYPILOT, Place("TPU", None, 4, 2), id="a TPU goes before SkyPilot"),
        pytest.param(GKE | TWO_SLICES, Place("TPU", None, 8, 6), id="two slices on GKE"),
        pytest.param(GKE | {"JAX_PLATFORMS": "cpu"}, None, id="a TPU that is not used"),
        pytest.param(
            {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
            None,
            id="a TPU of one host",
        ),
        pytest.param(
            MPI, Place("Open MPI", None, 4, 3, (1,)), id="Open MPI, whose coordinator JAX finds"
        ),
        pytest.param(MPI | SLURM, Place("Open MPI", None, 4, 3, (1,)), id="mpirun in a SLURM job"),
        pytest.param(
            MPI | {"JAXPEFT_LOCAL_DEVICES": "all"},
            Place("Open MPI", None, 4, 3),
            id="Open MPI, all GPUs",
        ),
        pytest.param(
            without(MPI, "OMPI_MCA_orte_hnp_uri") | {"JAXPEFT_COORDINATOR": "a:1"},
            Place("JAXPEFT_COORDINATOR and Open MPI", "a:1", 4, 3, (1,)),
            id="Open MPI 5, with its coordinator by hand",
        ),
        pytest.param(
            MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
            None,
            id="mpirun of one process",
        ),
        pytest.param(MPI | {"JAXPEFT_DISTRIBUTED": "off"}, None, id="mpirun of runs by themselves"),
        pytest.param(MPI | BY_HAND, Place(OURS, "host:1234", 4, 3), id="by hand under mpirun"),
        pytest.param(
            POD, Place("Kubernetes", None, None, 3), id="an indexed job, which JAX asks for"
        ),
        pytest.param(without(POD, "JOB_COMPLETION_INDEX"), None, id="any pod"),
        pytest.param(
            POD | without(BY_HAND, "JAXPEFT_PROCESS"),
            Place(
                "JAXPEFT_COORDINATOR and JAXPEFT_PROCESSES and JOB_COMPLETION_INDEX",
                "host:1234",
                4,
                3,
            ),
            id="an indexed job by hand",
        ),
        pytest.param(SLURM | {"JAXPEFT_DISTRIBUTED": "off"}, None, id="off"),
        pytest.param(
            SLURM | {"SLURM_GPUS_ON_NODE": "", "CUDA_VISIBLE_DEVICES": "NoDevFiles"},
            Place("SLURM", "gpu07:62016", 24, 9, None),
            id="SLURM on nodes without GPUs",
        ),
        pytest.param(
            {"JAXPEFT_LOCAL_DEVICES": "2,3"},
            Place("JAXPEFT_LOCAL_DEVICES", None, 1, 0, (2, 3)),
            id="some GPUs of a machine",
        ),
        pytest.param({"JAXPEFT_LOCAL_DEVICES": "all"}, None, id="all GPUs of a machine"),
        pytest.param(
            SLURM | {"JAXPEFT_DISTRIBUTED": "off", "JAXPEFT_LOCAL_DEVICES": "0"},
            Place("JAXPEFT_LOCAL_DEVICES", None, 1, 0, (0,)),
            id="off, with one GPU",
        ),
        pytest.param(
            SKYPILOT | {"SKYPILOT_NODE_IPS": "fe80::1 fe80::2"},
            Place("SkyPilot", "[fe80::1]:8476", 2, 1),
            id="SkyPilot, IPv6",
        ),
    ],
)
def test_the_environment_tells_the_place(
    environment: Mapping[str, str], place: Place | None
) -> None:
    assert find(environment) == place


def test_flags_go_before_the_environment() -> None:
    assert find(BY_HAND | SLURM, Flags("here:1", 2, 0)) == Place(
        "--coordinator and --processes and --process", "here:1", 2, 0
    )
    assert find(BY_HAND, Flags(process=0)) == Place(
        "JAXPEFT_COORDINATOR and JAXPEFT_PROCESSES and --process", "host:1234", 4, 0
    )
    assert find({"JAXPEFT_DISTRIBUTED": "off"}, Flags("here:1", 2, 1)) is not None


@pytest.mark.parametrize(
    ("environment", "flags", "said"),
    [
        (
            {},
            Flags(coordinator="a:1"),
            (
                r"--coordinator: given without --processes/JAXPEFT_PROCESSES/JAX_NUM_PROCESSES,"
                r" --process/"
            ),
        ),
        (
            {"JAX_PROCESS_ID": "1"},
            None,
            (
                r"JAX_PROCESS_ID: given without --coordinator/.*; give all three, or set"
                r" JAXPEFT_DISTRIBUTED=off"
            ),
        ),
        (
            BY_HAND | {"JAXPEFT_COORDINATOR": "host"},
            None,
            r"JAXPEFT_COORDINATOR: must be host:port, is 'host'; give the port",
        ),
        (
            BY_HAND | {"JAXPEFT_PROCESS": "4"},
            None,
            r"JAXPEFT_PROCESS: must be from 0 to 3 for 4 processes, is 4",
        ),
        (
            BY_HAND | {"JAXPEFT_PROCESSES": "four"},
            None,
            r"JAXPEFT_PROCESSES: must be an integer, is 'four'",
        ),
        ({}, Flags("a:1", 0, 0), r"--processes: must be at least 1, is 0"),
        (
            without(SLURM, "SLURM_STEP_NODELIST"),
            None,
            r"SLURM_NTASKS: the job has 24 tasks, .* start it by `srun python -m jaxpeft.train ...`",
        ),
        (
            without(SLURM, "SLURM_PROCID"),
            None,
            r"SLURM_PROCID: is not set, but this is a step of a SLURM job",
        ),
        (
            SLURM | {"SLURM_GPUS_PER_TASK": "1"},
            None,
            r"SLURM_GPUS_PER_TASK: 1: tasks then only see their own GPUs.*--gres=gpu:N",
        ),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(x3)"},
            None,
            r"SLURM: 3 tasks per node do not divide its 8 GPUs evenly; set --ntasks-per-node to 8",
        ),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "0"},
            None,
            r"SLURM: 8 tasks per node do not divide its 1 GPUs evenly",
        ),
        *(
            (
                SLURM | {"SLURM_STEP_NODELIST": nodes},
                None,
                r"SLURM_STEP_NODELIST: must be a list of hosts such as a1,b2 or .*; set JAXPEFT",
            )
            for nodes in ("n[", "n[1-2", "n[1-2]]", "n]1", "n[a-b]", " ", "a,,b")
        ),
        (
            SLURM | {"SLURM_PROCID": "24"},
            None,
            r"SLURM_PROCID: must be from 0 to 23 for 24 processes, is 24",
        ),
        (
            SLURM | {"JAX_COORDINATOR_PORT": "x"},
            None,
            r"JAX_COORDINATOR_PORT: must be host:port, is 'gpu07:x'",
        ),
        (
            SKYPILOT | {"SKYPILOT_NODE_RANK": "2"},
            None,
            r"SKYPILOT_NODE_RANK: must be from 0 to 1 for 2 processes, is 2",
        ),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "many"},
            None,
            r"SLURM_STEP_TASKS_PER_NODE: cannot parse 'many'",
        ),
        (
            SLURM | {"JAX_LOCAL_DEVICE_IDS": "all"},
            None,
            r"JAX_LOCAL_DEVICE_IDS: .* set JAXPEFT_LOCAL_DEVICES=all for all",
        ),
        (
            without(SKYPILOT, "SKYPILOT_NODE_RANK"),
            None,
            r"SKYPILOT_NODE_RANK: is not set, but this is a SkyPilot job",
        ),
        (
            SKYPILOT | {"SKYPILOT_NUM_NODES": "3"},
            None,
            r"SKYPILOT_NODE_IPS: has 2 addresses, but SKYPILOT_NUM_NODES is 3",
        ),
        (
            MPI | {"OMPI_COMM_WORLD_RANK": "4"},
            None,
            r"OMPI_COMM_WORLD_RANK: must be from 0 to 3 for 4 processes, is 4",
        ),
        (
            without(MPI, "OMPI_COMM_WORLD_RANK"),
            None,
            r"OMPI_COMM_WORLD_RANK: is not set, but mpirun started 4 processes",
        ),
        (
            without(MPI, "OMPI_MCA_orte_hnp_uri"),
            None,
            (
                r"JAX finds their coordinator by OMPI_MCA_orte_hnp_uri, .* before version 5 sets; set"
                r" --coordinator/"
            ),
        ),
        (MPI | {"JAXPEFT_PROCESS": "1"}, None, r"JAXPEFT_PROCESS: given without --coordinator/"),
        (
            without(GKE, "TPU_WORKER_ID"),
            None,
            r"TPU_WORKER_ID: is not set, but the TPU has 4 hosts",
        ),
        (
            GKE | {"MEGASCALE_NUM_SLICES": "2"},
            None,
            (
                r"MEGASCALE_SLICE_ID, MEGASCALE_COORDINATOR_ADDRESS: is not set, but the TPU has 8"
                r" hosts"
            ),
        ),
        (
            POD | {"JAXPEFT_COORDINATOR": "a:1"},
            None,
            r"JAXPEFT_COORDINATOR: given without --processes/",
        ),
        (
            BY_HAND | {"JAXPEFT_COORDINATOR": "host:70000"},
            None,
            r"must be host:port, is 'host:70000'.*at most 65535",
        ),
        (
            SKYPILOT | {"SKYPILOT_NODE_IPS": " ", "SKYPILOT_NUM_NODES": "0"},
            None,
            r"SKYPILOT_NODE_IPS: has 0 addresses",
        ),
        (
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"},
            None,
            r"SLURM_JOB_NUM_NODES: the job has 2 nodes, .* start it by `srun",
        ),
        (
            SLURM | {"SLURM_LOCALID": "8"},
            None,
            r"SLURM_LOCALID: must be from 0 to 7 for 8 tasks on the node, is 8",
        ),
        (
            {"JAXPEFT_LOCAL_DEVICES": "0,0"},
            None,
            r"JAXPEFT_LOCAL_DEVICES: lists a GPU twice: '0,0'",
        ),
        ({"JAXPEFT_DISTRIBUTED": "no"}, None, r"JAXPEFT_DISTRIBUTED: must be auto or off, is 'no'"),
    ],
)
def test_what_is_half_set_or_contradicts_itself_is_refused(
    environment: Mapping[str, str], flags: Flags | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        find(environment, flags)


def test_a_tpu_vm_is_told_by_what_jax_writes_into_the_environment() -> None:
    there = {"TPU_ML_PLATFORM": "JAX"}
    assert find_tpu_vm(there) == Place("TPU VM")
    assert find_tpu_vm(there).found_by_jax  # pyright: ignore[reportOptionalMemberAccess]
    for more in (
        {"TPU_SKIP_MDS_QUERY": "1"},
        {"JAX_PLATFORMS": "cpu"},
        {"JAXPEFT_DISTRIBUTED": "off"},
        GKE,
    ):
        assert find_tpu_vm(there | more) is None
    assert find_tpu_vm({}) is None


def test_how_long_is_waited() -> None:
    assert waits({}) == Waits(100, 300, 600)
    told = {
        "JAXPEFT_HEARTBEAT_TIMEOUT": "30",
        "JAXPEFT_START_TIMEOUT": "60",
        "JAXPEFT_BARRIER_TIMEOUT": "90",
    }
    assert waits(told) == Waits(30, 60, 90)
    assert waits(told, Flags(heartbeat=5)) == Waits(5, 60, 90)
    with pytest.raises(ConfigError, match="--heartbeat-timeout: must be at least 1 second, is 0"):
        waits(told, Flags(heartbeat=0))
    with pytest.raises(ConfigError, match="JAXPEFT_START_TIMEOUT: must be an integer, is 'soon'"):
        waits({"JAXPEFT_START_TIMEOUT": "soon"})


def test_no_jax_is_imported_to_tell() -> None:
    code = "import sys, jaxpeft.processes.clusters; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
