"""The UNet of Stable Diffusion, in two halves: `encode` and `decode`.

A teacher is the call (both halves at one timestep). A TiUE student is `encode` once and `decode`
at K timesteps: the same module, the same parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from tiue_jax.models.layers import (
    Conv,
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimestepEmbedding,
    Transformer2D,
    Upsample,
    guidance_embedding,
    timestep_embedding,
)


def _is_matmul(primitive: Any, *shapes: Any, **parameters: Any) -> bool:
    """Whether this is a convolution or a projection: a product with weights, not q k or w v."""
    is_projection = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == "conv_general_dilated" or bool(
        is_projection(primitive, *shapes, **parameters)
    )


# name -> (for ResnetBlock, for Transformer2D): what the backward pass finds in memory of a block
# that is computed again; None: the block is not computed again.
_KEEP_NOTHING = jax.checkpoint_policies.nothing_saveable
REMAT_POLICIES: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]] = {
    "none": (None, None),
    "attention": (None, _KEEP_NOTHING),
    "matmuls": (_is_matmul, _is_matmul),
    "blocks": (_KEEP_NOTHING, _KEEP_NOTHING),
}


class Features(NamedTuple):
    """What the encoder hands to the decoder.

    Attributes:
        mid: output of the mid block, [b h/8 w/8 c].
        skips: outputs of conv_in and of every block and downsampler of the way down, in that order.
    """

    mid: Array
    skips: tuple[Array, ...]


class BlockOptions(NamedTuple):
    """What all blocks of one UNet have in common."""

    linear_projection: bool
    norm_groups: int
    norm_eps: float
    upcast_attention: bool
    remat: str
    dtype: DTypeLike

    def resnet(self, features: int) -> ResnetBlock:
        """A ResnetBlock, computed again in the backward pass as `remat` says."""
        policy = REMAT_POLICIES[self.remat][0]
        block = nn.remat(ResnetBlock, policy=policy) if policy else ResnetBlock
        return block(features, self.norm_groups, self.norm_eps, self.dtype)

    def attention(self, num_heads: int) -> Transformer2D:
        """A Transformer2D, computed again in the backward pass as `remat` says."""
        policy = REMAT_POLICIES[self.remat][1]
        block = nn.remat(Transformer2D, policy=policy) if policy else Transformer2D
        return block(
            num_heads, self.linear_projection, self.norm_groups, self.upcast_attention, self.dtype
        )


class DownBlock(nn.Module):
    """`num_layers` x (ResnetBlock, Transformer2D if `num_heads`), then a Downsample unless last."""

    features: int
    num_layers: int
    num_heads: int | None
    downsample: bool
    options: BlockOptions

    def setup(self) -> None:
        o, layers = self.options, range(self.num_layers)
        self.resnets = [o.resnet(self.features) for _ in layers]
        self.attentions = [o.attention(self.num_heads) for _ in layers] if self.num_heads else []
        self.downsamplers = [Downsample(self.features, dtype=o.dtype)] if self.downsample else []

    def __call__(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b e"], context: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b h2 w2 c2"], list[Float[Array, "b _ _ c2"]]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """ResnetBlock, Transformer2D, ResnetBlock."""

    features: int
    num_heads: int
    options: BlockOptions

    def setup(self) -> None:
        self.resnets = [self.options.resnet(self.features) for _ in range(2)]
        self.attentions = [self.options.attention(self.num_heads)]

    def __call__(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b e"], context: Float[Array, "b n d"]
    ) -> Float[Array, "b h w c"]:
        x = self.resnets[0](x, temb)
        return self.resnets[1](self.attentions[0](x, context), temb)


class UpBlock(nn.Module):
    """`num_layers` x (ResnetBlock over x and a skip, Transformer2D if `num_heads`), Upsample."""

    features: int
    num_layers: int
    num_heads: int | None
    upsample: bool
    options: BlockOptions

    def setup(self) -> None:
        o, layers = self.options, range(self.num_layers)
        self.resnets = [o.resnet(self.features) for _ in layers]
        self.attentions = [o.attention(self.num_heads) for _ in layers] if self.num_heads else []
        self.upsamplers = [Upsample(self.features, dtype=o.dtype)] if self.upsample else []

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        skips: tuple[Float[Array, "b h w _"], ...],
        temb: Float[Array, "b e"],
        context: Float[Array, "b n d"],
    ) -> Float[Array, "b h2 w2 c2"]:
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x = resnet(x, temb, skip)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class UNet(nn.Module):
    """Predicts the noise (or v) of noisy latents, given the timestep and the text.

    The defaults are those of SD 1.5; `variants.VARIANTS` has the others.

    Args:
        block_out_channels: channels per level, finest first.
        layers_per_block: ResnetBlocks per level on the way down (one more on the way up).
        cross_attention: per level, finest first, whether its blocks attend to the text.
        num_heads: attention heads per level. (`attention_head_dim` in SD's config.json is this.)
        context_dim: width of the text encoder. The parameters depend on it, the code does not.
        linear_projection: dense instead of 1x1-conv projections in Transformer2D (SD 2.x).
        upcast_attention: queries and keys in fp32 (SD 2.1).
        time_cond_dim: width of the embedding of the guidance scale, which the UNet then takes as an
            input (LCM: 256); even, at least 4. None: an ordinary UNet.
        remat: what the backward pass computes again, for less memory; a name of REMAT_POLICIES.
            "none": nothing. "attention": every Transformer2D. "matmuls": all but the results of
            convolutions and projections. "blocks": every ResnetBlock and Transformer2D whole.
        dtype: compute dtype; the output is in it too.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    linear_projection: bool = False
    norm_groups: int = 32
    norm_eps: float = 1e-5
    upcast_attention: bool = False
    time_cond_dim: int | None = None
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        channels, last = self.block_out_channels, len(self.block_out_channels) - 1
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat {self.remat!r}: choose from {sorted(REMAT_POLICIES)}")
        options = BlockOptions(
            self.linear_projection,
            self.norm_groups,
            self.norm_eps,
            self.upcast_attention,
            self.remat,
            self.dtype,
        )
        heads = [
            n if c else None for n, c in zip(self.num_heads, self.cross_attention, strict=True)
        ]
        self.time_embedding = TimestepEmbedding(4 * channels[0], self.dtype)
        self.conv_in = Conv(channels[0], dtype=self.dtype)
        self.down_blocks = [
            DownBlock(channels[i], self.layers_per_block, heads[i], i < last, options)
            for i in range(last + 1)
        ]
        self.mid_block = MidBlock(channels[last], self.num_heads[last], options)
        self.up_blocks = [
            UpBlock(channels[i], self.layers_per_block + 1, heads[i], i > 0, options)
            for i in reversed(range(last + 1))
        ]
        self.conv_norm_out = GroupNorm(self.norm_groups, self.norm_eps, self.dtype)
        self.conv_out = Conv(self.out_channels, dtype=self.dtype)

    def _time(
        self, t: Num[Array, " b"], guidance: Float[Array, " b"] | None
    ) -> Float[Array, "b e"]:
        sinusoids = timestep_embedding(t, self.block_out_channels[0])
        if self.time_cond_dim is None:
            if guidance is not None:
                raise ValueError("guidance: this UNet has no input for it (time_cond_dim is None)")
            return self.time_embedding(sinusoids)
        if guidance is None:
            raise ValueError(
                f"guidance: None, but this UNet (time_cond_dim {self.time_cond_dim}) takes the "
                "guidance scale as an input"
            )
        return self.time_embedding(sinusoids, guidance_embedding(guidance, self.time_cond_dim))

    def encode(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        context: Float[Array, "b n d"],
        guidance: Float[Array, " b"] | None = None,
    ) -> Features:
        """conv_in, the down blocks and the mid block at timestep `t`.

        Args:
            x: latents (scaled), h and w divisible by 2^(levels - 1).
            t: timesteps, 0..999.
            context: last hidden state of the text encoder.
            guidance: w of u + w (c - u), if and only if `time_cond_dim` is set.

        Raises:
            ValueError: guidance that is missing, or that this UNet has no input for.
        """
        temb, x = self._time(t, guidance), self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, temb, context)
            skips += more
        return Features(self.mid_block(x, temb, context), tuple(skips))

    def decode(
        self,
        features: Features,
        t: Num[Array, " b"],
        context: Float[Array, "b n d"],
        guidance: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """The up blocks and the output head at timestep `t`, which need not be the encoder's."""
        temb, x, skips = self._time(t, guidance), features.mid, features.skips
        for block in self.up_blocks:
            x = block(x, skips[-block.num_layers :], temb, context)
            skips = skips[: -block.num_layers]
        return self.conv_out(nn.silu(self.conv_norm_out(x)))

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        context: Float[Array, "b n d"],
        guidance: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """`encode` and `decode` at the same timestep: an ordinary Stable Diffusion UNet."""
        return self.decode(self.encode(x, t, context, guidance), t, context, guidance)
