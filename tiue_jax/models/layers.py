"""Layers that the UNet, the VAE and the text encoder are built of. Channels last, parameters fp32.

Submodules have diffusers' names, so that conversion is renaming and transposing.
`dtype` is the compute dtype: inputs and parameters are cast to it; normalisation statistics and the
softmax of attention are fp32 always.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from tiue_jax.models.attention import dot_product_attention

SAME = ((1, 1), (1, 1))  # padding of a 3x3 convolution that keeps the size
VALID = ((0, 0), (0, 0))  # of a 1x1 convolution


class Conv(nn.Module):
    """Square convolution over one input, or over several in place of their concatenation.

    A convolution is linear in its input channels: conv(concat(a, b)) = conv_a(a) + conv_b(b). Given
    apart, the part that does not depend on a vmapped timestep is computed once.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Sequence[tuple[int, int]] = SAME
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, *inputs: Float[Array, "b h w _"]) -> Float[Array, "b h2 w2 c2"]:
        size = (self.kernel_size, self.kernel_size)
        channels = sum(x.shape[-1] for x in inputs)
        kernel_shape = (*size, channels, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), kernel_shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        out, start = bias.astype(self.dtype).reshape(1, 1, 1, -1), 0
        for x in inputs:
            out = out + jax.lax.conv_general_dilated(
                x.astype(self.dtype),
                kernel[:, :, start : start + x.shape[-1]].astype(self.dtype),
                window_strides=(self.stride, self.stride),
                padding=self.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            start += x.shape[-1]
        return out


class GroupNorm(nn.Module):
    """Group normalisation of one input, or of two that stand for their channel-wise concatenation.

    Group moments are put together from channel moments (mean of the variances plus variance of the
    means): exact, and right where the mean is far from 0, as E[x^2] - E[x]^2 is not.

    Returns: the normalised input. For two inputs (x, skip): a tuple of the channels of all groups
        that touch `x`, and the channels of the groups that lie wholly in `skip` (left out if there
        are none). The latter do not depend on `x`: vmapped over timesteps, they are computed once.
    """

    groups: int = 32
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c1"], skip: Float[Array, "b h w c2"] | None = None
    ) -> Float[Array, "b h w c1"] | tuple[Float[Array, "b h w _"], ...]:
        channels = x.shape[-1] + (0 if skip is None else skip.shape[-1])
        if channels % self.groups:
            raise ValueError(
                f"GroupNorm: {channels} channels do not divide into {self.groups} groups"
            )
        size = channels // self.groups
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)

        def normalise(x: Array, moments: tuple[Array, Array], channels: slice) -> Array:
            y = group_normalise(x, *moments, size, self.eps)
            y = y * scale[channels].reshape(1, 1, 1, -1) + bias[channels].reshape(1, 1, 1, -1)
            return y.astype(self.dtype)

        if skip is None:
            return normalise(x, channel_moments(x), slice(channels))
        head = -(-x.shape[-1] // size) * size  # the first channel of the first group wholly in skip
        taken = head - x.shape[-1]  # channels of skip in the group that straddles the boundary
        (mean, var), (skip_mean, skip_var) = channel_moments(x), channel_moments(skip)
        touching = jnp.concatenate([x.astype(skip.dtype), skip[..., :taken]], axis=-1)
        touching_moments = (
            jnp.concatenate([mean, skip_mean[:, :taken]], axis=-1),
            jnp.concatenate([var, skip_var[:, :taken]], axis=-1),
        )
        first = normalise(touching, touching_moments, slice(head))
        if head == channels:
            return (first,)
        rest_moments = (skip_mean[:, taken:], skip_var[:, taken:])
        return first, normalise(skip[..., taken:], rest_moments, slice(head, channels))


def channel_moments(
    x: Float[Array, "b h w c"],
) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Mean and biased variance of every channel over its pixels: two passes, fp32."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=(1, 2))
    return mean, jnp.square(x - mean[:, None, None, :]).mean(axis=(1, 2))


def group_normalise(
    x: Float[Array, "b h w c"],
    mean: Float[Array, "b c"],
    var: Float[Array, "b c"],
    size: int,
    eps: float,
) -> Float[Array, "b h w c"]:
    """(x - mean_g) / sqrt(var_g + eps), groups g of `size` channels, from channel moments; fp32."""
    batch, channels = mean.shape
    mean, var = mean.reshape(batch, -1, size), var.reshape(batch, -1, size)
    group_mean = mean.mean(axis=-1, keepdims=True)
    group_var = (var + jnp.square(mean - group_mean)).mean(axis=-1, keepdims=True)
    shift = jnp.broadcast_to(group_mean, mean.shape).reshape(batch, 1, 1, channels)
    factor = jnp.broadcast_to(jax.lax.rsqrt(group_var + eps), mean.shape)
    return (x.astype(jnp.float32) - shift) * factor.reshape(batch, 1, 1, channels)


def layer_norm(dtype: DTypeLike, eps: float = 1e-5) -> nn.LayerNorm:
    """LayerNorm as torch computes it: its epsilon, and the two-pass variance."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False)


def timestep_embedding(t: Num[Array, " b"], dim: int) -> Float[Array, "b d"]:
    """cos(t w_i), then sin(t w_i), with w_i = 10000^(-i / (dim/2)); fp32.

    Source: diffusers `get_timestep_embedding` with `flip_sin_to_cos`, `downscale_freq_shift=0`,
    as every Stable Diffusion has it.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def guidance_embedding(w: Float[Array, " b"], dim: int) -> Float[Array, "b d"]:
    """sin(1000 (w - 1) w_i), then cos, with w_i = 10000^(-i / (dim/2 - 1)); fp32.

    Args:
        w: guidance scale of u + w (c - u); 1 is no guidance.
        dim: even, at least 4.
    Source: diffusers 0.42 LatentConsistencyModelPipeline.get_guidance_scale_embedding, whose
        rounding of the exponents to fp32 is kept: at w = 8 the last bit of a frequency turns its
        angle by 4e-4.
    """
    half = dim // 2
    exponents = np.arange(half, dtype=np.float32) * (-np.log(np.float32(10000.0)) / (half - 1))
    frequencies = jnp.asarray(np.exp(exponents.astype(np.float64)), jnp.float32)
    angles = (1000.0 * (w.astype(jnp.float32) - 1.0))[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
    """linear, SiLU, linear: sinusoids to the embedding that every ResnetBlock adds.

    Args of the call: `condition` (LCM's guidance embedding) is projected and added to the
    sinusoids; the projection has parameters only where there is one.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b d"], condition: Float[Array, "b g"] | None = None
    ) -> Float[Array, "b e"]:
        if condition is not None:
            cond_proj = nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")
            x = x + cond_proj(condition)
        x = nn.silu(nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x))
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(x)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, + time embedding, GroupNorm, SiLU, conv, + shortcut.

    Args of the call: `temb` is None in the VAE; `skip`, in a UNet's up blocks, is the encoder
    feature that is concatenated behind `x`.
    """

    features: int
    groups: int = 32
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        temb: Float[Array, "b e"] | None = None,
        skip: Float[Array, "b h w s"] | None = None,
    ) -> Float[Array, "b h w f"]:
        inputs = (x,) if skip is None else (x, skip)
        normed = GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(*inputs)
        normed = normed if isinstance(normed, tuple) else (normed,)
        h = Conv(self.features, dtype=self.dtype, name="conv1")(*(nn.silu(n) for n in normed))
        if temb is not None:
            shift = nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))
            h = h + shift[:, None, None, :]
        h = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm2")(h))
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if skip is not None or x.shape[-1] != self.features:
            shortcut = Conv(self.features, 1, 1, VALID, self.dtype, name="conv_shortcut")
            return shortcut(*inputs) + h
        return x + h


