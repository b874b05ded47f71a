"""Find the coordinator and index of a process from flags and environment, without importing JAX.

Sources, in order: flags, `JAXPEFT_` and `JAX_` variables, then the variables of TPU, Open MPI,
SLURM, SkyPilot or Kubernetes. Explicit settings override those of the cluster.

Incomplete or contradictory settings are errors that name the variable. For TPUs, Open MPI and
Kubernetes, `jax.distributed` finds the coordinator and any other missing setting. SLURM is handled
here, since JAX gives the only task on a node just one of its GPUs, and shortens `gpu[01-04]-ib` to
`gpu01` instead of `gpu01-ib`. SkyPilot is handled here, since JAX does not support it.
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
"""Flag and variables of each setting, highest priority first."""
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
"""Variables of each cluster, for error messages."""
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
    """Command-line flags; None if not given."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    heartbeat: int | None = None


@dataclass(frozen=True)
class Waits:
    """Timeouts in seconds.

    Attributes:
        heartbeat: time without a heartbeat after which a process counts as dead.
        start: time for all processes to connect.
        barrier: time for all processes to reach a barrier.
    """

    heartbeat: int = 100
    start: int = 300
    barrier: int = 600


@dataclass(frozen=True)
class Place:
    """Index of this process in a run, and how to reach the coordinator.

    Attributes:
        by: source of the settings.
        coordinator: `host:port` of process 0; None if JAX finds it.
        processes: number of processes; None if JAX finds it.
        process: index of this process; None if JAX finds it.
        devices: indices of the GPUs that this process uses; None for all visible ones.
    """

    by: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = None

    @property
    def found_by_jax(self) -> bool:
        """Whether JAX must query the cluster."""
        return self.coordinator is None and self.processes != 1


def find(environment: Environment, flags: Flags | None = None) -> Place | None:
    """Return the place of this process in its run.

    Args:
        environment: environment variables.
        flags: command-line flags.

    Returns:
        The place; None for a single-process run.

    Raises:
        ConfigError: a setting is missing, out of range or contradictory.
    """
    explicit, names = _explicit_settings(environment, flags or Flags())
    switch = environment.get(SWITCH) or "auto"
    if switch not in ("auto", "off"):
        raise ConfigError(f"{SWITCH}: must be auto or off, is {switch!r}")
    if switch == "off" and not any(name.startswith("--") for name in names.values()):
        return _single_process(environment)
    cluster = (
        None
        if switch == "off" or explicit.keys() == NAMES.keys()
        else _cluster(environment, explicit)
    )
    if not explicit and cluster is None:
        return _single_process(environment)
    place = _combine(explicit, names, cluster)
    return replace(place, devices=_devices(environment, place))


def _single_process(environment: Environment) -> Place | None:
    """Return the place of a single-process run: None, unless it is limited to some GPUs."""
    place = Place(DEVICES, processes=1, process=0)
    devices = _devices(environment, place)
    return None if devices is None else replace(place, devices=devices)


def waits(environment: Environment, flags: Flags | None = None) -> Waits:
    """Return the timeouts.

    Raises:
        ConfigError: a value is not a positive integer.
    """
    settings = {name: (variable, environment.get(variable)) for name, variable in _WAITS.items()}
    if flags is not None and flags.heartbeat is not None:
        settings["heartbeat"] = ("--heartbeat-timeout", str(flags.heartbeat))
    found = {name: _number(*one) for name, one in settings.items() if one[1]}
    for name, seconds in found.items():
        if seconds < 1:
            raise ConfigError(f"{settings[name][0]}: must be at least 1 second, is {seconds}")
    return Waits(**found)


