"""Stable Diffusion folders: in the diffusers layout, or with Flax parameters in the same layout.

```
model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/
tiue.json  training.json  README.md     of a TiUE student: K, how it was made, its card
```
Loading checks everything small first (configs, tokenizer, the header of every weight file), then
streams tensor by tensor: memory peaks at the parameters in the dtype asked for and one tensor more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tiue_jax.diffusion.schedule import TIMESTEP_SPACINGS, NoiseSchedule
from tiue_jax.io.errors import InputError
from tiue_jax.io.files import StrPath, new_folder
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.pretrained import configs, scheduler
from tiue_jax.pretrained.jsonfile import Fields, dump_object, read_object
from tiue_jax.pretrained.links import require_contained
from tiue_jax.pretrained.names import DIFFUSERS, FLAX, FORMS, Form
from tiue_jax.pretrained.parameters import ParamFile, Params, to_device, write_params
from tiue_jax.pretrained.tokenizer import Tokenizer
from tiue_jax.pretrained.weights import FLOAT_NAMES

PARTS = ("unet", "vae", "text_encoder")
TRAINING_FILE = "training.json"
RGB_CHANNELS = 3
_LCM = "LatentConsistencyModelPipeline"
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    _LCM,
    "LatentConsistencyModelImg2ImgPipeline",
)
_OTHER_KINDS = {  # _class_name in model_index.json -> what to call it
    **dict.fromkeys(("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"), "SDXL"),
    "StableDiffusionXLInpaintPipeline": "SDXL, inpainting",
    "StableDiffusion3Pipeline": "SD 3",
    "StableDiffusionControlNetPipeline": "ControlNet",
    "StableDiffusionDepth2ImgPipeline": "SD 2, conditioned on depth",
    "StableDiffusionInpaintPipeline": "inpainting",
    "StableDiffusionInstructPix2PixPipeline": "InstructPix2Pix",
    "StableDiffusionUpscalePipeline": "an upscaler",
    "StableUnCLIPPipeline": "unCLIP",
    "FluxPipeline": "FLUX",
}


@dataclass(frozen=True)
class StudentOptions:
    """What a TiUE student was trained for: `tiue.json`.

    Attributes:
        num_steps: K, the number of decoder timesteps.
        timestep_spacing: how they are spread: one of TIMESTEP_SPACINGS.
    """

    num_steps: int = 4
    timestep_spacing: str = "leading"


@dataclass(frozen=True)
class StableDiffusion:
    """Modules, parameters, tokenizer and noise schedule of a Stable Diffusion or a TiUE student.

    Attributes:
        params: "unet", "vae", "text_encoder" (those that were loaded) -> parameters of the module.
        student: None for an ordinary Stable Diffusion.
        latent_size: side of the latents that the UNet was trained on.
        training: of a student, what made it: step, config, teacher, prompts (`training.json`).
        configs: the JSON objects the folder came with, by part: keys that do not concern us are
            carried over when it is saved.
        folder: where it was loaded from.
    """

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextEncoder
    params: dict[str, Params]
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    student: StudentOptions | None = None
    latent_size: int = 64
    training: Mapping[str, Any] | None = None
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels a side one latent stands for: 8 for every Stable Diffusion."""
        return 2 ** (len(self.vae.block_out_channels) - 1)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Part -> module."""
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}


def load_stable_diffusion(
    folder: StrPath,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = jnp.float32,
    parts: Sequence[str] = PARTS,
    place: Callable[[np.ndarray], Any] = to_device,
    variant: str | None = None,
) -> StableDiffusion:
    """Load a Stable Diffusion folder, in the diffusers layout or in ours with Flax parameters.

    Args:
        folder: the folder that holds model_index.json.
        dtype: compute dtype of the modules.
        param_dtype: dtype of the parameters; None: as they are stored, each.
        parts: the networks whose parameters are loaded; all modules are there in any case.
        place: what becomes of each parameter as soon as it is read: a JAX array on the default
            device; `np.ascontiguousarray` keeps it on the host.
        variant: "fp16", ...: which weight files, of every part; None: the plain ones, or the one
            variant that there is where there are no plain ones.

    Raises:
        InputError: files missing, truncated or malformed; links that lead out of the folder;
            settings that we do not implement; keys missing, unexpected or misshapen; NaN or Inf in
            a weight.
    """
    folder = Path(folder)
    require_contained(folder, (*PARTS, "scheduler", "tokenizer"))
    _require_model(folder)
    fields = {part: _fields(folder, part, "config.json") for part in PARTS}
    fields["scheduler"] = _fields(folder, "scheduler", "scheduler_config.json")
    unet = configs.unet_from_config(fields["unet"], dtype=dtype)
    vae = configs.vae_from_config(fields["vae"], dtype=dtype)
    text_encoder = configs.text_encoder_from_config(fields["text_encoder"], dtype=dtype)
    _require_fit(fields, unet, vae, text_encoder)
    loaded = StableDiffusion(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        params={},
        tokenizer=Tokenizer(
            folder / "tokenizer",
            vocab_size=text_encoder.vocab_size,
            max_length=text_encoder.max_length,
        ),
        schedule=scheduler.schedule_from_config(fields["scheduler"]),
        student=_read_student(folder),
        training=_read_training(folder),
        latent_size=configs.latent_size_from_config(fields["unet"]),
        configs={part: dict(found.values) for part, found in fields.items()},
        folder=folder,
    )
    form = folder_form(folder)
    files = {
        part: ParamFile.open(loaded.modules[part], part, folder / part, form, variant)
        for part in parts
    }
    for part, file in files.items():  # every file has been checked before the first is read
        loaded.params[part] = file.read(param_dtype, place)
    return loaded


def save_stable_diffusion(
    sd: StableDiffusion,
    folder: StrPath,
    *,
    dtype: str | None = "float32",
    form: Form = DIFFUSERS,
    card: str | None = None,
) -> None:
    """Write `sd` as an ordinary diffusers folder, whole or not at all.

    A student also gets the DDIM scheduler with its spacing of timesteps, and `tiue.json`.

    Args:
        sd: with the parameters of all three networks.
        folder: new or empty.
        dtype: "float32", "float16" or "bfloat16"; None: every parameter as it is.
        card: README.md's text, as of `card.student_card`; None: there is none.
        form: `names.FLAX`: the same folder, but weights under Flax names in Flax's axis order,
            `flax_params.safetensors`; nothing but `load_stable_diffusion` knows it.

    Raises:
        InputError: `folder` is in use; a parameter is NaN or Inf, or beyond the range of `dtype`.
        ValueError: an unknown dtype, or parameters that are missing or misshapen.
    """
    if dtype is not None and dtype not in FLOAT_NAMES:
        raise ValueError(f"dtype {dtype!r}: choose from {sorted(FLOAT_NAMES)}")
    missing = sorted(set(PARTS) - sd.params.keys())
    if missing:
        raise ValueError(f"parameters of {missing} were not loaded")
    schedule, student = sd.schedule, sd.student
    if student is not None:
        schedule = replace(schedule, timestep_spacing=student.timestep_spacing)
    written = folder_configs(sd)
    written["scheduler/scheduler_config.json"] = scheduler.scheduler_config(
        schedule, sd.configs.get("scheduler", {}), ddim=student is not None
    )
    with new_folder(folder) as out:
        for part in PARTS:
            config = written[f"{part}/config.json"]
            shown = Path(folder) / part / form.file_names[part]
            stored = write_params(
                sd.modules[part], part, sd.params[part], out / part, dtype, form, shown
            )
            if part == "text_encoder":  # transformers loads in the dtype this names
                config["torch_dtype"] = stored
        for name, content in written.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(dump_object(content), encoding="utf-8")
        if card is not None:
            (out / "README.md").write_text(card, encoding="utf-8")
        sd.tokenizer.save(out / "tokenizer")


def require_apart(source: Path, target: Path) -> None:
    """Raise InputError if `target` is `source`, lies in it, or holds it."""
    inner, outer = source.resolve(), target.resolve()
    if inner == outer:
        raise InputError(
            "output is the input", file=target, key="--output", expected="a new folder"
        )
    if outer.is_relative_to(inner) or inner.is_relative_to(outer):
        what = "output and input lie within each other"
        raise InputError(what, file=target, key="--output", expected="a new folder apart")


def folder_form(folder: Path) -> Form:
    """Return the form of the weights in `folder`: Flax where the UNet's Flax file is there."""
    flax_file = folder / "unet" / FLAX.file_names["unet"]
    return FORMS["flax"] if flax_file.exists() else FORMS["diffusers"]


