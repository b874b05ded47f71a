"""NF4 against a plain reading of the paper, and against `bitsandbytes` where it is installed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.kernels import nf4

SHAPES = [(128, 192), (64, 4096), (172, 64), (64, 172), (96, 1000)]


def weights(shape: tuple[int, int], seed: int = 0) -> Any:
    """Return a kernel as torch has it, `[out, in]`."""
    return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def stored(rows: Any) -> Any:
    return jax.tree.map(np.asarray, jax.jit(nf4.store)(jnp.asarray(rows).T))


def plain(rows: Any) -> tuple[Any, ...]:
    """Quantize in plain NumPy: codes, magnitudes of blocks, their 8-bit places, scales and mean."""
    flat = rows.reshape(-1)
    blocks = [flat[i : i + 64] for i in range(0, flat.size, 64)]
    absmax = np.asarray([np.abs(block).max() for block in blocks], np.float32)
    codes = np.concatenate(
        [
            np.abs(block[:, None] / most - np.asarray(nf4.CODES)).argmin(1)
            for block, most in zip(blocks, absmax, strict=True)
        ]
    )
    mean = absmax.mean(dtype=np.float64)
    table = np.asarray(nf4.dynamic())
    scales, places = [], []
    for i in range(0, absmax.size, 256):
        part = absmax[i : i + 256] - mean
        scales.append(np.abs(part).max())
        places.append(np.abs(part[:, None] / scales[-1] - table).argmin(1))
    return codes, absmax, np.concatenate(places), np.asarray(scales), mean


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.representatives("shape2", "shape3")
def test_it_is_a_plain_reading_of_the_paper(shape: tuple[int, int]) -> None:
    rows = weights(shape)
    found, (codes, absmax, places, scales, mean) = stored(rows), plain(rows)
    ours = np.asarray(nf4.unpack(jnp.asarray(found["kernel_nf4"]))).reshape(-1)
    assert (ours == codes).mean() > 0.9999  # on a bound between two codes either is the nearest
    assert (found["kernel_nf4_absmax"].reshape(-1) == places).mean() > 0.999
    np.testing.assert_allclose(found["kernel_nf4_absmax_scale"], scales, rtol=1e-5)
    np.testing.assert_allclose(found["kernel_nf4_absmax_mean"], mean, rtol=1e-6)
    again = np.asarray(nf4.dynamic())[places] * np.repeat(scales, 256)[: places.size] + mean
    wanted = (np.asarray(nf4.CODES)[codes] * np.repeat(again, 64)[: codes.size]).reshape(shape)
    off = np.asarray(nf4.NF4.read(found)).T - wanted
    assert (np.abs(off) < 1e-6).mean() > 0.995 and np.abs(
        off
    ).max() < 0.02 * absmax.max() + np.diff(nf4.CODES).max()


def test_the_codes_are_quantiles_of_a_normal_distribution() -> None:
    """Equation 4 of the paper, as its authors' program has it: 8 quantiles above zero, 7 below, and
    zero.
    """
    from scipy.stats import norm

    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    wanted = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(nf4.CODES, wanted / wanted.max(), atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: str) -> None:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )
    import torch

    rows = torch.from_numpy(weights(shape)).to(getattr(torch, dtype))
    data, state = functional.quantize_4bit(
        rows, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    _, single = functional.quantize_4bit(
        rows, blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    found = stored(rows.float().numpy())
    np.testing.assert_array_equal(found["kernel_nf4"].reshape(-1), data.numpy().reshape(-1))
    np.testing.assert_array_equal(np.asarray(nf4.dynamic(), np.float32), state.state2.code.numpy())
    np.testing.assert_array_equal(
        np.abs(nf4.blocks_of(rows.float().numpy().T)).max(axis=1), single.absmax.numpy()
    )
    np.testing.assert_allclose(
        found["kernel_nf4_absmax_scale"], state.state2.absmax.numpy(), rtol=1e-6
    )
    # Its program for CPUs rounds a few of a thousand scales to the second nearest; that for GPUs
    # rounds as here.
    assert (found["kernel_nf4_absmax"].reshape(-1) == state.absmax.numpy()).mean() > 0.98


def test_a_block_of_zeros_is_decoded_to_zeros():
    kernel = np.random.default_rng(0).standard_normal((128, 8)).astype(np.float32)
    kernel[:, 2] = kernel[:64, 3] = 0
    back = np.asarray(nf4.decode(nf4.store(jnp.asarray(kernel)), jnp.float32)).T
    assert not back[:, 2].any() and not back[:64, 3].any()
    np.testing.assert_allclose(back[64:, 3], kernel[64:, 3], atol=0.5)