class Attention(nn.Module):
    """Multi-head attention: queries from `x`, keys and values from `context` (None: from `x`).

    Args:
        qkv_bias: biases on to_q, to_k, to_v: the VAE's; the UNet's has none.
        groups: groups of a GroupNorm over `x` first (the VAE's); None: no norm.
        upcast: queries and keys in fp32 before their product (SD 2.1); the softmax is fp32 always.
    """

    num_heads: int
    qkv_bias: bool = False
    groups: int | None = None
    upcast: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b m d"] | None = None
    ) -> Float[Array, "b n c"]:
        if self.groups is not None:
            x = GroupNorm(self.groups, 1e-6, self.dtype, name="group_norm")(x[:, None])[:, 0]
        context = x if context is None else context
        channels = x.shape[-1]
        if channels % self.num_heads:
            raise ValueError(
                f"Attention: {channels} channels, {self.num_heads} heads: no whole head"
            )

        def heads(name: str, inputs: Float[Array, "b k _"]) -> Float[Array, "b k heads head_dim"]:
            dense = nn.Dense(channels, use_bias=self.qkv_bias, dtype=self.dtype, name=name)
            return dense(inputs).reshape(*inputs.shape[:2], self.num_heads, -1)

        q, k, v = heads("to_q", x), heads("to_k", context), heads("to_v", context)
        if self.upcast:
            q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        out = dot_product_attention(q, k, v).reshape(x.shape)
        return nn.Dense(channels, dtype=self.dtype, name="to_out_0")(out)


class GEGLU(nn.Module):
    """value * gelu(gate), both from one dense layer; the exact gelu."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n f"]:
        value, gate = jnp.split(
            nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, -1
        )
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        h = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(h)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward: pre-norm, residual."""

    num_heads: int
    upcast: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.norm1, self.norm2, self.norm3 = (layer_norm(self.dtype) for _ in range(3))
        self.attn1 = Attention(self.num_heads, upcast=self.upcast, dtype=self.dtype)
        self.attn2 = Attention(self.num_heads, upcast=self.upcast, dtype=self.dtype)
        self.ff = FeedForward(self.dtype)

    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b m d"]
    ) -> Float[Array, "b n c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """GroupNorm, projection, one BasicTransformerBlock over the pixels, projection, residual.

    Args:
        linear_projection: dense projections (SD 2.x) instead of 1x1 convolutions (SD 1.x): the same
            arithmetic, another shape of kernel.
    """

    num_heads: int
    linear_projection: bool = False
    groups: int = 32
    upcast: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b m d"]
    ) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]

        def projection(name: str) -> nn.Module:
            if self.linear_projection:
                return nn.Dense(channels, dtype=self.dtype, name=name)
            return Conv(channels, 1, 1, VALID, self.dtype, name=name)

        h = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        h = projection("proj_in")(h).reshape(x.shape[0], -1, channels)
        block = BasicTransformerBlock(
            self.num_heads, self.upcast, self.dtype, name="transformer_blocks_0"
        )
        h = block(h, context).reshape(x.shape)
        return x + projection("proj_out")(h)


class Downsample(nn.Module):
    """Convolution of stride 2. `padding`: one pixel all around (UNet), or right and below (VAE)."""

    features: int
    padding: Sequence[tuple[int, int]] = SAME
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        return Conv(self.features, 3, 2, self.padding, self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a convolution."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return Conv(self.features, dtype=self.dtype, name="conv")(x)