def folder_configs(sd: StableDiffusion) -> dict[str, dict[str, Any]]:
    """Return the small JSON files of `sd`'s folder by name, but for the scheduler's."""
    base = {part: dict(sd.configs.get(part, {})) for part in PARTS}
    for stale in ("dtype", "torch_dtype"):
        base["text_encoder"].pop(stale, None)
    bos, eos, pad = sd.tokenizer.special_ids
    tokens = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    files: dict[str, dict[str, Any]] = {
        "unet/config.json": base["unet"] | configs.unet_config(sd.unet, sd.latent_size),
        "vae/config.json": {"sample_size": sd.latent_size * sd.pixels_per_latent}
        | base["vae"]
        | configs.vae_config(sd.vae),
        "text_encoder/config.json": tokens
        | base["text_encoder"]
        | configs.text_encoder_config(sd.text_encoder),
    }
    keeps_class = sd.student is None and "scheduler" in sd.configs
    name = sd.configs["scheduler"]["_class_name"] if keeps_class else "DDIMScheduler"
    files["model_index.json"] = {
        "_class_name": "StableDiffusionPipeline" if sd.unet.time_cond_dim is None else _LCM,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", name],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if sd.student is not None:
        files["tiue.json"] = {
            "method": "tiue",
            "num_steps": sd.student.num_steps,
            "timestep_spacing": sd.student.timestep_spacing,
        }
        if sd.training is not None:
            files[TRAINING_FILE] = dict(sd.training)
    return files


def _require_model(folder: Path) -> None:
    """Raise InputError, saying what it is instead, unless `folder` is a Stable Diffusion folder."""
    if not folder.exists():
        raise InputError("no such folder", file=folder, expected="a Stable Diffusion folder")
    if folder.is_file():
        what = "a single file: load_single_file reads it, or save it as a diffusers folder first"
        raise InputError(what, file=folder, expected="a folder with model_index.json")
    index = folder / "model_index.json"
    if not index.exists():
        what = f"not a Stable Diffusion folder: no model_index.json{_workdir_hint(folder)}"
        raise InputError(what, file=folder)
    require_pipeline(index)


def _workdir_hint(folder: Path) -> str:
    """Say where the model of a training run is, if `folder` is the workdir of one."""
    if not (folder / "run.json").is_file():
        return ""
    what, student = "; it is the workdir of a training run", folder / "student"
    if (student / "model_index.json").is_file():
        return f"{what}, its student is {student}"
    command = f"python -m tiue_jax.convert --input={folder} --output=NEW_FOLDER"
    return f"{what}: write its student by {command}"


def require_pipeline(index: Path) -> None:
    """Raise InputError, saying what it is instead, unless `index` is that of a Stable Diffusion."""
    fields = Fields(read_object(index), index)
    if fields.values.get("_class_name") not in PIPELINES:
        kind = _OTHER_KINDS.get(str(fields.values.get("_class_name")))
        raise InputError(
            "another kind of model",
            file=index,
            key="_class_name",
            expected=" or ".join(PIPELINES),
            found=fields.show("_class_name") + (f" ({kind})" if kind else ""),
        )


def _fields(folder: Path, part: str, name: str) -> Fields:
    path = folder / part / name
    return Fields(read_object(path), path)


def _require_fit(
    fields: Mapping[str, Fields], unet: UNet, vae: AutoencoderKL, text_encoder: CLIPTextEncoder
) -> None:
    """Hold the three networks' sizes against each other."""
    latents = vae.latent_channels
    if unet.in_channels != latents:
        what = "UNet does not take the VAE's latents alone (an inpainting or editing model?)"
        raise fields["unet"].refuse("in_channels", latents, what)
    if unet.out_channels != latents:
        raise fields["unet"].refuse("out_channels", latents, "UNet does not give latents")
    if unet.context_dim != text_encoder.hidden_size:
        what = "UNet does not take the text encoder's width"
        raise fields["unet"].refuse("cross_attention_dim", text_encoder.hidden_size, what)
    divisor = configs.latent_divisor(unet)
    if configs.latent_size_from_config(fields["unet"]) % divisor:
        what = "UNet cannot halve its latents at every level"
        raise fields["unet"].refuse("sample_size", f"a multiple of {divisor}", what)
    if vae.in_channels != RGB_CHANNELS:
        raise fields["vae"].refuse("in_channels", RGB_CHANNELS, "VAE is not one of RGB images")


def _read_training(folder: Path) -> dict[str, Any] | None:
    """Return what `training.json` says; None where there is none."""
    path = folder / TRAINING_FILE
    return read_object(path) if path.exists() else None


def _read_student(folder: Path) -> StudentOptions | None:
    """Return what `tiue.json` says; None where there is none."""
    path = folder / "tiue.json"
    if not path.exists():
        return None
    fields = Fields(read_object(path), path)
    fields.choice("method", "", ("tiue",))
    return StudentOptions(
        num_steps=fields.integer("num_steps", 0, 1, 1000),
        timestep_spacing=fields.choice("timestep_spacing", "", TIMESTEP_SPACINGS),
    )
