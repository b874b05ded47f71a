"""Examine one candidate: compile a config under one strategy and analyze the program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpeft.config.schema import Config
from jaxpeft.core import training_hooks
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.hub import fetching
from jaxpeft.models.attention import KERNELS, kernel_of
from jaxpeft.plan import estimates
from jaxpeft.plan.collectives import collectives
from jaxpeft.plan.hlo import parse
from jaxpeft.plan.programs import Compiled, compile_step, gib
from jaxpeft.plan.report import Memory, Row
from jaxpeft.plan.roofline import rates, roofline
from jaxpeft.plan.step_arguments import StepArguments, step_arguments
from jaxpeft.plan.subject import Subject, subject
from jaxpeft.plan.topology import Topology
from jaxpeft.plan.work import work
from jaxpeft.sharding.layout import layout
from jaxpeft.sharding.mesh import heads_of, make_mesh
from jaxpeft.sharding.rules import sharding_rules
from jaxpeft.sharding.sizes import SEQUENCE
from jaxpeft.train import flops
from jaxpeft.train.memory import USABLE
from jaxpeft.train.step import jit_train_step, make_train_step


@dataclass(frozen=True)
class Setting:
    """Setting shared by all candidates of a plan.

    Attributes:
        described: contents of the model's `config.json`.
        topology: topology of the devices.
        devices: devices to compile for.
        limit: bytes per device that a step may use; None if unknown.
        scan: whether to scan layers, if possible.
    """

    described: Mapping[str, Any]
    topology: Topology
    devices: list[Any]
    limit: float | None
    scan: bool

    @property
    def room(self) -> float | None:
        """Bytes a step is planned for: less than the limit on a GPU, to allow for fragmentation."""
        if self.limit is None or self.topology.chip.platform != "cuda":
            return self.limit
        return USABLE * self.limit


@dataclass(frozen=True)
class Candidate:
    """An examined config.

    Attributes:
        config: the config.
        row: result, as a row of the report.
        placed: arguments of the step; None if the config is rejected.
        kept: estimated memory beyond the arguments; None if the config is rejected.
    """

    config: Config
    row: Row
    placed: StepArguments | None = None
    kept: estimates.KeptMemory | None = None


def examine(setting: Setting, config: Config, change: str = "") -> Candidate:
    """Compile a config under its strategy, and analyze the program.

    Args:
        setting: setting shared by all candidates.
        config: checked config, with the strategy.
        change: change from the requested config, as text.
    """
    try:
        mesh, run, notes = prepare(setting, config)
    except (ConfigError, TargetError) as error:
        return Candidate(
            config,
            _row(config, change, {}, "", f"refused: {'; '.join(error.problems)}", fits=False),
        )
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    placed = step_arguments(run, mesh)
    kept = estimates.estimate_kept(run, placed, mesh)
    compiled = compile_step(
        step_of(run, placed, mesh),
        (placed.state, placed.frozen, placed.batch),
        setting.topology,
        setting.limit,
        placed.held,
    )
    memory = _memory(setting, run, placed, kept, compiled)
    room = setting.room
    fits = None if room is None else compiled.fits and memory.total <= room
    row = _row(
        config, change, sizes, run.model.options.remat, _verdict(memory, room, fits), fits=fits
    )
    row = dataclasses.replace(
        row,
        attention=_attention(setting, config, mesh),
        memory=memory,
        seconds=round(compiled.seconds, 1),
        notes=(
            *notes,
            *_copied_notes(setting, run),
            *_dropped_notes(placed),
            *([compiled.problem] if compiled.problem else []),
        ),
    )
    return Candidate(config, _read(setting, row, run, mesh, compiled), placed, kept)


def predict_bytes(setting: Setting, config: Config) -> int:
    """Estimate the bytes of a step per device without compiling: arguments, activations and the
    current layer.

    Raises:
        ConfigError: the config does not fit the devices.
    """
    mesh, run, _ = prepare(setting, config)
    placed = step_arguments(run, mesh)
    return placed.held + estimates.estimate_kept(run, placed, mesh).total(run.model.options.remat)


def prepare(setting: Setting, config: Config) -> tuple[Mesh, Subject, list[str]]:
    """Make the mesh and the abstract run, with a remat policy chosen.

    Returns:
        `(mesh, run, notes)`.

    Raises:
        ConfigError: the config does not fit the devices.
    """
    mesh = make_mesh(config, setting.devices, heads_of(setting.described))
    policy = config.model.remat
    attention = _attention(setting, config, mesh)
    if setting.topology.simulated and KERNELS[attention].platform:  # unavailable here
        attention = "xla"
    run, notes = stack_where_possible(
        setting, config, attention, "full" if policy == "auto" else policy
    )
    if policy == "auto":
        run = _with_remat(setting, run, mesh)
    found = layout(mesh, sharding_rules(config.mesh), run.base)
    return mesh, run.with_model(fetching.fetch_kernels(run.model, found)), notes


def stack_where_possible(
    setting: Setting, config: Config, attention: str, remat: str
) -> tuple[Subject, list[str]]:
    """Make the abstract run, with scanned layers if possible; return `(run, notes)`.

    Raises:
        ConfigError: the options are incompatible, or the model is not supported.
        TargetError: the method's targets match no module of the model.
    """
    try:
        return subject(config, setting.described, attention, remat, scan=setting.scan), []
    except (ConfigError, TargetError) as error:
        if not setting.scan:
            raise
        run = subject(config, setting.described, attention, remat, scan=False)
        return run, [f"layers unrolled: they cannot be stacked ({error.problems[0]})"]


def _with_remat(setting: Setting, run: Subject, mesh: Mesh) -> Subject:
    """Choose the remat policy as a run does: the least recomputation that fits, none on a CPU."""
    room = setting.room
    chosen = "none"
    if room is not None:
        placed = step_arguments(run, mesh)
        chosen = estimates.estimate_kept(run, placed, mesh).fastest(USABLE * room - placed.held)
    return run.with_model(
        run.model.clone(options=dataclasses.replace(run.model.options, remat=chosen))
    )


def _attention(setting: Setting, config: Config, mesh: Mesh) -> str:
    return kernel_of(config.model.attention, setting.topology.chip.platform, mesh.shape[SEQUENCE])


def step_of(run: Subject, placed: StepArguments, mesh: Mesh) -> Any:
    """Make the run's train step, jitted as the training loop does."""
    config = run.config
    step = make_train_step(
        run.model,
        run.loss,
        run.optimizer,
        config.train.accumulation,
        partial(training_hooks.penalty, config.method),
    )
    return jit_train_step(step, mesh, jax.tree.map(lambda leaf: leaf.sharding, placed.state))


