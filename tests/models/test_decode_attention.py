"""Attention of one query to a KV cache on GPUs: the program is interpreted, and lowered."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models import decode_attention
from jaxpeft.models.attention import _with_cache
from jaxpeft.models.attention_scores import Scoring
from jaxpeft.models.masks import Mask
from tests.kernels.test_few_rows import lower_for_gpu


def operands(slots: int, dtype: str = "float32") -> list[jax.Array]:
    shapes = [(3, 1, 8, 64), (3, 1, 2, 64), (3, 1, 2, 64), (3, 2, slots, 64), (3, 2, slots, 64)]
    return [
        jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)
    ]


def mask(slots: int) -> Mask:
    """Return a mask of rows that see 0, 50 and all slots, with a hole in the second."""
    seen = jnp.arange(slots)[None] < jnp.asarray([[0], [50], [slots]])
    seen = seen.at[1, 7].set(False)
    return Mask(jnp.pad(seen, ((0, 0), (0, 1)), constant_values=True)[:, None, None])


@pytest.mark.parametrize("slots", [64, 96])
@pytest.mark.parametrize("scoring", [Scoring(), Scoring(0.3, 5.0)], ids=["plain", "bounded"])
@pytest.mark.representatives("bounded-96")
def test_the_program_attends_as_xla_does(slots: int, scoring: Scoring) -> None:
    q, k, v, keys, values = operands(slots)
    own = decode_attention.compute(q, k, v, mask(slots), keys, values, scoring, interpret=True)
    wanted = _with_cache(q, k, v, mask(slots), keys, values, scoring, None)
    np.testing.assert_allclose(own, wanted, atol=2e-6)


def test_the_program_lowers_for_gpus() -> None:
    q, k, v, keys, values = operands(96, "bfloat16")
    assert decode_attention.takes(q, k, keys, values, Scoring())

    def run(*given: jax.Array) -> jax.Array:
        return decode_attention.compute(*given[:3], mask(96), *given[3:], Scoring())

    assert "decode_attention" in lower_for_gpu(run, q, k, v, keys, values)


def test_other_calls_are_not_taken() -> None:
    q, k, _v, keys, values = operands(96, "bfloat16")
    assert not decode_attention.takes(q.astype("float32"), k, keys, values, Scoring())
    assert not decode_attention.takes(jnp.repeat(q, 2, axis=1), k, keys, values, Scoring())
    assert not decode_attention.takes(q, jnp.repeat(k, 2, axis=1), keys, values, Scoring())
    assert not decode_attention.takes(q, k, keys[:, :, :90], values[:, :, :90], Scoring())
    assert not decode_attention.takes(q, k, keys, values, Scoring(sinks=True))
