"""MXFP4: decoded as transformers does, bit by bit, and rounded to nearest as in the specification."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.kernels import mxfp4

MAGNITUDES = np.asarray(mxfp4.VALUES)


def read(codes: Any, scales: Any, dtype: Any = jnp.float32) -> np.ndarray[Any, Any]:
    leaves = {"kernel_mxfp4": jnp.asarray(codes), "kernel_mxfp4_scale": jnp.asarray(scales)}
    return np.asarray(jax.jit(lambda leaves: mxfp4.decode(leaves, dtype))(leaves), np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_are_those_of_transformers_bit_by_bit(dtype: str) -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 40, 8, 16), dtype=np.uint8)
    # 0 and 1 give numbers that XLA rounds to zero, 255 is NaN
    scales = rng.integers(2, 255, (3, 40, 8)).astype(np.uint8)
    wanted = convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=getattr(torch, dtype)
    )
    found = np.stack(
        [read(b.reshape(40, 128), s, dtype).T for b, s in zip(blocks, scales, strict=True)]
    )
    np.testing.assert_array_equal(
        found.view(np.uint32), wanted.to(torch.float32).numpy().view(np.uint32)
    )


def test_a_scale_that_is_not_a_number_gives_none() -> None:
    found = read(np.zeros((1, 16), np.uint8), np.asarray([[255]], np.uint8))
    assert np.isnan(found).all()


def test_weights_are_rounded_to_the_nearest_value_of_their_block() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(96, 20)) * 2.0 ** rng.integers(-30, 30, (1, 20))
    leaves = jax.jit(mxfp4.store)(jnp.asarray(kernel, jnp.float32))
    blocks = kernel.astype(np.float32).T.reshape(20, 3, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
    np.testing.assert_array_equal(leaves["kernel_mxfp4_scale"], exponent + 127)
    scaled = np.abs(blocks) / 2.0 ** exponent[..., None]
    nearest = MAGNITUDES[np.abs(scaled[..., None] - MAGNITUDES).argmin(-1)]
    wanted = np.sign(blocks) * nearest * 2.0 ** exponent[..., None]
    np.testing.assert_array_equal(
        read(leaves["kernel_mxfp4"], leaves["kernel_mxfp4_scale"]), wanted.reshape(20, 96)
    )


def test_halves_are_rounded_to_even_and_large_weights_to_the_largest() -> None:
    given = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9, -0.25, -0.75, -7.9]
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 0.0, -1.0, -6.0]
    kernel = jnp.asarray(given + [0.0] * 21, jnp.float32)[:, None]
    leaves = mxfp4.store(kernel)
    assert int(leaves["kernel_mxfp4_scale"][0, 0]) == 127
    found = read(leaves["kernel_mxfp4"], leaves["kernel_mxfp4_scale"])
    np.testing.assert_array_equal(found[0, : len(wanted)], wanted)


@pytest.mark.parametrize("exponent", [-149, -127, -126, 100, 127])
def test_the_ends_of_the_range_give_finite_numbers(exponent: int) -> None:
    kernel = jnp.full((32, 1), np.float32(2.0) ** np.float32(exponent))
    leaves = jax.jit(mxfp4.store)(kernel)
    found = read(leaves["kernel_mxfp4"], leaves["kernel_mxfp4_scale"])
    np.testing.assert_array_equal(found, 2.0**exponent if exponent > -120 else 0)


def test_what_is_decoded_is_stored_as_the_same_codes() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (8, 32), dtype=np.uint8) & 0x77  # no zero with a sign
    codes[:, ::16] |= 7  # each block has the largest value
    scales = rng.integers(100, 150, (8, 2)).astype(np.uint8)
    again = mxfp4.store(jnp.asarray(read(codes, scales).T))
    np.testing.assert_array_equal(again["kernel_mxfp4"], codes)
    np.testing.assert_array_equal(again["kernel_mxfp4_scale"], scales)
