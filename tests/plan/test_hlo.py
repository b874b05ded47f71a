"""The text of compiled programs, read: instructions, shapes, and how often computations run."""

import jax
import jax.numpy as jnp
import pytest

from jaxpeft.plan.hlo import Array, arrays, parse

TPU = """HloModule jit_f, is_scheduled=true

%fused.1 (p.0: bf16[4,8], p.1: s32[]) -> bf16[8] {
  %p.0 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  ROOT %ds = bf16[8]{0:T(1024)} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,8}
}

%cond.2 (arg: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %arg = (s32[]{:T(128)}, /*index=1*/bf16[4,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body.3 (arg.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%arg.1), index=1
  %f = bf16[8]{0:T(1024)} fusion(%x, %i.1), kind=kLoop, calls=%fused.1
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i.1, %x)
}

ENTRY %main.4 (x.1: bf16[4,8]) -> bf16[4,8] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[4,8]{1,0}) tuple(%zero, %x.1)
  %loop = (s32[], bf16[4,8]{1,0}) while(%init), condition=%cond.2, body=%body.3
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[]", (Array("f32", ()),)),
        ("bf16[16,1024]{1,0:T(8,128)(2,1)S(1)}", (Array("bf16", (16, 1024), 1),)),
        (
            "(s32[], /*index=1*/u8[3]{0}, pred[2])",
            (Array("s32", ()), Array("u8", (3,)), Array("pred", (2,))),
        ),
        ("f8e4m3fn[2,2]{1,0}", (Array("f8e4m3fn", (2, 2)),)),
    ],
)
def test_shapes_are_read(shape, expected):
    assert arrays(shape) == expected


def test_bytes_of_narrow_dtypes():
    assert Array("bf16", (3,)).nbytes == 6
    assert Array("s4", (3,)).nbytes == 2
    assert Array("f8e4m3fn", (3,)).nbytes == 3
    assert Array("token", ()).nbytes == 0


def test_a_loop_is_counted_by_its_condition_and_so_is_what_it_calls():
    program = parse(TPU)
    assert program.entry == "main.4"
    assert program.runs["body.3"] == 7
    assert program.runs["fused.1"] == 7
    assert program.runs["main.4"] == 1


def test_a_loop_that_counts_by_two_runs_half_as_often():
    by_two = TPU.replace(
        "  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i.1, %x)",
        "  %two = s32[] constant(2)\n  %next = s32[] add(%i.1, %two)\n  ROOT %t = (s32[],"
        " bf16[4,8]{1,0}) tuple(%next, %x)",
    )
    assert parse(by_two).runs["body.3"] == 4


def test_an_instruction_has_its_parts():
    one = parse(TPU).computations["body.3"]["f"]
    assert (one.opcode, one.operands, one.nbytes) == ("fusion", ("x", "i.1"), 16)
    assert one.called == {"calls": ("fused.1",)}


def test_nested_scans_multiply():
    def step(x):
        inner = lambda y, _: (jnp.sin(y @ y), None)  # noqa: E731
        outer = lambda y, _: (jax.lax.scan(inner, y, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, length=5)[0]

    program = parse(jax.jit(step).lower(jnp.ones((4, 4))).compile().as_text())
    assert max(program.runs.values()) >= 15
    dots = [
        n
        for name, n in program.runs.items()
        for one in program.computations[name].values()
        if one.opcode == "dot"
    ]
    assert dots == [15]


def test_what_a_kernel_says_of_itself_over_several_lines_ends_no_computation():
    text = """HloModule m

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  %k = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"about": "a line"
}}, metadata={op_name="k"}
  ROOT %n = bf16[8]{0} negate(%k)
}
"""
    assert list(parse(text).computations["main"]) == ["x", "k", "n"]
