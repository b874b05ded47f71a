"""Where the processes of a run find each other, told from flags and the environment alone; no JAX
is imported here.

Asked in this order: flags, `JAXPEFT_` and `JAX_` variables, then what a TPU, Open MPI, SLURM,
SkyPilot or Kubernetes sets. What is given by hand stands in for what the cluster says of the same
thing.

What is half set or contradicts itself is refused here, with the variable's name. Then
`jax.distributed` finds the coordinator, and whatever else is left open, of TPUs, Open MPI and
Kubernetes. SLURM is read here, since JAX gives a task that is alone on its node one of the node's
GPUs, and of the hosts `gpu[01-04]-ib` takes `gpu01`, not `gpu01-ib`; SkyPilot, since JAX does not
know it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxpeft.errors import ConfigError

Environment = Mapping[str, str]
SWITCH, DEVICES = "JAXPEFT_DISTRIBUTED", "JAXPEFT_LOCAL_DEVICES"
NAMES = {
    "coordinator": ("--coordinator", "JAXPEFT_COORDINATOR", "JAX_COORDINATOR_ADDRESS"),
    "processes": ("--processes", "JAXPEFT_PROCESSES", "JAX_NUM_PROCESSES"),
    "process": ("--process", "JAXPEFT_PROCESS", "JAX_PROCESS_ID"),
}
"""What each may be called, the strongest first."""
_VARIABLES: Mapping[str, Mapping[str, str]] = {
    "TPU": {"process": "TPU_WORKER_ID"},
    "Open MPI": {"processes": "OMPI_COMM_WORLD_SIZE", "process": "OMPI_COMM_WORLD_RANK"},
    "SLURM": {
        "coordinator": "JAX_COORDINATOR_PORT",
        "processes": "SLURM_NTASKS",
        "process": "SLURM_PROCID",
    },
    "SkyPilot": {
        "coordinator": "JAX_COORDINATOR_PORT",
        "processes": "SKYPILOT_NUM_NODES",
        "process": "SKYPILOT_NODE_RANK",
    },
}
"""What a cluster calls them, to be named where it is wrong."""
_WAITS = {
    "heartbeat": "JAXPEFT_HEARTBEAT_TIMEOUT",
    "start": "JAXPEFT_START_TIMEOUT",
    "barrier": "JAXPEFT_BARRIER_TIMEOUT",
}
_ALONE = f"or set {SWITCH}=off to run a single process"
_PORT = 8476
_SLURM_PORTS = 61440, 4096


@dataclass(frozen=True)
class Flags:
    """What the command line says; None where it says nothing."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    heartbeat: int | None = None


@dataclass(frozen=True)
class Waits:
    """How long is waited, in seconds.

    Attributes:
        heartbeat: for a sign of life of a process, before it counts as dead.
        start: for all processes to be there.
        barrier: for all processes to come to the same place.
    """

    heartbeat: int = 100
    start: int = 300
    barrier: int = 600


@dataclass(frozen=True)
class Place:
    """Which process of how many this is.

    Attributes:
        by: who says so.
        coordinator: `host:port` of process 0; None where JAX finds it.
        processes: how many there are; None where JAX finds that.
        process: the number of this one; None where JAX finds that.
        devices: the numbers of the GPUs that this process uses; None for all that it sees.
    """

    by: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = None

    @property
    def found_by_jax(self) -> bool:
        """Whether JAX is to ask the cluster."""
        return self.coordinator is None and self.processes != 1


def find(environment: Environment, flags: Flags | None = None) -> Place | None:
    """Return which process of how many this is.

    Args:
        environment: the variables.
        flags: of the command line.

    Returns:
        The place; None for a process by itself.

    Raises:
        ConfigError: naming what is half set, out of range or contradicts itself.
    """
    given, names = _explicit_settings(environment, flags or Flags())
    switch = environment.get(SWITCH) or "auto"
    if switch not in ("auto", "off"):
        raise ConfigError(f"{SWITCH}: must be auto or off, is {switch!r}")
    if switch == "off" and not any(name.startswith("--") for name in names.values()):
        return _single_process(environment)
    there = (
        None if switch == "off" or given.keys() == NAMES.keys() else _cluster(environment, given)
    )
    if not given and there is None:
        return _single_process(environment)
    place = _combine(given, names, there)
    return replace(place, devices=_devices(environment, place))


