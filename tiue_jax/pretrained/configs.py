"""config.json of the networks <-> fields of our modules.

Reading refuses, naming file and key, whatever would make the network another than ours computes.
Writing spells every default out, so that no other version's defaults enter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiue_jax.io.errors import InputError
from tiue_jax.models.clip import ACTIVATIONS, CLIP, LEGACY_EOS, CLIPTextEncoder, Tower
from tiue_jax.models.taesd import AutoencoderTiny
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pretrained.jsonfile import Fields

Json = dict[str, Any]

MAX_CHANNELS = 8192

# Settings of UNet2DConditionModel that we have no other value for, and the values that we have.
# Absent means the first. Names that neither this table nor `_UNET_READ` knows may only be null or
# false: they would change the network in a way that we do not know.
_UNET_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "addition_embed_type_num_heads": (64,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False, None),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
}
_UNET_READ = frozenset(
    (
        "attention_head_dim block_out_channels cross_attention_dim down_block_types in_channels"
        " layers_per_block norm_eps norm_num_groups out_channels sample_size up_block_types"
        " time_cond_proj_dim upcast_attention use_linear_projection"
    ).split()
)

_VAE_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "down_block_types": ("DownEncoderBlock2D",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0.0),
    "up_block_types": ("UpDecoderBlock2D",),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_VAE_READ = frozenset(
    (
        "block_out_channels force_upcast in_channels latent_channels layers_per_block"
        " norm_num_groups out_channels sample_size scaling_factor"
    ).split()
)

_TAESD_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "force_upcast": (False, True),
    "latent_magnitude": (3,),
    "latent_shift": (0.5,),
    "shift_factor": (0.0, None),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
_TAESD_READ = frozenset(
    (
        "block_out_channels decoder_block_out_channels encoder_block_out_channels in_channels"
        " latent_channels num_decoder_blocks num_encoder_blocks out_channels scaling_factor"
    ).split()
)

_DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
_UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}


def unet_from_config(config: Fields, **fields: Any) -> UNet:
    """Return the UNet that `unet/config.json` describes.

    Args:
        config: UNet2DConditionModel's. Its `attention_head_dim` is the NUMBER of heads, one for all
            levels (SD 1.x) or one a level (SD 2.x): a misnomer that diffusers keeps.
        fields: further fields of the module: dtype, remat.

    Raises:
        InputError: a setting that is malformed, or that we do not implement.
    """
    _require_class(config, "UNet2DConditionModel")
    _only(config, _UNET_ONLY, _UNET_READ)
    channels = config.integers("block_out_channels", (320, 640, 1280, 1280), None, 1, MAX_CHANNELS)
    levels = len(channels)
    groups = config.integer("norm_num_groups", 32, 1, MAX_CHANNELS)
    heads = config.integers("attention_head_dim", 8, levels, 1, MAX_CHANNELS)
    for c, n in zip(channels, heads, strict=True):
        if c % groups or c % 2:
            raise config.refuse("block_out_channels", f"even multiples of norm_num_groups {groups}")
        if c % n:
            raise config.refuse("attention_head_dim", f"numbers of heads that divide {channels}")
    cross = _block_types(config, "down_block_types", _DOWN, (True,) * (levels - 1) + (False,))
    if _block_types(config, "up_block_types", _UP, cross[::-1]) != cross[::-1]:
        raise config.refuse("up_block_types", "down_block_types in reverse")
    return UNet(
        in_channels=config.integer("in_channels", 4, 1, 64),
        out_channels=config.integer("out_channels", 4, 1, 64),
        block_out_channels=channels,
        layers_per_block=_one_for_all(config, "layers_per_block", 2, levels, 16),
        cross_attention=cross,
        num_heads=heads,
        context_dim=_one_for_all(config, "cross_attention_dim", 1280, levels),
        linear_projection=config.boolean("use_linear_projection", False),
        norm_groups=groups,
        norm_eps=config.number("norm_eps", 1e-5, 1e-12, 1e-1),
        upcast_attention=config.boolean("upcast_attention", False),
        time_cond_dim=_time_cond_dim(config),
        **fields,
    )


def unet_config(unet: UNet, latent_size: int) -> Json:
    """Return the UNet2DConditionModel config of `unet`, which draws latents of `latent_size`."""
    return {
        "_class_name": "UNet2DConditionModel",
        **{key: values[0] for key, values in _UNET_ONLY.items()},
        "attention_head_dim": _shorten(unet.num_heads),
        "block_out_channels": list(unet.block_out_channels),
        "cross_attention_dim": unet.context_dim,
        "down_block_types": [_DOWN[cross] for cross in unet.cross_attention],
        "in_channels": unet.in_channels,
        "layers_per_block": unet.layers_per_block,
        "norm_eps": unet.norm_eps,
        "norm_num_groups": unet.norm_groups,
        "out_channels": unet.out_channels,
        "sample_size": latent_size,
        "time_cond_proj_dim": unet.time_cond_dim,
        "up_block_types": [_UP[cross] for cross in reversed(unet.cross_attention)],
        "upcast_attention": unet.upcast_attention,
        "use_linear_projection": unet.linear_projection,
    }


def latent_size_from_config(config: Fields) -> int:
    """Return the side of the latents that the UNet was trained on, 64 where its config is silent.

    Raises:
        InputError: the config says something else than one size for both sides.
    """
    value = config.values.get("sample_size")
    if value is None:
        return 64
    sides = set(config.integers("sample_size", 64, 2, 1, 1024))
    if len(sides) != 1:
        raise config.refuse("sample_size", "one size for both sides")
    return sides.pop()


def latent_divisor(unet: UNet) -> int:
    """Return what the side of the latents is a multiple of: `unet` halves it at all but one level.

    On the way up each level doubles it again, and must meet the size of its skip connections.
    """
    return 1 << (len(unet.block_out_channels) - 1)


def vae_from_config(config: Fields, **fields: Any) -> AutoencoderKL:
    """Return the VAE that `vae/config.json` (AutoencoderKL's) describes.

    Raises:
        InputError: a setting that is malformed, or that we do not implement.
    """
    _require_class(config, "AutoencoderKL")
    _only(config, _VAE_ONLY, _VAE_READ)
    channels = config.integers("block_out_channels", (64,), None, 1, MAX_CHANNELS)
    groups = config.integer("norm_num_groups", 32, 1, MAX_CHANNELS)
    if any(c % groups for c in channels):
        raise config.refuse("block_out_channels", f"multiples of norm_num_groups {groups}")
    for key, default in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "Up")):
        if len(config.values.get(key, [default])) != len(channels):
            raise config.refuse(key, f"{len(channels)} blocks, as block_out_channels has")
    in_channels = config.integer("in_channels", 3, 1, 64)
    if config.integer("out_channels", 3, 1, 64) != in_channels:
        raise config.refuse("out_channels", f"in_channels, {in_channels}")
    return AutoencoderKL(
        in_channels=in_channels,
        latent_channels=config.integer("latent_channels", 4, 1, 64),
        block_out_channels=channels,
        layers_per_block=config.integer("layers_per_block", 1, 1, 16),
        norm_groups=groups,
        scaling_factor=config.number("scaling_factor", 0.18215, 1e-6, 1e6),
        **fields,
    )


def vae_config(vae: AutoencoderKL) -> Json:
    """Return the AutoencoderKL config of `vae`."""
    levels = len(vae.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(vae.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.layers_per_block,
        "norm_num_groups": vae.norm_groups,
        "out_channels": vae.in_channels,
        "scaling_factor": vae.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def taesd_from_config(config: Fields, **fields: Any) -> AutoencoderTiny:
    """Return the small autoencoder that AutoencoderTiny's config.json describes.

    Raises:
        InputError: a setting that is malformed, or that we do not implement.
    """
    _require_class(config, "AutoencoderTiny")
    _only(config, _TAESD_ONLY, _TAESD_READ)
    encoder_blocks = config.integers("num_encoder_blocks", (1, 3, 3, 3), None, 1, 64)
    levels = len(encoder_blocks)
    in_channels = config.integer("in_channels", 3, 1, 64)
    if config.integer("out_channels", 3, 1, 64) != in_channels:
        raise config.refuse("out_channels", f"in_channels, {in_channels}")
    return AutoencoderTiny(
        in_channels=in_channels,
        latent_channels=config.integer("latent_channels", 4, 1, 64),
        encoder_channels=_one_for_all(config, "encoder_block_out_channels", 64, levels),
        decoder_channels=_one_for_all(config, "decoder_block_out_channels", 64, levels),
        num_encoder_blocks=encoder_blocks,
        num_decoder_blocks=config.integers("num_decoder_blocks", (3, 3, 3, 1), levels, 1, 64),
        scaling_factor=config.number("scaling_factor", 1.0, 1e-6, 1e6),
        **fields,
    )


def text_encoder_from_config(config: Fields, **fields: Any) -> CLIPTextEncoder:
    """Return the text encoder that `text_encoder/config.json` (CLIPTextModel's) describes.

    Keys that do not matter here are passed over: transformers has written many into this file.

    Raises:
        InputError: a setting that is malformed, or that we do not implement.
    """
    _require_model_type(config, "clip_text_model", "CLIPTextModel")
    return CLIPTextEncoder(
        **_tower(config, "", CLIP.text)._asdict(), **_vocabulary(config, ""), **fields
    )


def text_encoder_config(encoder: CLIPTextEncoder) -> Json:
    """Return the CLIPTextModel config of `encoder`."""
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "hidden_act": encoder.activation,
        "hidden_size": encoder.hidden_size,
        "intermediate_size": encoder.intermediate_size,
        "layer_norm_eps": encoder.eps,
        "max_position_embeddings": encoder.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": encoder.num_heads,
        "num_hidden_layers": encoder.num_layers,
        "vocab_size": encoder.vocab_size,
    }


def clip_from_config(config: Fields, **fields: Any) -> CLIP:
    """Return both towers of the CLIP that transformers' config.json (CLIPModel's) describes.

    What a tower's object leaves out is that of ViT-B/32. Keys that do not matter here are passed
    over, as in `text_encoder_from_config`.

    Raises:
        InputError: a setting that is malformed, or that we do not implement.
    """
    _require_model_type(config, "clip", "CLIPModel")
    both = Fields(_flat(config, "text_config") | _flat(config, "vision_config"), config.file)
    both.only("vision_config.num_channels", (3,))
    image_size = both.integer("vision_config.image_size", 224, 1, 4096)
    vocabulary = _vocabulary(both, "text_config.")
    last_token = max(vocabulary["vocab_size"] - 1, LEGACY_EOS)
    return CLIP(
        text=_tower(both, "text_config.", CLIP.text),
        vision=_tower(both, "vision_config.", CLIP.vision),
        image_size=image_size,
        patch_size=both.integer("vision_config.patch_size", 32, 1, image_size),
        projection_dim=config.integer("projection_dim", 512, 1, MAX_CHANNELS),
        eos_token_id=both.integer("text_config.eos_token_id", 49407, 0, last_token),
        **vocabulary,
        **fields,
    )


def _flat(config: Fields, name: str) -> Json:
    """Return the settings of the object `name` as "name.key"; `name`_dict goes before, if there.

    Source: transformers' CLIPConfig, whose older files have both.
    """
    older = f"{name}_dict"
    key = name if config.values.get(older) is None else older
    found = config.values.get(key)
    if not isinstance(found, dict | None):
        raise config.refuse(key, "an object")
    return {f"{name}.{setting}": value for setting, value in (found or {}).items()}


def _tower(config: Fields, prefix: str, default: Tower) -> Tower:
    """Return a CLIP transformer's shape from the keys that start with `prefix`."""
    hidden = config.integer(f"{prefix}hidden_size", default.hidden_size, 1, MAX_CHANNELS)
    heads = config.integer(f"{prefix}num_attention_heads", default.num_heads, 1, MAX_CHANNELS)
    if hidden % heads:
        raise config.refuse(f"{prefix}num_attention_heads", f"a divisor of hidden_size {hidden}")
    mlp = config.integer(f"{prefix}intermediate_size", default.intermediate_size, 1, 1 << 16)
    return Tower(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=config.integer(f"{prefix}num_hidden_layers", default.num_layers, 1, 64),
        num_heads=heads,
        activation=config.choice(f"{prefix}hidden_act", default.activation, tuple(ACTIVATIONS)),
        eps=config.number(f"{prefix}layer_norm_eps", default.eps, 1e-12, 1e-1),
    )


def _vocabulary(config: Fields, prefix: str) -> dict[str, int]:
    return {
        "vocab_size": config.integer(f"{prefix}vocab_size", 49408, 1, 1 << 20),
        "max_length": config.integer(f"{prefix}max_position_embeddings", 77, 1, 4096),
    }


def _require_model_type(config: Fields, kind: str, architecture: str) -> None:
    """Hold what transformers says about a config.json against what we read it as."""
    if config.values.get("model_type", kind) != kind:
        raise config.refuse("model_type", kind)
    if config.values.get("architectures") not in (None, [architecture]):
        raise config.refuse("architectures", architecture)


def _require_class(config: Fields, name: str) -> None:
    if config.values.get("_class_name", name) != name:
        raise config.refuse("_class_name", name, "another kind of network")


def _only(config: Fields, table: Mapping[str, Sequence[Any]], read: frozenset[str]) -> None:
    """Refuse settings outside `table`, and settings that nobody knows unless null or false."""
    for key, value in config.values.items():
        if key in table:
            config.only(key, table[key])
        elif key not in read and not key.startswith("_") and value not in (None, False):
            shown = key if len(key) <= 80 else key[:77] + "..."
            raise InputError("unknown setting", file=config.file, key=shown, found=config.show(key))


def _block_types(
    config: Fields, key: str, names: Mapping[bool, str], default: tuple[bool, ...]
) -> tuple[bool, ...]:
    """Return, per block of the list `key`, whether it attends to the text."""
    value = config.values.get(key)
    if value is None:
        return default
    flags = {name: cross for cross, name in names.items()}
    right = isinstance(value, list) and len(value) == len(default)
    if not right or not all(isinstance(v, str) and v in flags for v in value):
        raise config.refuse(key, f"{len(default)} of {' or '.join(sorted(flags))}")
    return tuple(flags[name] for name in value)


def _one_for_all(
    config: Fields, key: str, default: int, levels: int, high: int = MAX_CHANNELS
) -> int:
    """Return an integer that may be given as a list of one a level, all equal."""
    values = set(config.integers(key, default, levels, 1, high))
    if len(values) != 1:
        raise config.refuse(key, "the same for all levels")
    return values.pop()


def _time_cond_dim(config: Fields) -> int | None:
    """Return the width of the guidance embedding; null counts as absent."""
    key = "time_cond_proj_dim"
    if config.values.get(key) is None:
        return None
    dim = config.integer(key, 256, 4, MAX_CHANNELS)
    if dim % 2:
        raise config.refuse(key, "null or an even integer")
    return dim


def _shorten(heads: tuple[int, ...]) -> int | list[int]:
    return heads[0] if len(set(heads)) == 1 else list(heads)
