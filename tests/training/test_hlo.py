"""Reading a compiled program: collectives, loops, traffic."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tiue_jax.training.hlo import collectives, loop_share, moved_bytes, totals
from tiue_jax.training.sharding import make_mesh

HLO = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (arg: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %arg = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%arg), index=1
  %all-reduce.7 = f32[8,16]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%i, %all-reduce.7)
}

ENTRY %main (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %kernel.1 = f32[] custom-call(), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="splash"}
  %all-gather.3 = f32[3,3,320,640]{3,2,1,0} all-gather(%p), replica_groups={{0,1},{2,3}}
  %ag-start = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%p), replica_groups=[1,8]<=[8]
  %ag-done = bf16[64,16]{1,0} all-gather-done(%ag-start)
  %both = (f32[10]{0}, f32[]) all-reduce(%a, %b), replica_groups=mesh['axis_0'=4,'axis_1'=1,\
'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, to_apply=%add
  %t = (s32[], f32[8,16]{1,0}) tuple(%i, %p)
  %loop = (s32[], f32[8,16]{1,0}) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %x = f32[8,16]{1,0} add(%all-reduce.9, %y)
}
"""


def test_collectives_are_counted_with_their_bytes_and_turns() -> None:
    found = collectives(HLO)
    assert totals(found) == {
        "all-gather": {"count": 2, "times": 2, "bytes": 4 * 9 * 320 * 640 + 2 * 64 * 16},
        "all-reduce": {"count": 2, "times": 6, "bytes": 44 + 5 * 4 * 8 * 16},
    }
    assert [one.devices for one in found] == [4, 2, 8, 4]
    gathered = 4 * 9 * 320 * 640 / 2 + 2 * 64 * 16 * 7 / 8
    assert moved_bytes(found) == gathered + 2 * 3 / 4 * (44 + 5 * 4 * 8 * 16)


def test_a_reduce_scatter_of_a_tpu_is_one() -> None:
    text = """
%all-reduce-scatter.2 (x: bf16[320,384]) -> bf16[320,48] {
  %x = bf16[320,384]{0,1} parameter(0)
  %all-reduce.1 = bf16[320,384]{0,1} all-reduce(%x), replica_groups=[8,8]<=[64], to_apply=%add
  ROOT %slice = bf16[320,48]{0,1} dynamic-slice(%all-reduce.1, %i)
}

ENTRY %main (p: bf16[320,384]) -> bf16[320,48] {
  %p = bf16[320,384]{0,1} parameter(0)
  ROOT %f = bf16[320,48]{0,1} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2, metadata={}
}
"""
    found = collectives(text)
    assert totals(found) == {"reduce-scatter": {"count": 1, "times": 1, "bytes": 2 * 320 * 48}}
    assert moved_bytes(found) == 7 * 2 * 320 * 48


def test_traffic_of_a_loop_counts_its_turns() -> None:
    share = loop_share(HLO)
    body = 2 * 4 * 8 * 16  # reads x and writes the sum of it
    rest = (516 + 4 * 9 * 320 * 640) + (512 + 2 * 72 * 16) + (2 * 72 * 16 + 2 * 64 * 16) + 44 + 512
    assert share == (rest + 5 * body) / (rest + body)
    assert loop_share("") == 1.0


COUNTED = """
%cond (arg.1: (s32[], f32[4])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(LAST)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT, metadata={op_name="while/cond"}
}

%body (arg.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg.2 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %step = s32[]{:T(128)} constant(2), metadata={op_name="x"}
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %copy.3 = s32[]{:T(128)} copy(%i.2)
  %x = f32[4]{0:T(128)} get-tuple-element(%arg.2), index=1
  %cp = f32[4]{0:T(128)} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %add.9 = s32[]{:T(128)} add(%copy.3, %step), control-predecessors={%copy.3}
  ROOT %out = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%add.9, /*index=1*/%cp)
}

ENTRY %main (p: f32[4]) -> (s32[], f32[4]) {
  %p = f32[4]{0:T(128)} parameter(0)
  %zero = s32[]{:T(128)} constant(FIRST)
  %copy.8 = s32[]{:T(128)} copy(%zero)
  %start = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%copy.8, %p)
  ROOT %w = (s32[]{:T(128)}, f32[4]{0:T(128)}) while(%start), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(("first", "last", "turns"), [(0, 8, 4), (1, 8, 4), (0, 9, 5), (8, 8, 0)])
def test_turns_that_the_tpu_compiler_does_not_tell(first: int, last: int, turns: int) -> None:
    text = COUNTED.replace("LAST", str(last)).replace("FIRST", str(first))
    if turns:
        assert totals(collectives(text))["collective-permute"]["times"] == turns
    else:
        assert not collectives(text)
    for by, other in (
        ("direction=LT", "direction=NE"),
        (" add(", " multiply("),
        ("copy(%z", "f(%z"),
    ):
        assert totals(collectives(text.replace(by, other)))["collective-permute"]["times"] == 1


def test_a_real_program_with_a_loop() -> None:
    mesh = make_mesh(8, 1)
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))

    def run(w, x):
        def turn(w, _):
            return w - jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w)))(w), None

        return jax.lax.scan(turn, w, None, length=6)[0]

    jitted = jax.jit(run, in_shardings=(whole, split), out_shardings=whole)
    shapes = jnp.zeros((32, 16)), jnp.zeros((64, 32))
    text = jitted.lower(*shapes).compile().as_text()
    assert re.search(r" while\(", text)
    assert totals(collectives(text)) == {
        "all-reduce": {"count": 1, "times": 6, "bytes": 6 * 4 * 32 * 16}
    }
    assert loop_share(text) > 3
