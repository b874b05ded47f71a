"""The collectives of programs for eight simulated devices, by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft.plan.collectives import Collective, axes_of, collectives, groups_of
from jaxpeft.plan.hlo import parse

SIZES = {"data": 2, "fsdp": 4}


def compiled(body, spec, out_spec, shape):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), tuple(SIZES))
    run = jax.jit(
        partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=out_spec, check_vma=False)(body)
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    return collectives(parse(run.lower(x).compile().as_text()), SIZES)


def test_an_all_reduce_in_a_loop_counts_each_iteration():
    def body(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jax.lax.psum(y, "fsdp") * 0.5, x)

    (found,) = compiled(body, P(), P(), (1024,))
    # 4096 bytes, 5 times; a ring of 4 sends 3/4 of them twice
    assert found == Collective("all-reduce", "fsdp", 5, 5 * 4096, 5 * 2 * 3072, 4)


def test_over_both_axes():
    (found,) = compiled(lambda x: jax.lax.psum(x, ("data", "fsdp")), P(), P(), (256,))
    assert (found.axes, found.group, found.count, found.nbytes, found.wire) == (
        "data+fsdp",
        8,
        1,
        1024,
        1792,
    )


def test_an_all_gather_counts_what_it_gives():
    found = compiled(lambda x: jax.lax.all_gather(x, "data", tiled=True), P("data"), P(), (512,))
    assert found == (Collective("all-gather", "data", 1, 2048, 1024, 2),)


def test_a_reduce_scatter_counts_what_it_is_given():
    found = compiled(lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P(), P("fsdp"), (512,))
    assert found == (Collective("reduce-scatter", "fsdp", 1, 2048, 1536, 4),)


def test_a_permute_sends_everything():
    pairs = [(i, (i + 1) % 4) for i in range(4)]
    found = compiled(lambda x: jax.lax.ppermute(x, "fsdp", pairs), P("fsdp"), P("fsdp"), (512,))
    assert [(one.kind, one.axes, one.count, one.nbytes, one.wire) for one in found] == [
        ("collective-permute", "fsdp", 1, 512, 512)
    ]
    assert found[0].group == 4  # not the two of a pair


def test_an_all_to_all():
    def body(x):
        return jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)

    (found,) = compiled(body, P(), P(), (512,))
    assert (found.kind, found.axes, found.nbytes, found.wire) == ("all-to-all", "fsdp", 2048, 1536)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] device_ids=([2,2]T(1,0)) {'b'}, x", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{1,0}}, x", ((0, 1), (1, 0))),
        ("replica_groups={}, x", ((0, 1, 2, 3),)),
    ],
)
def test_every_way_to_write_groups(text, expected):
    assert groups_of(text, 4) == expected


def test_axes_of_groups():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    assert axes_of(((0, 1), (2, 3)), sizes) == "tensor"
    assert axes_of(((0, 2, 4, 6),), sizes) == "data+fsdp"
    assert axes_of(((0,), (1,)), sizes) == "none"


TPU = """HloModule m

%all-reduce-scatter.1 (input: bf16[16,64]) -> bf16[16,16] {
  %input = bf16[16,64]{1,0} parameter(0)
  %all-reduce.7 = bf16[16,64]{1,0} all-reduce(%input), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = bf16[16,16]{1,0} dynamic-slice(%all-reduce.7), dynamic_slice_sizes={16,16}
}

%begin (a: bf16[16,16]) -> bf16[16,64] {
  %a = bf16[16,16]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,64]{1,0} all-gather(%a), channel_id=9, replica_groups=[2,4]<=[8], dimensions={1}
}

%end (b: bf16[16,16]) -> bf16[16,64] {
  %b = bf16[16,16]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,64]{1,0} all-gather(%b), channel_id=9, replica_groups=[2,4]<=[8], dimensions={1}
}

ENTRY %main (x: bf16[16,64], y: bf16[16,16]) -> bf16[16,64] {
  %x = bf16[16,64]{1,0} parameter(0)
  %y = bf16[16,16]{1,0} parameter(1)
  %r = bf16[16,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %s = bf16[16,64]{1,0} fusion(%y), kind=kCustom, calls=%begin
  %g = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%h), channel_id=11, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %h = bf16[8]{0} copy(%y)
  ROOT %e = bf16[16,64]{1,0} fusion(%y), kind=kCustom, calls=%end
}
"""


def test_what_a_tpu_spreads_over_fusions_counts_once():
    found = {(one.kind, one.axes): one for one in collectives(parse(TPU), SIZES)}
    assert found["reduce-scatter", "fsdp"].nbytes == 2048
    assert found["all-gather", "fsdp"].count == 1
    assert found["all-gather", "data"].nbytes == 32
    assert len(found) == 3


def test_what_slices_tell_each_other_goes_by_their_hosts():
    text = """HloModule m

ENTRY %main (x: f32[4,256]) -> f32[4,256] {
  %x = f32[4,256]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (f32[4,256]{1,0}, u32[], token[]) send(%x, %t), channel_id=8, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %h = (f32[4,256]{1,0}, u32[], token[]) send(%x, %t), channel_id=9, is_host_transfer=true
  ROOT %r = f32[4,256]{1,0} copy(%x)
}
"""
    assert collectives(parse(text), SIZES, "data", 2) == (
        Collective("all-reduce", "data", 1, 4096, 4096, 2),
    )
