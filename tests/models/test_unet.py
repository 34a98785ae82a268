"""The halves of the UNet: features, many timesteps at once, rematerialisation, what is refused."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals  # print_saved_residuals prints what it returns

from tests.models.draws import drawn, normal
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.layers import Attention, Conv, GroupNorm
from tiue_jax.models.unet import REMAT_POLICIES, Features, UNet
from tiue_jax.training.flops import traced_flops

# Channels 8 and 12 on 4 groups: in up_blocks_1 x has 12, the skip 8: groups of 5, one straddles.
UNET = UNet(
    block_out_channels=(8, 12),
    layers_per_block=1,
    cross_attention=(True, False),
    num_heads=(2, 2),
    context_dim=6,
    norm_groups=4,
)
KEY = jax.random.key(0)
TIMESTEPS = jnp.asarray([751, 501, 251, 1], jnp.int32)
LATENTS = normal(2, 8, 8, 4)
CONTEXT = normal(2, 3, 6, seed=1)
T_ENC = jnp.asarray([751, 751], jnp.int32)


@pytest.fixture(scope="module")
def params():
    """Random everywhere: biases and norm scales too."""
    return drawn(UNET, LATENTS, T_ENC, CONTEXT)


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


def _conv_products(jaxpr) -> int:
    """Multiplications in the convolutions of a jaxpr, those of its inner jaxprs included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            out, kernel = equation.outvars[0].aval, equation.invars[1].aval
            total += out.size * kernel.size // kernel.shape[-1]
        total += sum(
            _conv_products(p.jaxpr) for p in equation.params.values() if hasattr(p, "jaxpr")
        )
    return total


def test_what_does_not_depend_on_the_timestep_is_computed_once(params):
    """Exactly the convolutions of DESIGN's "time-invariant sharing" are left out, K - 1 times.

    (pixels, taps, channels in, channels out) of what is shared: in the first resnet everything
    behind the mid block, in the others what reads groups that lie wholly in the skip, and the
    skip's part of the shortcut.
    """
    features = jax.eval_shape(_encode, params)
    one = _conv_products(jax.make_jaxpr(_decode)(params, features, T_ENC).jaxpr)
    together = _conv_products(jax.make_jaxpr(_decode_all)(params, features).jaxpr)
    shared = [(16, 9, 24, 12), (16, 1, 24, 12)]  # up_blocks_0/resnets_0: x is the mid block's
    shared += [(16, 9, 5, 12), (16, 1, 8, 12)]  # up_blocks_0/resnets_1: groups of 5, one straddles
    shared += [(64, 9, 5, 8), (64, 1, 8, 8)]  # up_blocks_1/resnets_0: the same
    shared += [(64, 9, 8, 8), (64, 1, 8, 8)]  # up_blocks_1/resnets_1: the whole skip
    examples, steps = len(LATENTS), len(TIMESTEPS)
    saved = examples * (steps - 1) * sum(math.prod(x) for x in shared)
    assert together == steps * one - saved
    print(f"sharing saves {saved / (steps * one):.1%} of the products in the convolutions")


@pytest.mark.parametrize(("x_channels", "skip_channels", "groups"), [(12, 8, 4), (8, 4, 2)])
def test_a_straddling_group_depends_on_both_inputs(x_channels, skip_channels, groups):
    """GroupNorm and Conv over (x, skip) are those over their concatenation.

    12 and 8 channels: groups of 5, the third straddles, the fourth never sees x. 8 and 4: groups of
    6, no channel of the skip is left over.
    """
    x = normal(2, 3, 5, x_channels) + 2.0
    skip = 3.0 * normal(2, 3, 5, skip_channels, seed=1)
    whole = jnp.concatenate([x, skip], axis=-1)
    norm, conv = GroupNorm(groups), Conv(7)
    variables = {"params": drawn(norm, whole)}
    apart, other = norm.apply(variables, x, skip), norm.apply(variables, x + 1.0, skip)
    assert [y.shape[-1] for y in apart] == ([15, 5] if groups == 4 else [12])
    np.testing.assert_array_equal(apart[1:], other[1:])
    joined = jnp.concatenate(apart, axis=-1)
    # fp32 of order 1; worst seen 0.0
    np.testing.assert_allclose(joined, norm.apply(variables, whole), atol=2e-6)
    kernel = {"params": drawn(conv, whole)}
    # Sums of 180 terms in another order; worst seen 1e-6.
    np.testing.assert_allclose(conv.apply(kernel, *apart), conv.apply(kernel, joined), atol=5e-6)


REMAT = UNet(
    block_out_channels=(8,),
    layers_per_block=1,
    cross_attention=(True,),
    num_heads=(2,),
    context_dim=6,
    norm_groups=4,
)


def remat_loss(unet: UNet, params):
    return jnp.mean(jnp.square(unet.apply({"params": params}, LATENTS, T_ENC, CONTEXT)))


@pytest.mark.parametrize("policy", ["attention", "matmuls", "blocks"])
def test_rematerialisation_changes_nothing(policy: str) -> None:
    """The same names, value and gradients; but the compiler fuses otherwise (worst seen 4e-7)."""
    params = drawn(REMAT, LATENTS, T_ENC, CONTEXT)

    def gradients(unet: UNet):
        return jax.jit(jax.value_and_grad(partial(remat_loss, unet)))(params)

    plain, remat = gradients(REMAT), gradients(REMAT.clone(remat=policy))
    assert jax.tree.structure(remat) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(remat), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(b))) + 1e-6)


def test_policies_keep_less_and_less() -> None:
    """Bytes that the backward pass finds in memory, and products that it computes again."""
    params = drawn(REMAT, LATENTS, T_ENC, CONTEXT)
    kept, computed = {}, {}
    for policy in REMAT_POLICIES:
        loss = partial(remat_loss, REMAT.clone(remat=policy))
        kept[policy] = sum(
            math.prod(aval.shape) for aval, source in saved_residuals(loss, params)
            if "argument" not in source
        )  # fmt: skip
        computed[policy] = traced_flops(jax.grad(loss), params)
    print(kept, computed)
    assert kept["blocks"] < kept["matmuls"] < kept["none"]
    assert kept["blocks"] < kept["attention"] < kept["none"]
    assert computed["none"] < computed["matmuls"] < computed["blocks"]
    assert computed["none"] < computed["attention"] < computed["blocks"]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"remat 'all': choose from \['attention', 'blocks'"):
        REMAT.clone(remat="all").init(KEY, LATENTS, T_ENC, CONTEXT)


def test_impossible_sizes_are_refused():
    x = jnp.ones((1, 3, 10))
    with pytest.raises(ValueError, match="10 channels, 3 heads"):
        Attention(3).init(KEY, x)
    with pytest.raises(ValueError, match="10 channels do not divide into 4 groups"):
        GroupNorm(4).init(KEY, x[:, None])
    with pytest.raises(ValueError, match="activation 'swish': choose from"):
        CLIPTextEncoder(activation="swish").init(KEY, jnp.zeros((1, 2), jnp.int32))
