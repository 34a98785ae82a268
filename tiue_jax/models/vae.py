"""AutoencoderKL of Stable Diffusion: pixels in [-1, 1] <-> vae_latents at an eighth of the size."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tiue_jax.models.layers import (
    VALID,
    Attention,
    Conv,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
)

EPS = 1e-6  # of every GroupNorm in the VAE
RIGHT_AND_BELOW = ((0, 1), (0, 1))  # where the VAE pads before a convolution of stride 2


class Level(nn.Module):
    """ResnetBlocks at one resolution, then a Downsample, an Upsample or (last level) nothing."""

    features: int
    num_layers: int
    groups: int
    resample: str | None
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.resnets = [
            ResnetBlock(self.features, self.groups, EPS, self.dtype) for _ in range(self.num_layers)
        ]
        if self.resample == "down":
            self.downsamplers = [Downsample(self.features, RIGHT_AND_BELOW, self.dtype)]
        elif self.resample == "up":
            self.upsamplers = [Upsample(self.features, self.dtype)]

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample == "down":
            return self.downsamplers[0](x)
        return self.upsamplers[0](x) if self.resample == "up" else x


class VAEMidBlock(nn.Module):
    """ResnetBlock, self-attention of one head over all pixels, ResnetBlock."""

    features: int
    groups: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.resnets = [ResnetBlock(self.features, self.groups, EPS, self.dtype) for _ in range(2)]
        self.attentions = [Attention(1, qkv_bias=True, groups=self.groups, dtype=self.dtype)]

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.resnets[0](x)
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        return self.resnets[1](x + self.attentions[0](flat).reshape(x.shape))


class Encoder(nn.Module):
    """Pixels to the moments of the vae_latents (before quant_conv)."""

    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        channels, last = self.block_out_channels, len(self.block_out_channels) - 1
        self.conv_in = Conv(channels[0], dtype=self.dtype)
        self.down_blocks = [
            Level(c, self.layers_per_block, self.groups, "down" if i < last else None, self.dtype)
            for i, c in enumerate(channels)
        ]
        self.mid_block = VAEMidBlock(channels[last], self.groups, self.dtype)
        self.conv_norm_out = GroupNorm(self.groups, EPS, self.dtype)
        self.conv_out = Conv(2 * self.latent_channels, dtype=self.dtype)

    def __call__(
        self, x: Float[Array, "b H W c"]
    ) -> Float[Array, "b h w 2*{self.latent_channels}"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """vae_latents (behind post_quant_conv) to pixels."""

    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    groups: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        channels, last = self.block_out_channels[::-1], len(self.block_out_channels) - 1
        self.conv_in = Conv(channels[0], dtype=self.dtype)
        self.mid_block = VAEMidBlock(channels[0], self.groups, self.dtype)
        self.up_blocks = [
            Level(c, self.layers_per_block + 1, self.groups, "up" if i < last else None, self.dtype)
            for i, c in enumerate(channels)
        ]
        self.conv_norm_out = GroupNorm(self.groups, EPS, self.dtype)
        self.conv_out = Conv(self.out_channels, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W {self.out_channels}"]:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The VAE. latents (what the UNet sees) = vae_latents * scaling_factor.

    Args:
        block_out_channels: channels per level, finest first; 2^(levels - 1) is the downsampling.
        layers_per_block: ResnetBlocks per level of the encoder (one more in the decoder).
        dtype: compute dtype; the output is in it too.
    """

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        shape = (self.block_out_channels, self.layers_per_block, self.norm_groups, self.dtype)
        self.encoder = Encoder(self.latent_channels, *shape)
        self.decoder = Decoder(self.in_channels, *shape)
        self.quant_conv = Conv(2 * self.latent_channels, 1, 1, VALID, self.dtype)
        self.post_quant_conv = Conv(self.latent_channels, 1, 1, VALID, self.dtype)

    def encode(
        self, pixels: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b h w l"], Float[Array, "b h w l"]]:
        """Mean and log-variance (clipped to [-30, 20]) of the vae_latents of pixels in [-1, 1]."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(pixels)), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, vae_latents: Float[Array, "b h w l"]) -> Float[Array, "b H W c"]:
        """Pixels, nominally in [-1, 1], of vae_latents (latents / scaling_factor)."""
        return self.decoder(self.post_quant_conv(vae_latents))

    def __call__(self, pixels: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Reconstruction from the mean."""
        return self.decode(self.encode(pixels)[0])
