"""LoRA: which layers, which shapes, that it starts as nothing, and that it alone can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models.draws import drawn
from tiue_jax.models.lora import init_lora, merge_lora
from tiue_jax.models.unet import UNet
from tiue_jax.models.variants import VARIANTS

RANK = 4
UNET = UNet(
    block_out_channels=(8,),
    layers_per_block=1,
    cross_attention=(True,),
    num_heads=(2,),
    context_dim=6,
    norm_groups=4,
)
INPUTS = (jnp.ones((1, 4, 4, 4)), jnp.asarray([7], jnp.int32), jnp.ones((1, 3, 6)))
# Down 1, mid 1, up 2 transformers, each with a self- and a cross-attention.
ATTENTIONS = 8


@pytest.fixture(scope="module")
def params():
    return drawn(UNET, *INPUTS)


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_layers_and_shapes(params):
    lora = flatten_dict(init_lora(jax.random.key(0), params, RANK))
    assert len(lora) == 2 * 2 * ATTENTIONS  # to_q and to_v, a and b
    assert {path[-2] for path in lora} == {"to_q", "to_v"}
    for path, value in lora.items():
        kernel = flatten_dict(params)[(*path[:-1], "kernel")]
        shape = (kernel.shape[0], RANK) if path[-1] == "a" else (RANK, kernel.shape[1])
        assert value.shape == shape and value.dtype == jnp.float32
    text = ("mid_block", "attentions_0", "transformer_blocks_0", "attn2", "to_v", "a")
    assert lora[text].shape == (6, RANK)  # the width of the text, not of the UNet


def test_every_matrix_is_drawn_apart_with_the_stated_spread(params):
    lora = flatten_dict(init_lora(jax.random.key(0), params, 64, ("to_q", "to_k", "to_v")))
    drawn = [np.asarray(x) for path, x in lora.items() if path[-1] == "a"]
    assert len({x.tobytes() for x in drawn}) == len(drawn) == 3 * ATTENTIONS
    entries = np.concatenate([x.ravel() for x in drawn])
    # 11264 draws: the standard deviation of their spread is 0.7 %.
    assert entries.size == 11264 and abs(entries.std() * 64 - 1) < 0.03
    assert abs(entries.mean() * 64) < 0.04
    assert not any(np.any(x) for path, x in lora.items() if path[-1] == "b")


def test_it_starts_as_the_frozen_network(params):
    """b = 0: merging changes no parameter, at any scale, and leaves its argument alone."""
    before = jax.tree.map(np.array, params)
    merged = merge_lora(params, init_lora(jax.random.key(0), params, RANK), 108 / 64)
    _assert_same(merged, before)
    _assert_same(params, before)


def test_only_named_kernels_change(params):
    lora = jax.tree.map(jnp.ones_like, init_lora(jax.random.key(0), params, RANK, ("to_k",)))
    merged, flat = flatten_dict(merge_lora(params, lora, 0.5)), flatten_dict(params)
    for path, value in merged.items():
        change = 0.5 * RANK if path[-2:] == ("to_k", "kernel") else 0.0
        # 2 + kernel, rounded to fp32 once: off by 1.2e-7.
        np.testing.assert_allclose(np.asarray(value), np.asarray(flat[path]) + change, atol=5e-7)


def test_only_lora_learns(params):
    """The gradient has the tree of the LoRA; at b = 0 it reaches every b, and no a yet."""
    lora = init_lora(jax.random.key(0), params, RANK)
    frozen = jax.tree.map(np.array, params)

    @jax.jit
    def gradient(lora):
        def loss(lora):
            out = UNET.apply({"params": merge_lora(params, lora, 1.5)}, *INPUTS)
            return jnp.mean(jnp.square(out))

        return jax.grad(loss)(lora)

    first = gradient(lora)
    assert jax.tree.structure(first) == jax.tree.structure(lora)
    for path, value in flatten_dict(first).items():
        assert np.all(np.isfinite(value))
        assert bool(np.any(value)) == (path[-1] == "b"), path
    learnt = jax.tree.map(lambda x, g: x - 0.1 * g, lora, first)
    assert all(np.any(x) for x in jax.tree.leaves(gradient(learnt)))  # now a learns too
    _assert_same(params, frozen)


def test_merging_gives_the_frozen_kernels_no_other_gradient_than_their_own(params):
    """d/d kernel of a merged network is what it is without LoRA: merging adds, and no more."""
    lora = init_lora(jax.random.key(0), params, RANK)

    def loss(params, lora):
        merged = merge_lora(params, lora, 1.5)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(merged))

    merged = jax.jit(jax.grad(loss))(params, lora)
    plain = jax.jit(jax.grad(lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p))))(
        params
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, plain)


def test_size_at_full_scale():
    """Rank 64 on to_q and to_v of SD 1.5: 32 attentions, 8 MB to 3.4 GB of the UNet."""
    unet = VARIANTS["sd15"].unet
    inputs = (
        jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, 77, 768), jnp.float32),
    )
    params = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]
    lora = jax.eval_shape(lambda key: init_lora(key, params, 64), jax.random.key(0))
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
    expected = 0
    for width in widths:  # to_q twice, to_v of self-attention, to_v of the text
        expected += 64 * (3 * (width + width) + 768 + width)
    assert sum(x.size for x in jax.tree.leaves(lora)) == expected
    assert len(jax.tree.leaves(lora)) == 2 * 2 * 2 * len(widths)


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (0, ("to_q",), "LoRA rank 0: expected at least 1"),
        (4, ("to_q", "to_z"), r"LoRA targets \['to_z'\]: no such layer"),
        (4, ("to_q", "conv1"), r"LoRA targets \['conv1'\]: convolutions; choose dense layers"),
    ],
)
def test_what_cannot_be_adapted_is_refused(params, rank: int, targets: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        init_lora(jax.random.key(0), params, rank, targets)


def test_lora_of_another_network_is_refused(params):
    lora = init_lora(jax.random.key(0), params, RANK)
    others = {name: x for name, x in params.items() if name != "mid_block"}
    with pytest.raises(ValueError, match=r"LoRA for mid_block/attentions_0/.*: no such layer"):
        merge_lora(others, lora, 1.0)
