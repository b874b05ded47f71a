"""FLOPs and traffic of programs, by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxpeft.plan.hlo import parse
from jaxpeft.plan.work import work


def of(run, *arguments):
    return work(parse(jax.jit(run).lower(*arguments).compile().as_text()))


def test_products_in_a_loop():
    def run(x, w):
        return jax.lax.scan(lambda y, kernel: (jnp.tanh(y @ kernel), None), x, w)[0]

    assert of(run, jnp.ones((8, 64)), jnp.ones((5, 64, 64))).flops == 5 * 2 * 8 * 64 * 64


def test_a_batched_product():
    found = of(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    )
    assert found.flops == 2 * 3 * 4 * 5 * 6


CONVOLUTION = """HloModule m

ENTRY %main (a: bf16[16,1024], w: bf16[1024,256]) -> bf16[16,256] {{
  %a = bf16[{lhs}]{{1,0}} parameter(0)
  %w = bf16[{rhs}]{{1,0}} parameter(1)
  ROOT %c = bf16[{out}]{{1,0}} convolution(%a, %w), {how}
}}
"""


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "how", "flops"),
    [
        ("16,1024", "1024,256", "16,256", "dim_labels=bf_io->bf", 2 * 16 * 1024 * 256),
        # a batched product, as a TPU writes it: of all pairs of places along the batch only the
        # equal ones meet
        (
            "3,4,5",
            "3,5,6",
            "3,4,6",
            "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            2 * 3 * 4 * 5 * 6,
        ),
        (
            "1,8,2",
            "3,2,4",
            "1,8,4",
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * (3 * 8 - 2) * 2 * 4,
        ),
    ],
)
def test_convolutions(lhs, rhs, out, how, flops):
    assert work(parse(CONVOLUTION.format(lhs=lhs, rhs=rhs, out=out, how=how))).flops == flops


TRAFFIC = """HloModule m

%slice_fusion (p: bf16[4,100], i: s32[]) -> bf16[1,100] {
  %p = bf16[4,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = bf16[1,100]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,100}
}

%write_fusion (q: bf16[4,100], u: bf16[1,100], j: s32[]) -> bf16[4,100] {
  %q = bf16[4,100]{1,0} parameter(0)
  %u = bf16[1,100]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %w = bf16[4,100]{1,0} dynamic-update-slice(%q, %u, %j, %j)
}

ENTRY %main (x: bf16[4,100], k: s32[]) -> bf16[4,100] {
  %x = bf16[4,100]{1,0} parameter(0)
  %k = s32[]{:S(6)} parameter(1)
  %a = bf16[1,100]{1,0} fusion(%x, %k), kind=kLoop, calls=%slice_fusion
  %b = bf16[1,100]{1,0:S(1)} copy(%a)
  %c = bf16[1,100]{1,0} negate(%b)
  ROOT %d = bf16[4,100]{1,0} fusion(%x, %c, %k), kind=kLoop, calls=%write_fusion
}
"""


def test_traffic_counts_slices_and_what_is_in_memory_alone():
    # a: reads and writes 200 bytes; b: reads 200 into the chip; c: writes 200; d: reads the 200 of
    # c, writes 200 in place
    assert work(parse(TRAFFIC)).traffic == 400 + 200 + 200 + 400


def test_kernels_without_an_estimate_are_counted():
    text = """HloModule m

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  %k = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"123"}}
  ROOT %l = bf16[8]{0} custom-call(%k), custom_call_target="tpu_custom_call"
}
"""
    assert (work(parse(text)).flops, work(parse(text)).kernels) == (123, 1)


def test_splash_attention_is_counted_by_the_shape_of_its_queries():
    text = """HloModule m

ENTRY %main (i: s32[1,2,2], q: bf16[2,3,256,64]) -> bf16[2,3,256,64] {
  %i = s32[1,2,2]{2,1,0} parameter(0)
  %q = bf16[2,3,256,64]{3,2,1,0} parameter(1)
  ROOT %splash_mha_fwd_residuals.1 = bf16[2,3,256,64]{3,2,1,0} custom-call(%i, %q, %q, %q), custom_call_target="tpu_custom_call"
}
"""
    whole = 2 * 2 * 2 * 3 * 256 * 256 * 64
    assert work(parse(text)).flops == whole / 2
    assert work(parse(text), causal=False).flops == whole
