"""Stable Diffusion in one file, as it was first published: all networks, no config, no tokenizer.

Which model it is is told by its keys and shapes: levels, channels, width of the text. What neither
tells is the same for all published models (32 groups, 64 channels a head, ...) or an argument.
`ldm` has the names. The file is checked whole, then streamed tensor by tensor as a folder is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tiue_jax.diffusion.schedule import PREDICTION_TYPES, make_schedule
from tiue_jax.io.errors import InputError
from tiue_jax.io.files import StrPath
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pretrained.configs import MAX_CHANNELS, latent_divisor
from tiue_jax.pretrained.folder import PARTS, RGB_CHANNELS, StableDiffusion
from tiue_jax.pretrained.jsonfile import cut
from tiue_jax.pretrained.ldm import TEXT, UNET, VAE, ldm_form, split_fused
from tiue_jax.pretrained.links import require_contained
from tiue_jax.pretrained.parameters import ParamFile, to_device
from tiue_jax.pretrained.shards import Weights
from tiue_jax.pretrained.tokenizer import Tokenizer
from tiue_jax.pretrained.weights import WeightFile, open_weights

GROUPS = 32
MAX_LEVELS = 8
HEAD_DIM = 64  # of SD 2.x's UNet, and of both text encoders

_KINDS = {  # part of a key -> the kind of file that has such a key
    "conditioner.embedders.": "SDXL",
    f"{UNET}label_emb.": "SDXL or unCLIP",
    "joint_blocks.": "SD 3",
    f"{UNET}x_embedder.": "SD 3",
    "double_blocks.": "FLUX",
    "control_model.": "ControlNet",
    "lora_unet_": "a LoRA, which is no model by itself",
    "lora_te_": "a LoRA, which is no model by itself",
}
_ALONE = {  # start of a key -> the network that such a file is, alone
    "conv_in.": "one network in the diffusers layout",
    "encoder.": "a VAE",
    "text_model.": "a text encoder",
}
_INPUTS = {5: "a model of depth", 7: "an upscaler", 8: "InstructPix2Pix", 9: "an inpainting model"}
_IGNORED = re.compile(  # what training kept beside the networks
    r"(model_ema|embedding_manager|denoiser)\..*|cond_stage_model\.(logit_scale|text_projection)"
    r"|betas|alphas_cumprod\w*|(sqrt|log|posterior)_\w+|lvlb_weights|logvar|scale_factor"
    r"|global_step"
)


def load_single_file(
    file: StrPath,
    *,
    tokenizer: StrPath,
    prediction_type: str | None = None,
    latent_size: int | None = None,
    unet: UNet | None = None,
    vae: AutoencoderKL | None = None,
    text_encoder: CLIPTextEncoder | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = jnp.float32,
    parts: Sequence[str] = PARTS,
    place: Callable[[np.ndarray], Any] = to_device,
) -> StableDiffusion:
    """Load a .safetensors file with `model.diffusion_model...`, `first_stage_model...`, ....

    SD 1.x: 8 heads everywhere. SD 2.x: 64 channels a head, linear projections, OpenCLIP without its
    last layer, and queries and keys in fp32, which SD 2.1 needs and SD 2.0 does not mind.

    Args:
        file: the original layout; a moving average in it (`model_ema`) is passed over.
        tokenizer: a folder as `tokenizer/` of a diffusers folder: the file has none. It has to be
            of the same family: SD 1.x pads with the end token, SD 2.x with another.
        prediction_type: "epsilon" or "v_prediction". Needed for SD 2.x, whose files do not say; for
            SD 1.x None is epsilon.
        latent_size: side of the latents that the UNet was trained on. None: 96 for SD 2.x that
            predicts v, which was trained on 768 pixels, otherwise 64.
        unet, vae, text_encoder: the networks, where the file is not of a published size.
        dtype, param_dtype, parts, place: as of `load_stable_diffusion`.

    Raises:
        InputError: not a Stable Diffusion 1.x or 2.x (says what it is, where it is known); keys
            missing, unexpected or misshapen; NaN or Inf in a weight; no prediction type.
        ValueError: an unknown `prediction_type`.
    """
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {prediction_type!r}: choose from {PREDICTION_TYPES}")
    require_contained(Path(tokenizer))
    opened = open_weights(Path(file))
    found = _Contents(replace(opened, entries=split_fused(opened.entries)))
    openclip = _require_model(found)
    if prediction_type is None and openclip:
        raise InputError(
            "the file of an SD 2.x does not say what it predicts",
            file=file,
            key="prediction_type",
            expected="epsilon (2-base, 2-1-base) or v_prediction (2, 2-1)",
        )
    vae = vae or _detect_vae(found)
    unet = unet or _detect_unet(found, openclip)
    text_encoder = text_encoder or _detect_text_encoder(found, openclip)
    if latent_size is None:
        latent_size = 96 if openclip and prediction_type == "v_prediction" else 64
    _require_fit(found, unet, vae, text_encoder, latent_size)
    loaded = StableDiffusion(
        unet=unet.clone(dtype=dtype),
        vae=vae.clone(dtype=dtype),
        text_encoder=text_encoder.clone(dtype=dtype),
        params={},
        tokenizer=_open_tokenizer(tokenizer, text_encoder, openclip),
        schedule=make_schedule(prediction_type=prediction_type or "epsilon"),
        latent_size=latent_size,
        folder=Path(file),
    )
    forms = ldm_form(unet, vae, text_encoder, openclip)
    files = {
        part: ParamFile.fit(found.part(part, openclip), loaded.modules[part], part, forms[part])
        for part in parts
    }
    for part, weights in files.items():  # every part has been checked before the first is read
        loaded.params[part] = weights.read(param_dtype, place)
    return loaded


def _open_tokenizer(folder: StrPath, text_encoder: CLIPTextEncoder, openclip: bool) -> Tokenizer:
    """Return the tokenizer in `folder`; it has to pad as the text encoder's training did.

    Both families have the same vocabulary. SD 1.x pads with the end token, SD 2.x with "!".
    """
    found = Tokenizer(
        folder, vocab_size=text_encoder.vocab_size, max_length=text_encoder.max_length
    )
    _, end, pad = found.special_ids
    if (pad == end) == openclip:
        kind, token = ("SD 2.x", "token 0 (!)") if openclip else ("SD 1.x", f"the end token, {end}")
        raise InputError(
            f"the model is an {kind}, whose tokenizer pads with another token",
            file=folder,
            key="--tokenizer",
            expected=token,
            found=f"token {pad}",
        )
    return found


@dataclass(frozen=True)
class _Contents:
    """What a file holds, asked for by key."""

    file: WeightFile

    def part(self, part: str, openclip: bool) -> Weights:
        """Return the weights of one network."""
        prefix = {"unet": UNET, "vae": VAE, "text_encoder": TEXT[openclip]}[part]
        entries = {k: e for k, e in self.file.entries.items() if k.startswith(prefix)}
        return Weights.single(replace(self.file, entries=entries))

    def has(self, prefix: str) -> bool:
        """Whether a key starts with `prefix`."""
        return any(key.startswith(prefix) for key in self.file.entries)

    def shape(self, key: str, rank: int | None = None) -> tuple[int, ...]:
        """Return the shape of `key`, each size in 1..MAX_CHANNELS, or a vocabulary's."""
        entry = self.file.entries.get(key)
        if entry is None:
            what = "not the file of a whole Stable Diffusion 1.x or 2.x: key is missing"
            raise InputError(what, file=self.file.path, key=key)
        high = 1 << 20 if "embedding" in key else MAX_CHANNELS
        right = rank is None or len(entry.shape) == rank
        if not right or not entry.shape or not all(1 <= size <= high for size in entry.shape):
            expected = f"{rank or 'some'} sizes in 1..{high}"
            raise self.refuse(key, "shape is not that of a Stable Diffusion", expected)
        return entry.shape

    def count(self, pattern: str) -> int:
        """Return how many of `pattern`, with {} as 0, 1, 2, ..., start a key."""
        numbers = {m[1] for m in map(_number(pattern).match, self.file.entries) if m}
        return len(list(takewhile(lambda i: str(i) in numbers, count())))

    def another_kind(self, key: str, kind: str) -> InputError:
        """Return the error to raise for a file that `key` tells to be `kind`."""
        expected = "an original file of Stable Diffusion 1.x or 2.x"
        return InputError(
            "another kind of model",
            file=self.file.path,
            key=cut(key),
            expected=expected,
            found=kind,
        )

    def refuse(self, key: str, what: str, expected: object) -> InputError:
        """Return the error to raise for the shape of `key`."""
        shape = list(self.file.entries[key].shape)
        return InputError(what, file=self.file.path, key=key, expected=expected, found=shape)


