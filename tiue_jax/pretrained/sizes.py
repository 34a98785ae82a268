"""How many tensors and parameters a network has, by arithmetic alone.

A config is a few bytes and may ask for any size: what it asks for is held against the weights
before the network is traced, which takes time with its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn

from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL


@dataclass(frozen=True)
class Size:
    """Number of tensors, and of the parameters in them."""

    tensors: int
    parameters: int

    def __add__(self, other: Size) -> Size:
        return Size(self.tensors + other.tensors, self.parameters + other.parameters)

    def __mul__(self, times: int) -> Size:
        return Size(self.tensors * times, self.parameters * times)


NOTHING = Size(0, 0)


def network_size(module: nn.Module) -> Size | None:
    """Return the size of one of Stable Diffusion's networks; None for another."""
    if isinstance(module, UNet):
        return _unet(module)
    if isinstance(module, AutoencoderKL):
        return _vae(module)
    return _text_encoder(module) if isinstance(module, CLIPTextEncoder) else None


def _dense(inputs: int, outputs: int, window: int = 1) -> Size:
    return Size(2, (inputs * window**2 + 1) * outputs)


def _conv(inputs: int, outputs: int) -> Size:
    return _dense(inputs, outputs, 3)


def _norm(channels: int) -> Size:
    return Size(2, 2 * channels)


def _resnet(inputs: int, outputs: int, temb: int | None, shortcut: bool) -> Size:
    size = _norm(inputs) + _conv(inputs, outputs) + _norm(outputs) + _conv(outputs, outputs)
    if temb is not None:
        size += _dense(temb, outputs)
    return size + _dense(inputs, outputs) if shortcut else size


def _transformer(c: int, context: int) -> Size:
    projections = Size(6, 4 * c * c + 2 * c * context)  # to_q, to_k and to_v of both attentions
    inside = _norm(c) * 3 + projections + _dense(c, c) * 2 + _dense(c, 8 * c) + _dense(4 * c, c)
    return _norm(c) + _dense(c, c) + inside + _dense(c, c)


def _unet(unet: UNet) -> Size:
    channels, layers = unet.block_out_channels, unet.layers_per_block
    temb, last = 4 * channels[0], len(channels) - 1
    size = _conv(unet.in_channels, channels[0]) + _dense(channels[0], temb) + _dense(temb, temb)
    if unet.time_cond_dim is not None:
        size += Size(1, unet.time_cond_dim * channels[0])
    before, skips = channels[0], [channels[0]]
    for i, c in enumerate(channels):
        for _ in range(layers):
            size += _resnet(before, c, temb, before != c)
            before = c
        skips += [c] * (layers + (i < last))
        size += _conv(c, c) if i < last else NOTHING
    size += _resnet(before, before, temb, False) * 2 + _transformer(before, unet.context_dim)
    for i in reversed(range(last + 1)):
        for _ in range(layers + 1):
            size += _resnet(before + skips.pop(), channels[i], temb, True)
            before = channels[i]
        size += _conv(before, before) if i else NOTHING
    for c, cross in zip(channels, unet.cross_attention, strict=True):
        size += _transformer(c, unet.context_dim) * (2 * layers + 1) if cross else NOTHING
    return size + _norm(before) + _conv(before, unet.out_channels)


def _levels(channels: tuple[int, ...], layers: int) -> Size:
    """ResnetBlocks of all levels in order, and the convolution behind every level but the last."""
    size, before = NOTHING, channels[0]
    for c in channels:
        size += _resnet(before, c, None, before != c) + _resnet(c, c, None, False) * (layers - 1)
        before = c
    for c in channels[:-1]:
        size += _conv(c, c)
    return size


def _vae(vae: AutoencoderKL) -> Size:
    channels, layers, latents = vae.block_out_channels, vae.layers_per_block, vae.latent_channels
    top = channels[-1]
    mid = _resnet(top, top, None, False) * 2 + _norm(top) + _dense(top, top) * 4
    encoder = _conv(vae.in_channels, channels[0]) + _levels(channels, layers) + mid
    encoder += _norm(top) + _conv(top, 2 * latents)
    decoder = _conv(latents, top) + mid + _levels(channels[::-1], layers + 1)
    decoder += _norm(channels[0]) + _conv(channels[0], vae.in_channels)
    return encoder + decoder + _dense(2 * latents, 2 * latents) + _dense(latents, latents)


def _text_encoder(encoder: CLIPTextEncoder) -> Size:
    d, hidden = encoder.hidden_size, encoder.intermediate_size
    layer = _norm(d) * 2 + _dense(d, d) * 4 + _dense(d, hidden) + _dense(hidden, d)
    embeddings = Size(2, (encoder.vocab_size + encoder.max_length) * d)
    return embeddings + layer * encoder.num_layers + _norm(d)
