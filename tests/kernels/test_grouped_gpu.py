"""Products of grouped rows on GPUs: the programs are interpreted, and lowered."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.kernels import grouped, grouped_gpu
from tests.kernels.test_few_rows import draw, lower_for_gpu

SIZES = {
    "empty groups": (100, [30, 0, 50, 20]),
    "one group": (64, [0, 64, 0]),
    "single rows": (40, [1] * 40),
    "one large group": (150, [140, 5, 5]),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.representatives("empty groups")
def test_products_and_gradients_are_those_of_each_group(name: str) -> None:
    rows, numbers = SIZES[name]
    sizes, dy = jnp.asarray(numbers, jnp.int32), jax.random.normal(jax.random.key(2), (rows, 48))
    x = jax.random.normal(jax.random.key(0), (rows, 32))
    kernel = jax.random.normal(jax.random.key(1), (len(numbers), 32, 48))

    def run(product: Any) -> Any:
        y, pull = jax.vjp(lambda x, kernel: product(x, kernel, sizes), x, kernel)
        return y, *pull(dy)

    own = run(lambda *given: grouped_gpu.product(*given, interpret=True))
    for found, wanted in zip(own, run(grouped.by_blocks), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_the_programs_lower_for_gpus() -> None:
    x, kernel, sizes = draw(0, 256, 64), draw(1, 3, 64, 48), jnp.asarray([100, 0, 156], jnp.int32)

    def gradients(x: Any, kernel: Any) -> Any:
        return jax.grad(
            lambda *given: jnp.sum(grouped_gpu.product(*given, sizes).astype(jnp.float32)), (0, 1)
        )(x, kernel)

    text = lower_for_gpu(gradients, x, kernel)
    assert "grouped_product" in text
    assert "grouped_sums" in text


@pytest.mark.slow
def test_other_shapes_and_platforms_use_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = draw(0, 64, 32), draw(1, 2, 32, 16)
    assert not grouped_gpu.applies(x, kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert grouped_gpu.applies(x, kernel)
    assert not grouped_gpu.applies(x, kernel[..., :8])
    assert not grouped_gpu.applies(x[:8], kernel)
    sizes = jnp.asarray([40, 24], jnp.int32)
    # traced for GPUs too, and compiled for this platform
    np.testing.assert_array_equal(
        grouped.product(x, kernel, sizes), grouped.by_blocks(x, kernel, sizes)
    )