def _single_process(environment: Environment) -> Place | None:
    """Return the place of a process by itself: None, but where it may not use all GPUs."""
    place = Place(DEVICES, processes=1, process=0)
    devices = _devices(environment, place)
    return None if devices is None else replace(place, devices=devices)


def waits(environment: Environment, flags: Flags | None = None) -> Waits:
    """Return how long is waited for other processes.

    Raises:
        ConfigError: a number is none.
    """
    given = {name: (variable, environment.get(variable)) for name, variable in _WAITS.items()}
    if flags is not None and flags.heartbeat is not None:
        given["heartbeat"] = ("--heartbeat_timeout", str(flags.heartbeat))
    found = {name: _number(*one) for name, one in given.items() if one[1]}
    for name, seconds in found.items():
        if seconds < 1:
            raise ConfigError(f"{given[name][0]}: must be at least 1 second, is {seconds}")
    return Waits(**found)


def _explicit_settings(
    environment: Environment, flags: Flags
) -> tuple[dict[str, str], dict[str, str]]:
    """Return what is said by hand, and under which name."""
    given: dict[str, str] = {}
    names: dict[str, str] = {}
    for field, (flag, *variables) in NAMES.items():
        own = getattr(flags, field)
        values = [
            (flag, None if own is None else str(own)),
            *((name, environment.get(name)) for name in variables),
        ]
        for name, value in values:
            if value:
                given[field], names[field] = value, name
                break
    return given, names


def _combine(given: Mapping[str, str], names: Mapping[str, str], there: Place | None) -> Place:
    """Put together what is said by hand and what a cluster says."""
    coordinator = given.get("coordinator")
    processes = _number(names["processes"], given["processes"]) if "processes" in given else None
    process = _number(names["process"], given["process"]) if "process" in given else None
    by = " and ".join(dict.fromkeys([*names.values(), *((there.by,) if there else ())]))
    place = Place(
        by,
        coordinator or (there and there.coordinator),
        processes if processes is not None else (there and there.processes),
        process if process is not None else (there and there.process),
    )
    if place.processes == 1:
        place = replace(place, coordinator=None, process=place.process or 0)
    missing = [field for field in NAMES if getattr(place, field) is None]
    if missing and place.processes != 1 and not (there and there.found_by_jax and not given):
        lacks = ", ".join("/".join(NAMES[field]) for field in missing)
        raise ConfigError(
            f"{', '.join(names.values())}: given without {lacks}; give all three, {_ALONE}"
        )
    _check(place, {**(_VARIABLES.get(there.by, {}) if there else {}), **names})
    return place


def _check(place: Place, names: Mapping[str, str]) -> None:
    at = (
        None
        if place.coordinator is None
        else re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):([0-9]{1,5})", place.coordinator)
    )
    if place.coordinator is not None and (at is None or not 0 < int(at[2]) < 2**16):
        raise ConfigError(
            f"{names.get('coordinator', place.by)}: must be host:port, is {place.coordinator!r};"
            " add the port on which process 0 can be reached, such as host:8476, at most 65535"
        )
    n, i = place.processes, place.process
    if n is not None and n < 1:
        raise ConfigError(f"{names.get('processes', place.by)}: must be at least 1, is {n}")
    if n is not None and i is not None and not 0 <= i < n:
        raise ConfigError(
            f"{names.get('process', place.by)}: must be from 0 to {n - 1} of {n} processes, is {i}"
        )


def _cluster(environment: Environment, given: Mapping[str, str]) -> Place | None:
    if (place := _tpu(environment) or _open_mpi(environment, "coordinator" in given)) is not None:
        return place
    if (place := _slurm(environment) or _skypilot(environment)) is not None:
        return place
    return _kubernetes(environment, {"coordinator", "processes"} <= given.keys())


def _tpu(environment: Environment) -> Place | None:
    """A TPU of several hosts on GKE, whose variables JAX reads; on a TPU VM it asks the machine
    itself (`on_tpu_vm`).
    """
    platforms = environment.get("JAX_PLATFORMS") or "tpu"
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if not hosts or "tpu" not in platforms:
        return None
    slices = _number("MEGASCALE_NUM_SLICES", environment.get("MEGASCALE_NUM_SLICES") or "1")
    each = len(hosts.split(","))
    if each * slices == 1:
        return None
    needed = [
        "TPU_WORKER_ID",
        *(["MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"] if slices > 1 else []),
    ]
    _require(environment, needed, f"the TPU has {each * slices} hosts")
    at = _number("TPU_WORKER_ID", environment["TPU_WORKER_ID"])
    at += (
        each * _number("MEGASCALE_SLICE_ID", environment["MEGASCALE_SLICE_ID"]) if slices > 1 else 0
    )
    return Place("TPU", None, each * slices, at)