def _number(pattern: str) -> re.Pattern[str]:
    before, after = pattern.split("{}")
    return re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}", re.ASCII)


def _require_model(found: _Contents) -> bool:
    """Raise InputError unless this is an SD 1.x or 2.x; return whether its text is OpenCLIP's."""
    path, keys = found.file.path, found.file.entries
    for sign, kind in _KINDS.items():
        key = next((k for k in keys if k.startswith(sign) or f".{sign}" in k), None)
        if key is not None:
            raise found.another_kind(key, kind)
    for start, kind in _ALONE.items():
        key = next((k for k in keys if k.startswith(start)), None)
        if key is not None and not found.has(UNET):
            raise found.another_kind(key, f"{kind}, which is read from a folder with the others")
    conv_in = f"{UNET}input_blocks.0.0.weight"
    inputs = found.shape(conv_in, 4)[1]
    if inputs in _INPUTS:
        what = f"another kind of model: its UNet takes {inputs} channels, as {_INPUTS[inputs]} does"
        raise InputError(what, file=path, key=conv_in, expected="4, the latents alone")
    kinds = [openclip for openclip, prefix in TEXT.items() if found.has(prefix)]
    if len(kinds) != 1:
        expected = " or ".join(f"{prefix}*" for prefix in TEXT.values())
        what = "two text encoders" if kinds else "no text encoder"
        raise InputError(what, file=path, key="cond_stage_model", expected=expected)
    known = (UNET, VAE, TEXT[kinds[0]])
    others = [k for k in keys if not k.startswith(known) and not _IGNORED.fullmatch(k)]
    if others:
        shown = ", ".join(cut(key) for key in sorted(others)[:4])
        what = f"{len(others)} keys that are in no Stable Diffusion 1.x or 2.x"
        raise InputError(what, file=path, found=shown)
    return kinds[0]


