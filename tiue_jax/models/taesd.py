"""AutoencoderTiny (TAESD): the VAE's latents <-> pixels in [-1, 1], by a few million multiply-adds.

Layers are numbered as in diffusers' `layers` lists, where activations and upsamplings count too, so
that conversion is renaming.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tiue_jax.models.layers import SAME


def conv(features: int, dtype: DTypeLike, *, stride: int = 1, bias: bool = True) -> nn.Conv:
    """3x3 convolution that keeps the size, or divides it by `stride`."""
    return nn.Conv(features, (3, 3), stride, SAME, use_bias=bias, dtype=dtype)


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Nearest neighbour to twice the size."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Block(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x))))))."""

    features: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        a, b, c = (conv(self.features, self.dtype) for _ in range(3))
        self.conv = [a, nn.relu, b, nn.relu, c]

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        h = x
        for layer in self.conv:
            h = layer(h)
        return nn.relu(h + x)


class Encoder(nn.Module):
    """Pixels in [-1, 1], mapped to [0, 1], to latents.

    Args:
        num_blocks: Blocks per level, finest first; 2^(levels - 1) is the downsampling.
    """

    latent_channels: int
    features: int
    num_blocks: tuple[int, ...]
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        layers: list[nn.Module] = []
        for level, count in enumerate(self.num_blocks):
            first = level == 0
            layers.append(conv(self.features, self.dtype, stride=1 if first else 2, bias=first))
            layers += [Block(self.features, self.dtype) for _ in range(count)]
        self.layers = [*layers, conv(self.latent_channels, self.dtype)]

    def __call__(self, pixels: Float[Array, "b H W c"]) -> Float[Array, "b h w l"]:
        x = (pixels + 1.0) / 2.0
        for layer in self.layers:
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Latents, bounded softly to [-3, 3], to pixels that are nominally in [-1, 1].

    Args:
        num_blocks: Blocks per level, coarsest first; 2^(levels - 1) is the upsampling.
    """

    out_channels: int
    features: int
    num_blocks: tuple[int, ...]
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        layers, last = [conv(self.features, self.dtype), nn.relu], len(self.num_blocks) - 1
        for level, count in enumerate(self.num_blocks):
            layers += [Block(self.features, self.dtype) for _ in range(count)]
            if level < last:
                layers += [upsample, conv(self.features, self.dtype, bias=False)]
        self.layers = [*layers, conv(self.out_channels, self.dtype)]

    def __call__(self, latents: Float[Array, "b h w l"]) -> Float[Array, "b H W c"]:
        x = jnp.tanh(latents / 3.0) * 3.0
        for layer in self.layers:
            x = layer(x)
        return 2.0 * x - 1.0


class AutoencoderTiny(nn.Module):
    """A small stand-in for AutoencoderKL, without its randomness. The defaults are TAESD's.

    Args:
        encoder_channels, decoder_channels: of every level.
        num_encoder_blocks: per level, finest first; 2^(levels - 1) is the downsampling.
        num_decoder_blocks: per level, coarsest first.
        scaling_factor: as in AutoencoderKL, latents = encode(pixels) * scaling_factor. It is 1 in
            every published one: TAESD was trained on the scaled latents that the UNet sees.
        dtype: compute dtype; the output is in it too.
    """

    in_channels: int = 3
    latent_channels: int = 4
    encoder_channels: int = 64
    decoder_channels: int = 64
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(
            self.latent_channels, self.encoder_channels, self.num_encoder_blocks, self.dtype
        )
        self.decoder = Decoder(
            self.in_channels, self.decoder_channels, self.num_decoder_blocks, self.dtype
        )

    def encode(self, pixels: Float[Array, "b H W c"]) -> Float[Array, "b h w l"]:
        """Latents / scaling_factor of pixels in [-1, 1]."""
        return self.encoder(pixels)

    def decode(self, latents: Float[Array, "b h w l"]) -> Float[Array, "b H W c"]:
        """Pixels, nominally in [-1, 1], of latents / scaling_factor."""
        return self.decoder(latents)

    def __call__(self, pixels: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Reconstruction. Differs: diffusers' call rounds the latents to bytes in between."""
        return self.decode(self.encode(pixels))