def find_tpu_vm(environment: Environment) -> Place | None:
    """Tell a TPU VM, once JAX is imported: JAX writes into the environment that it has found
    one.
    """
    there = environment.get("TPU_ML_PLATFORM") == "JAX" and not environment.get(
        "TPU_SKIP_MDS_QUERY"
    )
    named = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    wanted = "tpu" in (environment.get("JAX_PLATFORMS") or "tpu")
    return (
        Place("TPU VM")
        if there and wanted and not named and environment.get(SWITCH) != "off"
        else None
    )


def _open_mpi(environment: Environment, by_hand: bool) -> Place | None:
    """Return the place of a process that `mpirun` started; asked before SLURM, in whose steps
    `mpirun` starts its daemons.
    """
    started = "OMPI_COMM_WORLD_SIZE"
    n = _number(started, environment.get(started) or "1")
    if n == 1:
        return None
    _require(
        environment,
        ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"],
        f"mpirun started {n} processes",
    )
    if not by_hand and not environment.get("OMPI_MCA_orte_hnp_uri"):
        raise ConfigError(
            f"{started}: mpirun started {n} processes, and JAX finds their coordinator by"
            " OMPI_MCA_orte_hnp_uri, which Open MPI sets before version 5; set"
            f" {'/'.join(NAMES['coordinator'])} to host:port of process 0, {_ALONE}"
        )
    return Place(
        "Open MPI", None, n, _number("OMPI_COMM_WORLD_RANK", environment["OMPI_COMM_WORLD_RANK"])
    )


def _slurm(environment: Environment) -> Place | None:
    if "SLURM_JOB_ID" not in environment:
        return None
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if not environment.get("SLURM_STEP_NODELIST"):
        nodes = environment.get("SLURM_JOB_NUM_NODES")
        for name, count, what in (
            ("SLURM_NTASKS", tasks, "tasks"),
            ("SLURM_JOB_NUM_NODES", nodes, "nodes"),
        ):
            if _number(name, count or "1") > 1:
                raise ConfigError(
                    f"{name}: the job has {count} {what}, and this process was not started as a"
                    f" task of it; write `srun python -m jaxpeft.train ...`, {_ALONE}"
                )
        return None
    _require(environment, ["SLURM_PROCID", "SLURM_LOCALID"], "this is a step of a SLURM job")
    n = _number("SLURM_NTASKS", tasks or "1")
    first = _first_host(environment["SLURM_STEP_NODELIST"])
    base, many = _SLURM_PORTS
    usual = base + _number("SLURM_JOB_ID", environment["SLURM_JOB_ID"]) % many
    port = environment.get("JAX_COORDINATOR_PORT") or str(usual)
    return Place(
        "SLURM", f"{first}:{port}", n, _number("SLURM_PROCID", environment["SLURM_PROCID"])
    )


_RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
_HOST = rf"(?:[^,\[\]\s]|{_RANGES})+"


def _first_host(nodes: str) -> str:
    """Return the first of a list of hosts such as `a1,b2` or `gpu[01-04,07]-ib,cpu3`."""
    found = re.fullmatch(rf"({_HOST})(?:,{_HOST})*", nodes)
    if found is None:
        raise ConfigError(
            f"SLURM_STEP_NODELIST: is no list of hosts such as a1,b2 or gpu[01-04,07]: {nodes!r};"
            f" {_ALONE[3:]}"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[1])


def _slurm_devices(environment: Environment) -> tuple[int, ...] | None:
    """Return the GPUs of this task: as many for each task of the node, all of them for a task that
    is alone there.
    """
    tasks = _tasks_here(environment)
    gpus = _gpus_here(environment)
    each = environment.get("SLURM_GPUS_PER_TASK")
    if tasks == 1 or not gpus:
        return None
    if each:
        raise ConfigError(
            f"SLURM_GPUS_PER_TASK: {each}: a task then sees no GPU but its own, and NCCL cannot go"
            " directly from one to another; ask for --gres=gpu:N and --ntasks-per-node=N instead"
            " of --gpus-per-task"
        )
    if gpus % tasks:
        raise ConfigError(
            f"SLURM: {tasks} tasks a node do not share its {gpus} GPUs evenly; set"
            f" --ntasks-per-node to {gpus}, or to 1 for one process that uses them all, or name"
            f" each task's GPUs by {DEVICES}"
        )
    share, at = gpus // tasks, _number("SLURM_LOCALID", environment["SLURM_LOCALID"])
    if not 0 <= at < tasks:
        raise ConfigError(
            f"SLURM_LOCALID: must be from 0 to {tasks - 1} of {tasks} tasks of the node, is {at}"
        )
    first = share * at
    return tuple(range(first, first + share))