def _detect_unet(found: _Contents, openclip: bool) -> UNet:
    """Return the UNet whose parameters have the shapes in the file."""
    levels: list[list[tuple[int, bool]]] = [[]]
    blocks = found.count(f"{UNET}input_blocks.{{}}.")
    for i in range(1, min(blocks, MAX_LEVELS * 17 + 1)):
        block = f"{UNET}input_blocks.{i}"
        if f"{block}.0.op.weight" in found.file.entries:
            levels.append([])
        else:
            features = found.shape(f"{block}.0.in_layers.2.weight", 4)[0]
            levels[-1].append((features, found.has(f"{block}.1.")))
    layers = len(levels[0])
    if (
        not layers
        or len(levels) > MAX_LEVELS
        or any(len(lv) != layers or len(set(lv)) != 1 for lv in levels)
    ):
        what = "UNet's levels are not made alike"
        raise InputError(
            what, file=found.file.path, key=f"{UNET}input_blocks", found=cut(str(levels))
        )
    channels = tuple(level[0][0] for level in levels)
    if openclip:
        heads = tuple(c // HEAD_DIM for c in channels)
        _require_multiples(found, f"{UNET}input_blocks", channels, HEAD_DIM)
    else:
        heads = (8,) * len(channels)
    _require_multiples(found, f"{UNET}input_blocks", channels, GROUPS)
    mid = f"{UNET}middle_block.1"
    return UNet(
        in_channels=found.shape(f"{UNET}input_blocks.0.0.weight", 4)[1],
        out_channels=found.shape(f"{UNET}out.2.weight", 4)[0],
        block_out_channels=channels,
        layers_per_block=layers,
        cross_attention=tuple(level[0][1] for level in levels),
        num_heads=heads,
        context_dim=found.shape(f"{mid}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        linear_projection=len(found.shape(f"{mid}.proj_in.weight")) == 2,
        norm_groups=GROUPS,
        upcast_attention=openclip,
    )


def _detect_vae(found: _Contents) -> AutoencoderKL:
    """Return the VAE whose parameters have the shapes in the file."""
    down = f"{VAE}encoder.down"
    levels = min(found.count(f"{down}.{{}}."), MAX_LEVELS)
    shapes = [found.shape(f"{down}.{i}.block.0.conv1.weight", 4) for i in range(levels)]
    channels = tuple(shape[0] for shape in shapes)
    _require_multiples(found, down, channels, GROUPS)
    return AutoencoderKL(
        in_channels=found.shape(f"{VAE}encoder.conv_in.weight", 4)[1],
        latent_channels=found.shape(f"{VAE}post_quant_conv.weight", 4)[0],
        block_out_channels=channels,
        layers_per_block=found.count(f"{down}.0.block.{{}}."),
        norm_groups=GROUPS,
    )


def _detect_text_encoder(found: _Contents, openclip: bool) -> CLIPTextEncoder:
    """Return the text encoder whose parameters have the shapes in the file."""
    prefix = TEXT[openclip]
    if openclip:
        token, position = "token_embedding.weight", "positional_embedding"
        layers, first = f"{prefix}transformer.resblocks.{{}}.", "mlp.c_fc.weight"
    else:
        prefix += "text_model." if found.has(f"{prefix}text_model.") else ""
        token, position = (f"embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
        layers, first = f"{prefix}encoder.layers.{{}}.", "mlp.fc1.weight"
    vocab_size, hidden = found.shape(prefix + token, 2)
    _require_multiples(found, prefix + token, (hidden,), HEAD_DIM)
    num_layers = found.count(layers) - openclip
    if num_layers < 1:
        what = "text encoder has no layer that is used"
        raise InputError(what, file=found.file.path, key=layers.format(0))
    return CLIPTextEncoder(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=found.shape(layers.format(0) + first, 2)[0],
        num_layers=num_layers,
        num_heads=hidden // HEAD_DIM,
        max_length=found.shape(prefix + position, 2)[0],
        activation="gelu" if openclip else "quick_gelu",
    )


def _require_multiples(found: _Contents, key: str, channels: Iterable[int], divisor: int) -> None:
    """Refuse sizes that no published model has, for which more would have to be known."""
    channels = list(channels)
    if not channels or any(c % divisor for c in channels):
        what = "not of a published size: give the networks as arguments"
        expected = f"multiples of {divisor}"
        raise InputError(
            what, file=found.file.path, key=key, expected=expected, found=cut(str(channels))
        )


def _require_fit(
    found: _Contents,
    unet: UNet,
    vae: AutoencoderKL,
    text_encoder: CLIPTextEncoder,
    latent_size: int,
) -> None:
    """Hold the three networks' sizes, and that of the latents, against each other."""
    pairs = {
        "UNet's input and the VAE's latents": (unet.in_channels, vae.latent_channels),
        "UNet's output and the VAE's latents": (unet.out_channels, vae.latent_channels),
        "UNet's context and the text encoder's width": (
            unet.context_dim,
            text_encoder.hidden_size,
        ),
    }
    for what, (one, other) in pairs.items():
        if one != other:
            raise InputError(f"{what} differ", file=found.file.path, expected=other, found=one)
    if vae.in_channels != RGB_CHANNELS:
        key = f"{VAE}encoder.conv_in.weight"
        raise InputError(
            "VAE is not one of RGB images",
            file=found.file.path,
            key=key,
            expected=RGB_CHANNELS,
            found=vae.in_channels,
        )
    if latent_size % latent_divisor(unet):
        raise InputError(
            "UNet cannot halve its latents at every level",
            file=found.file.path,
            key="latent_size",
            expected=f"a multiple of {latent_divisor(unet)}",
            found=latent_size,
        )
