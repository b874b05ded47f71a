"""The same loss and gradients however a run is spread, in float32."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.strategies import (
    CASES,
    LENGTH,
    Case,
    computed,
    difference,
    main,
    mesh_of,
    options_of,
)
from jaxpeft.models import attention, chunked_attention
from jaxpeft.models.attention import KERNELS, AttentionKernel, attend
from jaxpeft.models.masks import Mask, make_mask
from jaxpeft.sharding.logical_axes import constrain, on_mesh
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.sizes import STRATEGIES
from jaxpeft.train.head_loss import CrossEntropy, through_head

TOLERANCE = 1e-5
PLAIN = "lora, packed"


@functools.cache
def alone(name: str) -> Any:
    return computed(CASES[name], MeshConfig(), 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.representatives("sequence", "hybrid_fsdp")
def test_every_strategy_on_eight_devices(strategy: str) -> None:
    assert difference(alone(PLAIN), computed(CASES[PLAIN], options_of(strategy, 8), 8)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.alternatives("replicated", "hybrid_fsdp", "fsdp_tensor", "fsdp", "tensor", "sequence")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in CASES if name != PLAIN])
def test_every_kind_of_adapter_and_base_under_every_strategy(name: str, strategy: str) -> None:
    assert difference(alone(name), computed(CASES[name], options_of(strategy, 8), 8)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fewer_devices(strategy: str, devices: int) -> None:
    assert (
        difference(alone(PLAIN), computed(CASES[PLAIN], options_of(strategy, devices), devices))
        < TOLERANCE
    )


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_several_axes_at_once_and_a_base_in_host_memory(scan: bool) -> None:
    case = Case(CASES[PLAIN].architecture, CASES[PLAIN].method, packed=True, scan=scan)
    one = computed(case, MeshConfig(), 1)
    for options in (
        MeshConfig(strategy="sequence", data=2, fsdp=1, sequence=2, tensor=2),
        MeshConfig(strategy="fsdp", data=2, offload=True),
    ):
        assert difference(one, computed(case, options, 8)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", [PLAIN, "lora on nf4", "lora, bert"])
@pytest.mark.parametrize(
    "options",
    [
        MeshConfig(strategy="sequence"),
        MeshConfig(strategy="sequence", data=2, sequence=2, tensor=2),
    ],
)
def test_spread_positions_attend_to_blocks_of_keys(
    monkeypatch: pytest.MonkeyPatch, options: MeshConfig, name: str
) -> None:
    monkeypatch.setattr(chunked_attention, "MOST_SCORES", 1)
    monkeypatch.setattr(chunked_attention, "LEAST_KEYS", 24)  # which does not divide the keys
    monkeypatch.setattr(attention, "_xla_by_positions", None)  # nothing else computes them
    jax.clear_caches()
    assert difference(alone(name), computed(CASES[name], options, 8)) < TOLERANCE


@pytest.mark.slow
def test_the_command_prints_a_row_a_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--devices", "2", "--cases", "lora", "--strategies", "fsdp"])
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["strategy", "2", "devices"]
    assert row.split()[:2] == ["lora", "fsdp"] and float(row.split()[2]) < TOLERANCE


def qkv(heads: int, kv_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = ((8, 16, n, 8) for n in (heads, kv_heads, kv_heads))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return q, k, v


class NoDropout:
    """Stands for a module in a call without dropout."""

    def has_rng(self, name: str) -> bool:
        return name == ""


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 3)])
def test_a_kernel_that_is_not_partitioned_computes_rows_and_heads_of_its_device(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int
) -> None:
    seen: list[tuple[int, ...]] = []

    def compute(q: Any, k: Any, v: Any, mask: Mask, *rest: Any) -> Any:
        seen.append((*q.shape, *k.shape))
        return KERNELS["xla"].compute(q, k, v, mask, *rest)

    monkeypatch.setattr(attention, "KERNELS", {**KERNELS, "cudnn": AttentionKernel(compute)})
    mesh = mesh_of(MeshConfig(strategy="fsdp_tensor", fsdp=2, tensor=4), 8)
    segments = jnp.asarray(np.repeat([[0] * 7 + [1] * 9], 8, axis=0), jnp.int32)
    q, k, v = qkv(heads, kv_heads)

    def run(kernel: str) -> Any:
        def sum_of(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            mask = make_mask(None, segments, causal=True)
            return jnp.sum(jnp.sin(attend(NoDropout(), kernel, q, k, v, mask)))  # pyright: ignore[reportArgumentType]

        return jax.jit(on_mesh(mesh, jax.value_and_grad(sum_of, argnums=(0, 1, 2))))(q, k, v)

    here = jax.tree.leaves(
        jax.device_put((q, k, v), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    )
    q, k, v = here
    wanted, got = run("xla"), run("cudnn")
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    together = heads % 4 == 0
    own = (4, 16, heads // 4 if together else heads, 8)
    assert set(seen) == {(*own, 4, 16, max(1, kv_heads // 4) if together else kv_heads, 8)}


@pytest.mark.parametrize("most", [1 << 20, 900])
def test_the_loss_in_chunks_takes_positions_of_every_device(most: int) -> None:
    mesh = mesh_of(MeshConfig(strategy="sequence"), 8)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, LENGTH, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(4, 20)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 20, (8, LENGTH)), jnp.int32)

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return through_head(
            CrossEntropy(),
            lambda x, i: x @ kernel,
            x,
            labels,
            jnp.ones((8, 1), jnp.float32),
            most_logits=most,
        )[0]

    spec = jax.sharding.PartitionSpec(None, "sequence")
    there = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    whole = jax.device_put(kernel, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    wanted = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, kernel)
    program = (
        jax.jit(on_mesh(mesh, jax.value_and_grad(loss, argnums=(0, 1))))
        .lower(there, whole)
        .compile()
    )
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(program(there, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    # no position leaves its device
    assert not any(
        word in program.as_text() for word in ("all-gather", "all-to-all", "collective-permute")
    )


def test_names_mean_nothing_without_a_mesh() -> None:
    x = jnp.ones((4, 4))
    assert constrain(x, "batch", "mlp") is x
    mesh = mesh_of(MeshConfig(), 1)
    assert on_mesh(mesh, len) is len
