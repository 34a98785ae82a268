"""The published shapes of Stable Diffusion, and that of the embedded one, as a literal table."""

from typing import NamedTuple

from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL


class Variant(NamedTuple):
    """The three networks of a Stable Diffusion, the size of its latents, what its UNet predicts."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextEncoder
    latent_size: int
    prediction_type: str = "epsilon"


_SD2_TEXT = CLIPTextEncoder(
    hidden_size=1024, intermediate_size=4096, num_layers=23, num_heads=16, activation="gelu"
)
_SD2_UNET = UNet(num_heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)

_TINY_TEXT = CLIPTextEncoder(
    vocab_size=773, hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4
)
_TINY_UNET = UNet(
    in_channels=8,
    out_channels=8,
    block_out_channels=(80, 128, 96, 96),
    layers_per_block=1,
    num_heads=(4, 4, 4, 4),
    context_dim=128,
    norm_groups=16,
)
_TINY_VAE = AutoencoderKL(
    latent_channels=8, block_out_channels=(16, 32, 64, 96), layers_per_block=1, norm_groups=8
)

VARIANTS: dict[str, Variant] = {
    "sd15": Variant(UNet(), AutoencoderKL(), CLIPTextEncoder(), 64),
    "sd21_base": Variant(_SD2_UNET, AutoencoderKL(), _SD2_TEXT, 64),
    "sd21": Variant(
        _SD2_UNET.clone(upcast_attention=True), AutoencoderKL(), _SD2_TEXT, 96, "v_prediction"
    ),
    "tiny": Variant(_TINY_UNET, _TINY_VAE, _TINY_TEXT, 8),
}


def variant(name: str) -> Variant:
    """The variant called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r}: choose from {sorted(VARIANTS)}")
    return VARIANTS[name]
