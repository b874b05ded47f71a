"""Products of few rows: the programs are interpreted, and lowered for GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxpeft.kernels import few_rows, nf4

GPU = AbstractMesh(
    (1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
)


def lower_for_gpu(fn: Callable[..., Any], *operands: Any) -> str:
    """Return the program of a function for NVIDIA GPUs, with its kernels in Triton's language."""
    with jax.sharding.use_abstract_mesh(GPU):
        return jax.jit(fn).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def draw(number: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(number), shape).astype(jnp.bfloat16)


@pytest.mark.parametrize("rows", [(1,), (5, 1), (33,)])
def test_products_of_few_rows_are_products(rows: tuple[int, ...]) -> None:
    x, kernels = draw(0, *rows, 256), (draw(1, 256, 64), draw(2, 256, 192))
    for y, kernel in zip(few_rows._products(x, *kernels, interpret=True), kernels, strict=True):
        exact = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
        assert y.shape == exact.shape
        np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=2**-8, atol=2**-8)


def test_products_of_nf4_codes_are_those_of_the_decoded_kernel() -> None:
    x, leaves = draw(0, 3, 1, 512), nf4.store(draw(1, 512, 64))
    exact = x.astype(jnp.float32) @ nf4.decode(leaves, jnp.float32).T
    y = nf4.few_rows_product(x, leaves, interpret=True)
    # codes, scales and their product are rounded to bfloat16
    error = np.abs(np.asarray(y, np.float32) - exact).mean()
    assert error < 2**-8 * np.abs(exact).mean()


@pytest.mark.slow
def test_scales_without_double_quantization_are_used_as_they_are() -> None:
    x, leaves = draw(0, 3, 256), dict(nf4.store(draw(1, 256, 64)))
    absmax = jax.random.uniform(jax.random.key(2), leaves["kernel_nf4_absmax"].shape)
    leaves |= {
        "kernel_nf4_absmax": absmax,
        "kernel_nf4_absmax_scale": jnp.ones(1),
        "kernel_nf4_absmax_mean": jnp.zeros(()),
    }
    exact = x.astype(jnp.float32) @ nf4.decode(leaves, jnp.float32).T
    y = nf4.few_rows_product(x, leaves, interpret=True)
    assert np.abs(np.asarray(y, np.float32) - exact).mean() < 2**-8 * np.abs(exact).mean()


def run_ptx(text: str, word: int) -> tuple[int, int]:
    """Run the instructions of a decoding on one register, as the PTX manual defines them."""
    registers = {"$2": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def permute(a: int, b: int, digits: int) -> int:
        both = (a | b << 32).to_bytes(8, "little")
        picked = [(digits >> 4 * i) & 15 for i in range(4)]
        assert max(picked) < 8  # otherwise the sign of a byte is repeated
        return int.from_bytes(bytes(both[i] for i in picked), "little")

    run: dict[str, Callable[..., int]] = {
        "shr.u32": lambda a, b: a >> b,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "prmt.b32": permute,
        "lop3.b32": lambda a, b, c, table: (a & b) | (~a & c) if table == 0xCA else 1 / 0,
    }
    for line in re.findall(r"(\S+) ([^;]+);", text):
        name, operands = line[0], line[1].split(", ")
        if name != ".reg":
            registers[operands[0]] = run[name](*map(value, operands[1:]))
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("high", [True, False], ids=["high", "low"])
def test_the_instructions_decode_every_byte(high: bool) -> None:
    wanted = np.asarray(nf4.CODES, jnp.bfloat16)
    for first in range(0, 256, 4):
        codes = np.arange(first, first + 4, dtype=np.uint8)
        words = run_ptx(few_rows._instructions(nf4.CODES, high), int(codes.view(np.uint32)[0]))
        found = np.asarray(words, np.uint32).view(wanted.dtype)
        np.testing.assert_array_equal(found, wanted[codes >> 4 if high else codes & 15])


def test_the_programs_lower_for_gpus() -> None:
    x, kernel = draw(0, 32, 256), draw(1, 256, 128)
    assert "few_rows" in lower_for_gpu(few_rows._products, x, kernel, draw(2, 256, 64))
    assert "nf4_few_rows" in lower_for_gpu(nf4.few_rows_product, x, nf4.store(kernel))


def test_the_cpu_computes_products_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = draw(0, 4, 256), draw(1, 256, 128)
    assert not few_rows.applies(x, 256, 128)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert few_rows.applies(x, 256, 128)
    assert not few_rows.applies(draw(0, 65, 256), 256, 128)
    assert not few_rows.applies(x.astype(jnp.float32), 256, 128)
    assert not few_rows.applies(x, 200, 128)

    def loss(x: Any, kernel: Any, matmul: Any) -> Any:
        return jnp.sum(matmul(x, kernel).astype(jnp.float32) ** 2)

    # traced for GPUs too, and compiled for this platform
    for own, usual in zip(
        jax.grad(loss, (0, 1))(x, kernel, few_rows.matmul),
        jax.grad(loss, (0, 1))(x, kernel, jnp.matmul),
        strict=True,
    ):
        np.testing.assert_array_equal(own, usual)
