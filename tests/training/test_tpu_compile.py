"""What can be said of compiling for TPUs without libtpu: the refusals, and reading the HLO."""

import pytest

from configs import tiny
from tiue_jax.io.errors import InputError
from tiue_jax.models.variants import variant
from tiue_jax.training.tpu_compile import collectives, compile_step

HLO = """
  %all-gather.3 = f32[3,3,320,640]{3,2,1,0} all-gather(%p.1), channel_id=1, dimensions={2}
  %ag-start = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%p.2), channel_id=2
  %ag-done = bf16[64,16]{1,0} all-gather-done(%ag-start)
  %all-reduce.7 = (f32[10]{0}, f32[]) all-reduce(%a, %b), to_apply=%add
  %x = f32[8,8]{1,0} add(%all-reduce.9, %y)
"""


def test_collectives_are_counted_with_their_bytes() -> None:
    assert collectives(HLO) == {
        "all-gather": {"count": 2, "bytes": 4 * 3 * 3 * 320 * 640 + 2 * 64 * 16},
        "all-reduce": {"count": 1, "bytes": 44},
    }


def test_a_topology_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"\[--topology\]: cannot be compiled for"):
        compile_step(tiny.get_config(), variant("tiny"), "v99:3x5")


def test_a_clip_term_is_refused() -> None:
    config = tiny.get_config()
    config.clip.tau = 0.35
    with pytest.raises(InputError, match=r"\[clip.tau\]: the CLIP term is not compiled"):
        compile_step(config, variant("tiny"), "v5e:2x4")