def _explicit_settings(
    environment: Environment, flags: Flags
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the explicit settings, and the flag or variable of each."""
    explicit: dict[str, str] = {}
    names: dict[str, str] = {}
    for field, (flag, *variables) in NAMES.items():
        own = getattr(flags, field)
        values = [
            (flag, None if own is None else str(own)),
            *((name, environment.get(name)) for name in variables),
        ]
        for name, value in values:
            if value:
                explicit[field], names[field] = value, name
                break
    return explicit, names


def _combine(explicit: Mapping[str, str], names: Mapping[str, str], cluster: Place | None) -> Place:
    """Combine explicit settings with those of a cluster."""
    coordinator = explicit.get("coordinator")
    numbers = {
        field: _number(names[field], explicit[field])
        for field in ("processes", "process")
        if field in explicit
    }
    by = " and ".join(dict.fromkeys([*names.values(), *((cluster.by,) if cluster else ())]))
    place = Place(
        by,
        coordinator or (cluster and cluster.coordinator),
        numbers.get("processes", cluster.processes if cluster else None),
        numbers.get("process", cluster.process if cluster else None),
    )
    if place.processes == 1:
        place = replace(place, coordinator=None, process=place.process or 0)
    missing = [field for field in NAMES if getattr(place, field) is None]
    if missing and place.processes != 1 and not (cluster and cluster.found_by_jax and not explicit):
        lacks = ", ".join("/".join(NAMES[field]) for field in missing)
        raise ConfigError(
            f"{', '.join(names.values())}: given without {lacks}; give all three, {_ALONE}"
        )
    _check(place, {**(_VARIABLES.get(cluster.by, {}) if cluster else {}), **names})
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
            " give the port of process 0 (at most 65535), such as host:8476"
        )
    n, i = place.processes, place.process
    if n is not None and n < 1:
        raise ConfigError(f"{names.get('processes', place.by)}: must be at least 1, is {n}")
    if n is not None and i is not None and not 0 <= i < n:
        raise ConfigError(
            f"{names.get('process', place.by)}: must be from 0 to {n - 1} for {n} processes, is {i}"
        )


def _cluster(environment: Environment, explicit: Mapping[str, str]) -> Place | None:
    place = (
        _tpu(environment)
        or _open_mpi(environment, "coordinator" in explicit)
        or _slurm(environment)
        or _skypilot(environment)
    )
    if place is not None:
        return place
    return _kubernetes(environment, {"coordinator", "processes"} <= explicit.keys())


def _tpu(environment: Environment) -> Place | None:
    """Return the place on a multi-host TPU on GKE, whose variables JAX reads; for TPU VMs see
    `find_tpu_vm`.
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
    """Return the place on a TPU VM, which JAX marks in the environment when it is imported."""
    on_tpu_vm = environment.get("TPU_ML_PLATFORM") == "JAX" and not environment.get(
        "TPU_SKIP_MDS_QUERY"
    )
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    uses_tpu = "tpu" in (environment.get("JAX_PLATFORMS") or "tpu")
    return (
        Place("TPU VM")
        if on_tpu_vm and uses_tpu and not hosts and environment.get(SWITCH) != "off"
        else None
    )


def _open_mpi(environment: Environment, explicit: bool) -> Place | None:
    """Return the place of a process started by `mpirun`.

    Checked before SLURM, since `mpirun` starts its daemons as SLURM steps.
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
    if not explicit and not environment.get("OMPI_MCA_orte_hnp_uri"):
        raise ConfigError(
            f"{started}: mpirun started {n} processes, but JAX finds their coordinator by"
            " OMPI_MCA_orte_hnp_uri, which only Open MPI before version 5 sets; set"
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
                    f"{name}: the job has {count} {what}, but this process is not one of its"
                    f" tasks; start it by `srun python -m jaxpeft.train ...`, {_ALONE}"
                )
        return None
    _require(environment, ["SLURM_PROCID", "SLURM_LOCALID"], "this is a step of a SLURM job")
    n = _number("SLURM_NTASKS", tasks or "1")
    first = _first_host(environment["SLURM_STEP_NODELIST"])
    base, count = _SLURM_PORTS
    default = base + _number("SLURM_JOB_ID", environment["SLURM_JOB_ID"]) % count
    port = environment.get("JAX_COORDINATOR_PORT") or str(default)
    return Place(
        "SLURM", f"{first}:{port}", n, _number("SLURM_PROCID", environment["SLURM_PROCID"])
    )


_RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
_HOST = rf"(?:[^,\[\]\s]|{_RANGES})+"


def _first_host(nodes: str) -> str:
    """Return the first host of a list such as `a1,b2` or `gpu[01-04,07]-ib,cpu3`."""
    found = re.fullmatch(rf"({_HOST})(?:,{_HOST})*", nodes)
    if found is None:
        raise ConfigError(
            f"SLURM_STEP_NODELIST: must be a list of hosts such as a1,b2 or gpu[01-04,07], is"
            f" {nodes!r}; {_ALONE[3:]}"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[1])


def _slurm_devices(environment: Environment) -> tuple[int, ...] | None:
    """Return this task's equal share of the node's GPUs; None if it is the node's only task."""
    tasks = _tasks_here(environment)
    gpus = _gpus_here(environment)
    each = environment.get("SLURM_GPUS_PER_TASK")
    if tasks == 1 or not gpus:
        return None
    if each:
        raise ConfigError(
            f"SLURM_GPUS_PER_TASK: {each}: tasks then only see their own GPUs, so NCCL cannot use"
            " direct GPU-to-GPU transfers; use --gres=gpu:N and --ntasks-per-node=N instead of"
            " --gpus-per-task"
        )
    if gpus % tasks:
        raise ConfigError(
            f"SLURM: {tasks} tasks per node do not divide its {gpus} GPUs evenly; set"
            f" --ntasks-per-node to {gpus}, or to 1 for one process with all GPUs, or set the GPUs"
            f" of each task by {DEVICES}"
        )
    share, at = gpus // tasks, _number("SLURM_LOCALID", environment["SLURM_LOCALID"])
    if not 0 <= at < tasks:
        raise ConfigError(
            f"SLURM_LOCALID: must be from 0 to {tasks - 1} for {tasks} tasks on the node, is {at}"
        )
    first = share * at
    return tuple(range(first, first + share))


def _tasks_here(environment: Environment) -> int:
    """Return the number of tasks on this node, from a list such as `4(x2),1`."""
    counts: list[int] = []
    text = (
        environment.get("SLURM_STEP_TASKS_PER_NODE")
        or environment.get("SLURM_TASKS_PER_NODE")
        or ""
    )
    for part in filter(None, text.split(",")):
        if not (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)):
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE: cannot parse {text!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    node = _number("SLURM_NODEID", environment.get("SLURM_NODEID") or "0")
    if node < len(counts):
        return counts[node]
    return _number("SLURM_NTASKS_PER_NODE", environment.get("SLURM_NTASKS_PER_NODE") or "1")


def _gpus_here(environment: Environment) -> int:
    """Return the number of GPUs that a task sees, 0 if unknown."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if value := environment.get(name):
            # NoDevFiles or -1 means no GPUs
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
            f"SKYPILOT_NODE_IPS: has {len(addresses)} addresses, but SKYPILOT_NUM_NODES is {n};"
            f" {_ALONE[3:]}"
        )
    port = environment.get("JAX_COORDINATOR_PORT") or _PORT
    rank = _number("SKYPILOT_NODE_RANK", environment["SKYPILOT_NODE_RANK"])
    first = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    return Place("SkyPilot", f"{first}:{port}", n, rank)


def _kubernetes(environment: Environment, explicit: bool) -> Place | None:
    """Return the place of a pod of an indexed job; JAX queries the cluster unless the other
    settings are explicit.
    """
    index = environment.get("JOB_COMPLETION_INDEX")
    if not environment.get("KUBERNETES_SERVICE_HOST") or not index:
        return None
    number = _number("JOB_COMPLETION_INDEX", index)
    return Place("JOB_COMPLETION_INDEX" if explicit else "Kubernetes", process=number)


def _devices(environment: Environment, place: Place) -> tuple[int, ...] | None:
    for name in (DEVICES, "JAX_LOCAL_DEVICE_IDS"):
        text = environment.get(name)
        if not text:
            continue
        if text == "all" and name == DEVICES:
            return None
        if not re.fullmatch(r"\d+(,\d+)*", text):
            raise ConfigError(
                f"{name}: must be GPU indices such as 0,1, is {text!r}; set {DEVICES}=all for all"
                " GPUs"
            )
        numbers = tuple(int(part) for part in text.split(","))
        if len(set(numbers)) < len(numbers):
            raise ConfigError(f"{name}: lists a GPU twice: {text!r}")
        return numbers
    if place.by.endswith("Open MPI"):  # one GPU per process, as in JAX
        return (_number("OMPI_COMM_WORLD_LOCAL_RANK", environment["OMPI_COMM_WORLD_LOCAL_RANK"]),)
    return _slurm_devices(environment) if place.by.endswith("SLURM") else None


def _require(environment: Environment, names: list[str], why: str) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: is not set, but {why}; set it, {_ALONE}")


def _number(name: str, value: str | int | None) -> int:
    try:
        return int(value or 0)
    except ValueError:
        raise ConfigError(f"{name}: must be an integer, is {value!r}") from None