def _tasks_here(environment: Environment) -> int:
    """Return the tasks of this node, of a list such as `4(x2),1`."""
    counts: list[int] = []
    told = (
        environment.get("SLURM_STEP_TASKS_PER_NODE")
        or environment.get("SLURM_TASKS_PER_NODE")
        or ""
    )
    for part in filter(None, told.split(",")):
        if not (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)):
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE: cannot be read: {told!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    node = _number("SLURM_NODEID", environment.get("SLURM_NODEID") or "0")
    if node < len(counts):
        return counts[node]
    return _number("SLURM_NTASKS_PER_NODE", environment.get("SLURM_NTASKS_PER_NODE") or "1")


def _gpus_here(environment: Environment) -> int:
    """Return how many GPUs a task sees, 0 where nobody says."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if value := environment.get(name):
            # none is written as NoDevFiles or -1
            return len(
                [
                    part
                    for part in value.split(",")
                    if re.fullmatch(r"\d+|(GPU|MIG)-.+", part.strip())
                ]
            )
    return _number("SLURM_GPUS_ON_NODE", environment.get("SLURM_GPUS_ON_NODE") or "0")


def _skypilot(environment: Environment) -> Place | None:
    names = ["SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"]
    if not any(environment.get(name) for name in names):
        return None
    _require(environment, names, "this is a SkyPilot job")
    addresses = environment["SKYPILOT_NODE_IPS"].split()
    n = _number("SKYPILOT_NUM_NODES", environment["SKYPILOT_NUM_NODES"])
    if len(addresses) != n or not addresses:
        raise ConfigError(
            f"SKYPILOT_NODE_IPS: {len(addresses)} addresses, and SKYPILOT_NUM_NODES is {n};"
            f" {_ALONE[3:]}"
        )
    port = environment.get("JAX_COORDINATOR_PORT") or _PORT
    rank = _number("SKYPILOT_NODE_RANK", environment["SKYPILOT_NODE_RANK"])
    first = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    return Place("SkyPilot", f"{first}:{port}", n, rank)


def _kubernetes(environment: Environment, by_hand: bool) -> Place | None:
    """A pod of an indexed job, of which JAX asks the cluster; given the rest by hand, only its
    number is taken.
    """
    index = environment.get("JOB_COMPLETION_INDEX")
    if not environment.get("KUBERNETES_SERVICE_HOST") or not index:
        return None
    number = _number("JOB_COMPLETION_INDEX", index)
    return Place("JOB_COMPLETION_INDEX" if by_hand else "Kubernetes", process=number)


def _devices(environment: Environment, place: Place) -> tuple[int, ...] | None:
    for name in (DEVICES, "JAX_LOCAL_DEVICE_IDS"):
        text = environment.get(name)
        if not text:
            continue
        if text == "all" and name == DEVICES:
            return None
        if not re.fullmatch(r"\d+(,\d+)*", text):
            raise ConfigError(
                f"{name}: must be numbers of GPUs such as 0,1, is {text!r}; for all of them set"
                f" {DEVICES}=all"
            )
        numbers = tuple(int(part) for part in text.split(","))
        if len(set(numbers)) < len(numbers):
            raise ConfigError(f"{name}: names a GPU twice: {text!r}")
        return numbers
    if place.by.endswith("Open MPI"):  # as JAX does: one each
        return (_number("OMPI_COMM_WORLD_LOCAL_RANK", environment["OMPI_COMM_WORLD_LOCAL_RANK"]),)
    return _slurm_devices(environment) if place.by.endswith("SLURM") else None


def _require(environment: Environment, names: list[str], why: str) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not set, though {why}; set it, {_ALONE}")


def _number(name: str, value: str | int | None) -> int:
    try:
        return int(value or 0)
    except ValueError:
        raise ConfigError(f"{name}: must be a whole number, is {value!r}") from None
