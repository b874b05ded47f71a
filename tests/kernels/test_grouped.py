"""Products of grouped rows are those of each group alone, with their gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.kernels import QUANTIZED, grouped

SIZES = {
    "even": (8, 8, 8, 8),
    "some empty": (0, 20, 0, 12),
    "one has all": (0, 0, 32, 0),
    "the last is empty": (1, 2, 29, 0),
    "more than a block": (300, 1, 0, 515),
}
IN, OUT = 16, 24


def drawn(sizes: tuple[int, ...], dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (sum(sizes), IN), dtype)
    kernel = jax.random.normal(keys[1], (len(sizes), IN, OUT), dtype)
    return x, kernel, jnp.asarray(sizes, jnp.int32)


def one_by_one(x: Any, kernel: Any, sizes: tuple[int, ...]) -> Any:
    ends = np.cumsum(sizes)
    parts = [x[end - size : end] @ own for own, size, end in zip(kernel, sizes, ends, strict=True)]
    return jnp.concatenate(parts)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", [grouped.product, jax.lax.ragged_dot], ids=["here", "jax"])
def test_it_is_the_product_of_each_group(how: Any, sizes: tuple[int, ...]) -> None:
    x, kernel, given = drawn(sizes)
    np.testing.assert_allclose(
        jax.jit(how)(x, kernel, given), one_by_one(x, kernel, sizes), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.representatives("some empty")
def test_its_gradients_are_those_of_each_group(sizes: tuple[int, ...]) -> None:
    x, kernel, given = drawn(sizes)

    def total(x: Any, kernel: Any, how: Any, sizes: Any) -> Any:
        return jnp.sum(jnp.sin(how(x, kernel, sizes)))

    own = jax.grad(total, (0, 1))(x, kernel, grouped.product, given)
    wanted = jax.grad(total, (0, 1))(x, kernel, one_by_one, sizes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), own, wanted)


def test_the_number_of_products_does_not_grow_with_that_of_groups() -> None:
    def flops(groups: int) -> float:
        x, kernel = jnp.zeros((4096, 64)), jnp.zeros((groups, 64, 64))
        run = jax.jit(grouped.product).lower(x, kernel, jnp.full(groups, 4096 // groups))
        return float(run.compile().cost_analysis()["flops"])

    assert flops(32) < 3 * flops(4)


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.representatives("nf4")
@pytest.mark.slow
def test_quantized_kernels_compute_as_their_decoded_ones(form: str) -> None:
    sizes = (5, 0, 27)
    x, kernel, given = drawn(sizes)
    wide = jnp.concatenate([kernel] * 8, axis=1)  # blocks of scales need more inputs
    rows = jnp.concatenate([x] * 8, axis=1)
    stored = jax.vmap(QUANTIZED[form].store)(wide)
    decoded = jax.vmap(QUANTIZED[form].read)(stored)

    def total(x: Any, leaves: Any) -> Any:
        return jnp.sum(jnp.sin(grouped.stored_product(x, leaves, given)))

    np.testing.assert_allclose(
        grouped.stored_product(rows, stored, given), one_by_one(rows, decoded, sizes), atol=1e-3
    )
    np.testing.assert_allclose(
        jax.grad(total)(rows, stored), jax.grad(total)(rows, {"kernel": decoded}), atol=1e-3
    )


@pytest.mark.slow
def test_the_result_has_the_dtype_of_the_rows() -> None:
    x, kernel, sizes = drawn((3, 5), jnp.bfloat16)
    assert grouped.product(x, kernel.astype(jnp.float32), sizes).dtype == jnp.bfloat16