def _memory(
    setting: Setting,
    run: Subject,
    placed: StepArguments,
    kept: estimates.KeptMemory,
    compiled: Compiled,
) -> Memory:
    """Split the memory of a step: computed arguments, estimated activations, and the rest of the
    compiler's total.
    """
    activations = kept.kept[run.model.options.remat]
    known = placed.base + placed.adapters + placed.optimizer
    # the program was compiled for a CPU, so its memory is not that of the GPU
    if setting.topology.chip.platform == "cuda":
        total = placed.held + kept.total(run.model.options.remat)
    else:
        total = compiled.total
        activations = max(0, min(activations, total - known))
    limit = None if setting.limit is None else int(setting.limit)
    return Memory(
        placed.base,
        placed.adapters,
        placed.optimizer,
        activations,
        total - known - activations,
        total,
        limit,
    )


def _verdict(memory: Memory, room: float | None, fits: bool | None) -> str:
    if room is None or fits is None:
        return "memory limit is unknown; give --hbm"
    if fits:
        return f"fits, with {gib(room - memory.total)} to spare"
    return f"does not fit, by {gib(max(0.0, memory.total - room))}"


def _copied_notes(setting: Setting, run: Subject) -> list[str]:
    options = run.model.options
    if not (
        options.scan_layers
        and options.quant is not None
        and setting.topology.chip.platform == "cuda"
    ):
        return []
    measured = "measured for an 8B model in NF4 with remat full: 17.1 GiB instead of 10.0"
    return [
        (
            "memory is given for unrolled layers, which a run uses: XLA copies quantized kernels"
            f" of stacked layers ({measured})"
        )
    ]


def _dropped_notes(placed: StepArguments) -> list[str]:
    if not placed.dropped:
        return []
    more = f" and {len(placed.dropped) - 2} more" if len(placed.dropped) > 2 else ""
    return [
        (
            "not sharded, because an axis does not divide a dimension:"
            f" {'; '.join(placed.dropped[:2])}{more}"
        )
    ]


def _row(
    config: Config,
    change: str,
    mesh: Mapping[str, int],
    remat: str,
    verdict: str,
    *,
    fits: bool | None,
) -> Row:
    return Row(
        config.mesh.strategy or "config",
        change,
        mesh,
        config.train.batch_size,
        config.train.accumulation,
        remat or config.model.remat,
        config.model.quant,
        config.model.attention,
        fits,
        verdict,
    )


def _read(setting: Setting, row: Row, run: Subject, mesh: Mesh, compiled: Compiled) -> Row:
    """Add the program's work, collectives and roofline to a row."""
    active = flops.active_share(run.model.config)
    model_flops = run.tokens * flops.per_token(run.state.trainable, run.frozen, active)
    row = dataclasses.replace(row, model_flops=model_flops)
    if compiled.text is None:
        return row
    program = parse(compiled.text)
    found = collectives(program, row.mesh, *_slices(mesh))
    done = work(program, causal=run.config.model.task == "causal_lm")
    chip, notes = setting.topology.chip, row.notes
    if done.kernels:
        notes = (
            *notes,
            f"FLOPs exclude {done.kernels} kernel calls, which do not report theirs",
        )
    own_program = not setting.topology.simulated
    roof = roofline(
        chip,
        done,
        own_program,
        rates(setting.topology, mesh, found),
        tokens=run.tokens,
        model_flops=model_flops,
        devices=mesh.size,
    )
    traffic = done.traffic if own_program else None
    return dataclasses.replace(
        row, collectives=found, flops=done.flops, traffic=traffic, roofline=roof, notes=notes
    )


def _slices(mesh: Mesh) -> tuple[str, int]:
    """Return the mesh axes that cross slices, and the number of slices."""
    of = np.vectorize(lambda device: getattr(device, "slice_index", 0) or 0, otypes=[int])(
        mesh.devices
    )
    over = [
        name for i, name in enumerate(mesh.axis_names) if (of != np.take(of, [0], axis=i)).any()
    ]
    return "+".join(over) or "none", len(np.unique(of))
