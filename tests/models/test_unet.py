"""The halves of the UNet: features, many timesteps at once, rematerialisation, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.layers import Attention, Conv, GroupNorm
from tiue_jax.models.unet import Features, UNet

# Channels 8 and 12 on 4 groups: in up_blocks_1 x has 12, the skip 8: groups of 5, one straddles.
UNET = UNet(
    block_out_channels=(8, 12),
    layers_per_block=1,
    cross_attention=(True, False),
    num_heads=(2, 2),
    context_dim=6,
    norm_groups=4,
)
TIMESTEPS = jnp.asarray([751, 501, 251, 1], jnp.int32)
KEYS = jax.random.split(jax.random.key(0), 4)
LATENTS = jax.random.normal(KEYS[0], (2, 8, 8, 4))
CONTEXT = jax.random.normal(KEYS[1], (2, 3, 6))
T_ENC = jnp.asarray([751, 751], jnp.int32)


@pytest.fixture(scope="module")
def params():
    """Random everywhere: biases and norm scales too."""
    drawn = jax.jit(UNET.init)(KEYS[2], LATENTS, T_ENC, CONTEXT)["params"]
    leaves, tree = jax.tree.flatten(drawn)
    keys = jax.random.split(KEYS[3], len(leaves))
    return tree.unflatten(
        x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)
    )


def _encode(params) -> Features:
    return UNET.apply({"params": params}, LATENTS, T_ENC, CONTEXT, method=UNet.encode)


def _decode(params, features: Features, t, context=CONTEXT) -> jax.Array:
    return UNET.apply({"params": params}, features, t, context, method=UNet.decode)


def _decode_all(params, features: Features) -> jax.Array:
    """[b K h w c]: vmap over timesteps inside of vmap over examples, as the student runs it."""

    def example(features, context):
        def timestep(t):
            one = jax.tree.map(lambda x: x[None], (features, t, context))
            return _decode(params, *one)[0]

        return jax.vmap(timestep)(TIMESTEPS)

    return jax.vmap(example)(features, CONTEXT)


@pytest.fixture(scope="module")
def features(params) -> Features:
    return jax.jit(_encode)(params)


def test_features(features: Features):
    """conv_in, resnet and downsampler of level 0, resnet of level 1; then the mid block."""
    shapes = [x.shape for x in features.skips]
    assert shapes == [(2, 8, 8, 8), (2, 8, 8, 8), (2, 4, 4, 8), (2, 4, 4, 12)]
    assert features.mid.shape == (2, 4, 4, 12)


def test_decoding_many_timesteps_is_decoding_each(params, features: Features):
    """What is shared between timesteps is shared exactly: fp32 order of sums only, worst 4e-7."""
    together = jax.jit(_decode_all)(params, features)
    one = jax.jit(_decode)
    each = [one(params, features, jnp.full((2,), t, jnp.int32)) for t in TIMESTEPS]
    each = np.stack([np.asarray(x) for x in each], axis=1)
    error = np.max(np.abs(np.asarray(together) - each)) / np.max(np.abs(each))
    print(f"vmap and loop over timesteps differ by {error:.1e} of the largest value")
    assert error <= 2e-6
    spread = np.ptp(each, axis=1).max() / np.max(np.abs(each))
    assert spread > 0.01  # the timestep matters


def test_what_does_not_depend_on_the_timestep_is_computed_once(params, features: Features):
    """The compiled program of four timesteps has clearly fewer flops than four of one."""

    def flops(function, *args) -> float:
        return jax.jit(function).lower(params, features, *args).compile().cost_analysis()["flops"]

    saved = 1 - flops(_decode_all) / (len(TIMESTEPS) * flops(_decode, T_ENC))
    print(f"sharing saves {saved:.1%} of four decoders")
    assert saved > 0.1


def test_a_straddling_group_depends_on_both_inputs():
    """GroupNorm and Conv over (x, skip) are those over their concatenation, in every position."""
    for x_channels, skip_channels, groups in [
        (12, 8, 4),
        (8, 12, 4),
        (8, 8, 4),
        (8, 4, 2),
        (4, 8, 1),
    ]:
        x = jax.random.normal(KEYS[0], (2, 3, 5, x_channels)) + 2.0
        skip = 3.0 * jax.random.normal(KEYS[1], (2, 3, 5, skip_channels))
        whole = jnp.concatenate([x, skip], axis=-1)
        channels = whole.shape[-1]
        variables = {
            "params": {
                "scale": jax.random.normal(KEYS[2], (channels,)),
                "bias": jax.random.normal(KEYS[3], (channels,)),
            }
        }
        norm = GroupNorm(groups)
        apart = norm.apply(variables, x, skip)
        expected = norm.apply(variables, whole)
        joined = jnp.concatenate(apart, axis=-1)
        # fp32; worst seen 0.0
        np.testing.assert_allclose(joined, expected, atol=2e-6)
        conv = Conv(7)
        kernel = conv.init(KEYS[2], whole)
        # Sums of 180 terms in another order; worst seen 7e-7.
        np.testing.assert_allclose(
            conv.apply(kernel, *apart), conv.apply(kernel, joined), atol=5e-6
        )


def test_groups_wholly_in_the_skip_do_not_see_the_input():
    x, skip = jnp.ones((1, 2, 2, 8)), jax.random.normal(KEYS[1], (1, 2, 2, 12))
    norm = GroupNorm(4)
    variables = norm.init(KEYS[0], x, skip)
    first, rest = norm.apply(variables, x, skip)
    assert (first.shape[-1], rest.shape[-1]) == (10, 10)
    jacobian = jax.jacobian(lambda x: norm.apply(variables, x, skip)[1])(x)
    assert not np.any(jacobian)


def test_rematerialisation_changes_nothing(params):
    """Same names, same value, same gradient (worst 0 and 4e-7: XLA fuses otherwise)."""

    def loss(unet: UNet):
        def value(params):
            out = unet.apply({"params": params}, LATENTS, T_ENC, CONTEXT)
            return jnp.sum(jnp.square(out))

        return jax.jit(jax.value_and_grad(value))

    value, grad = loss(UNET)(params)
    remat = UNET.clone(remat=True)
    shapes = jax.eval_shape(remat.init, KEYS[0], LATENTS, T_ENC, CONTEXT)["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    value2, grad2 = loss(remat)(params)
    np.testing.assert_allclose(value2, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grad2), jax.tree.leaves(grad), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.max(jnp.abs(b)) + 1e-3))


def test_impossible_sizes_are_refused():
    x = jnp.ones((1, 3, 10))
    with pytest.raises(ValueError, match="10 channels, 3 heads"):
        Attention(3).init(KEYS[0], x)
    with pytest.raises(ValueError, match="10 channels do not divide into 4 groups"):
        GroupNorm(4).init(KEYS[0], x[:, None])
    with pytest.raises(ValueError, match="activation 'swish': choose from"):
        CLIPTextEncoder(activation="swish").init(KEYS[0], jnp.zeros((1, 2), jnp.int32))
