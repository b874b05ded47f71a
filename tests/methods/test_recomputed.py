"""The product with a matrix that is made for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.methods.recomputed import multiply


def outer(leaves: Any) -> Any:
    return jnp.outer(leaves["a"], leaves["b"])


def test_values_and_gradients_are_those_of_the_product_and_no_matrix_is_kept() -> None:
    rng = np.random.default_rng(0)
    leaves = {
        "a": jnp.asarray(rng.normal(size=20), jnp.float32),
        "b": jnp.asarray(rng.normal(size=24), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(3, 20)), jnp.float32)
    wanted, plain = jax.vjp(lambda leaves, x: x @ outer(leaves), leaves, x)
    found, made = jax.vjp(lambda leaves, x: multiply(outer, leaves, x), leaves, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    dy = jnp.ones_like(wanted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain(dy), made(dy)
    )
    assert (20, 24) in [leaf.shape for leaf in jax.tree.leaves(plain)]
    assert (20, 24) not in [leaf.shape for leaf in jax.tree.leaves(made)]
