"""Every number format: what it takes, how far it is off, its product and gradient, and that no
decoded kernel is kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.kernels import QUANTIZED, fp8
from jaxpeft.kernels.form import pack, select, unpack

RNG = np.random.default_rng(0)
every_form = pytest.mark.parametrize("name", QUANTIZED)
WORST = {"nf4": 0.16, "int4": 0.075, "int8": 0.005, "fp8": 0.037, "mxfp4": 0.26}
"""The largest error of a weight as a share of the largest weight that shares its scale: half of the
widest gap of the format.
"""


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(0.02 * RNG.standard_normal(shape), jnp.float32)


def held(name: str, kernel: Any, **options: Any) -> dict[str, Any]:
    return jax.jit(lambda k: QUANTIZED[name].store(k, **options))(kernel)


@every_form
@pytest.mark.parametrize("shape", [(64, 40), (128, 96), (172, 64), (32, 48), (1000, 6)])
@pytest.mark.representatives("shape0-*", "shape4-*")
def test_a_kernel_comes_back_in_its_shape_and_near(name: str, shape: tuple[int, int]) -> None:
    if shape[0] % QUANTIZED[name].multiple:
        pytest.skip(f"{name} needs inputs in blocks of {QUANTIZED[name].multiple}")
    form, kernel = QUANTIZED[name], normal(*shape)
    leaves = held(name, kernel)
    assert set(leaves) == set(form.leaves)
    assert form.shape(leaves[form.leaves[0]].shape) == shape
    read = jax.jit(form.read)
    found = read(leaves)
    assert found.shape == shape and found.dtype == jnp.float32
    assert np.abs(found - kernel).max() <= WORST[name] * np.abs(kernel).max()
    again = held(name, found)
    np.testing.assert_allclose(
        read(again), found, rtol=0.05, atol=0.02 * float(jnp.abs(kernel).max())
    )


@pytest.mark.parametrize(
    ("name", "most"),
    [("nf4", 0.516), ("int4", 0.532), ("int8", 1.001), ("fp8", 1.002), ("mxfp4", 0.532)],
)
def test_bytes_a_weight(name: str, most: float) -> None:
    leaves = jax.eval_shape(
        QUANTIZED[name].store, jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16)
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))
    assert size / (4096 * 14336) <= most


@every_form
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_and_its_gradient_are_those_of_the_kernel_it_stands_for(
    name: str, dtype: Any
) -> None:
    form = QUANTIZED[name]
    leaves = held(name, normal(128, 96))
    x, dy = jnp.asarray(normal(2, 5, 128) * 50, dtype), jnp.asarray(normal(2, 5, 96) * 50, dtype)
    kernel = form.read(leaves).astype(dtype)
    wanted, back = jax.vjp(lambda x: x @ kernel, x)
    found, ours = jax.vjp(lambda x: form.matmul(x, leaves), x)
    assert found.dtype == dtype
    close = 1e-5 if dtype == jnp.float32 else 0.02
    for one, two in ((found, wanted), (ours(dy)[0], back(dy)[0])):
        one, two = (np.asarray(array, np.float32) for array in (one, two))
        np.testing.assert_allclose(one, two, rtol=close, atol=close * np.abs(two).max())


@every_form
def test_no_decoded_kernel_is_kept_for_the_backward_pass(name: str) -> None:
    form, leaves = QUANTIZED[name], held(name, normal(128, 96))
    _, back = jax.vjp(lambda x, leaves: form.matmul(x, leaves), normal(4, 128), leaves)
    floats = [leaf for leaf in jax.tree.leaves(back) if leaf.dtype in (jnp.float32, jnp.bfloat16)]
    assert all(leaf.size < 128 * 96 for leaf in floats)
    assert all(
        np.all(np.asarray(g) == 0)
        for g in jax.tree.leaves(back(normal(4, 96))[1])
        if g.dtype == jnp.float32
    )


@every_form
def test_a_kernel_of_zeros_stays_one(name: str) -> None:
    leaves = held(name, jnp.zeros((64, 8)))
    assert not np.asarray(QUANTIZED[name].read(leaves)).any()
    assert not np.asarray(QUANTIZED[name].matmul(jnp.ones((3, 64)), leaves)).any()


@pytest.mark.parametrize(("name", "most"), [("int4", 7), ("int8", 127)])
@pytest.mark.parametrize("group", [None, 32])
def test_whole_numbers_are_the_nearest_to_the_weight_over_its_scale(
    name: str, most: int, group: int | None
) -> None:
    kernel = normal(128, 10)
    leaves = held(name, kernel, group=group)
    scale = np.asarray(leaves[f"kernel_{name}_scale"], np.float32)
    groups = np.asarray(kernel).T.reshape(*scale.shape, -1)
    assert scale.shape == (10, 128 // (group or {"int4": 64, "int8": 128}[name]))
    np.testing.assert_allclose(scale, np.abs(groups).max(axis=2) / most, rtol=2**-8)
    wanted = np.clip(np.round(groups / scale[..., None]), -most, most) * scale[..., None]
    np.testing.assert_allclose(
        np.asarray(QUANTIZED[name].read(leaves)).T, wanted.reshape(10, 128), rtol=1e-6
    )


def test_codes_are_packed_with_the_earlier_one_high_and_looked_up() -> None:
    codes = jnp.asarray(RNG.integers(0, 16, (3, 8)), jnp.uint8)
    data = pack(codes)
    assert data.shape == (3, 4) and int(data[0, 0]) == 16 * int(codes[0, 0]) + int(codes[0, 1])
    np.testing.assert_array_equal(unpack(data), codes)
    table = tuple(float(n) ** 2 for n in range(16))
    np.testing.assert_array_equal(
        select(codes, table, jnp.float32), np.asarray(table, np.float32)[codes]
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.representatives("bfloat16", "float16")
def test_the_products_of_codes_stay_within_the_range_of_the_activations(dtype: Any) -> None:
    # what a GPU computes, whose codes of up to 448 are added up before they are scaled
    kernel = 0.05 * jax.random.normal(jax.random.key(0), (256, 64))
    leaves = QUANTIZED["fp8"].store(kernel)
    x, dy = (jax.random.normal(jax.random.key(i), (4, n)) for i, n in ((1, 256), (2, 64)))
    y = fp8._forward(x.astype(dtype), leaves)
    dx = fp8._backward(leaves, 1e-3 * dy.astype(dtype))
    for found, exact, most in ((y, x @ kernel, 0.05), (dx, 1e-3 * dy @ kernel.T, 0.08)):
        assert found.dtype == dtype
        off = np.linalg.norm(np.asarray(found, np.float32) - exact) / np.linalg.norm(exact)
        assert off < most
