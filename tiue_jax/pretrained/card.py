"""Model cards: the README.md of a student's folder, in the form that the Hugging Face hub reads.

Names, prompts and settings come from users: in the front matter each is one quoted string, in the
text every character that Markdown or HTML knows is an entity, and code is fenced by more backticks
than it holds.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tiue_jax.io.errors import InputError, one_line
from tiue_jax.pretrained.folder import StableDiffusion, StudentOptions
from tiue_jax.pretrained.hub import is_repo_id

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,59}")
_PAPER = "2505.21960"

_SNIPPET = """\
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPTextModel, CLIPTokenizer

MODEL = {model}  # a folder, or a repository of the hub
NUM_STEPS = {num_steps}  # K: what this student was trained for
PROMPT = {prompt}

tokenizer = CLIPTokenizer.from_pretrained(MODEL, subfolder="tokenizer")
text_encoder = CLIPTextModel.from_pretrained(MODEL, subfolder="text_encoder")
unet = UNet2DConditionModel.from_pretrained(MODEL, subfolder="unet")
vae = AutoencoderKL.from_pretrained(MODEL, subfolder="vae")
scheduler = DDIMScheduler.from_pretrained(MODEL, subfolder="scheduler")  # has the right spacing
scheduler.set_timesteps(NUM_STEPS)


def embed_time(t):
    return unet.time_embedding(unet.time_proj(t).to(unet.dtype))


@torch.no_grad()
def encode(x, t, context):
    \"\"\"conv_in, the down blocks and the mid block: once.\"\"\"
    temb, x = embed_time(t), unet.conv_in(x)
    skips = [x]
    for block in unet.down_blocks:
        cross = {{"encoder_hidden_states": context}} if hasattr(block, "attentions") else {{}}
        x, more = block(hidden_states=x, temb=temb, **cross)
        skips += more
    return unet.mid_block(x, temb, encoder_hidden_states=context), skips


@torch.no_grad()
def decode(x, skips, t, context):
    \"\"\"The up blocks and the head: one row for each timestep, in one batch.\"\"\"
    temb, skips = embed_time(t), list(skips)
    for block in unet.up_blocks:
        n = len(block.resnets)
        cross = {{"encoder_hidden_states": context}} if hasattr(block, "attentions") else {{}}
        x = block(hidden_states=x, res_hidden_states_tuple=tuple(skips[-n:]), temb=temb, **cross)
        del skips[-n:]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


ids = tokenizer(
    PROMPT,
    padding="max_length",
    max_length=tokenizer.model_max_length,
    truncation=True,
    return_tensors="pt",
).input_ids
with torch.no_grad():
    context = text_encoder(ids)[0]
size = unet.config.sample_size
noise = torch.randn(
    1, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0)
)
timesteps = scheduler.timesteps
mid, skips = encode(noise, timesteps[:1], context)


def repeated(x):
    return x.expand(NUM_STEPS, *x.shape[1:])


predictions = decode(repeated(mid), map(repeated, skips), timesteps, repeated(context))

latents = noise  # DDIM is linear in the predictions: no network is called from here on
for t, prediction in zip(timesteps, predictions):
    latents = scheduler.step(prediction[None], t, latents).prev_sample
with torch.no_grad():
    pixels = vae.decode(latents / vae.config.scaling_factor).sample
VaeImageProcessor().postprocess(pixels)[0].save("image.png")
"""


def model_card(
    student: StudentOptions,
    *,
    title: str = "TiUE student",
    repo_id: str | None = None,
    base_model: str | None = None,
    teacher_license: str = "other",
    config: Mapping[str, Any] | None = None,
    steps: int | None = None,
    prompts: Sequence[str] = (),
) -> str:
    """Return the README.md of a student's folder.

    Args:
        student: what it was trained for.
        repo_id: OWNER/NAME it will have on the hub; None: the commands say FOLDER.
        base_model: its teacher: a repository of the hub, or any other name.
        teacher_license: the hub's identifier ("creativeml-openrail-m", "openrail++"), or "other".
        config: of the training, JSON values.
        steps: iterations trained.
        prompts: some that it was trained on or is good at; the first is used in the examples.

    Raises:
        InputError: `teacher_license` is no identifier, or `repo_id` no OWNER/NAME.
    """
    _license(teacher_license)
    if repo_id is not None and not is_repo_id(repo_id):
        raise InputError("not a repository of the hub", file=repo_id, expected="OWNER/NAME")
    model, prompt = repo_id or "FOLDER", one_line(next(iter(prompts), "")) or "a red circle"
    on_hub = base_model is not None and is_repo_id(base_model)
    teacher = _escape(base_model) if base_model else "a Stable Diffusion"
    if on_hub:
        teacher = f"[{teacher}](https://huggingface.co/{base_model})"
    front: dict[str, Any] = {
        "license": teacher_license,
        "library_name": "tiue_jax",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "tiue", "one-pass", "jax", "flax", f"arxiv:{_PAPER}"],
        "inference": False,
    }
    if on_hub:
        front["base_model"] = base_model
    trained = "" if steps is None else f", trained for {steps:,} iterations"
    command = f"python -m tiue_jax.sample --model={model} --prompt={shlex.quote(prompt)}"
    snippet = _SNIPPET.format(
        model=json.dumps(model), num_steps=student.num_steps, prompt=_python_string(prompt)
    )
    sections = [
        _front_matter(front),
        f"# {_escape(title)}",
        f"A student of {teacher} that makes an image in one pass{trained}: the UNet's encoder runs "
        f"once, its decoder at {student.num_steps} timesteps ({_escape(student.timestep_spacing)} "
        "spacing) in parallel, with no guidance. Method: TiUE, a time-independent unified encoder, "
        f"[One-Way Ticket (arXiv {_PAPER})](https://arxiv.org/abs/{_PAPER}), distilled from its "
        "teacher without images.",
        "## How to run it",
        _fenced(command, "sh"),
        "With diffusers' modules:",
        _fenced(snippet, "python"),
        "**Do not call it as a `StableDiffusionPipeline`**, although the files load as one. The "
        "pipeline runs encoder and decoder together at every timestep, on latents that change in "
        "between, and with guidance. This student's encoder has learned the first timestep and "
        "pure noise alone, and its decoders to share those features: the images would be wrong, "
        f"and cost {student.num_steps} times the encoder.",
    ]
    if prompts:
        listed = "\n".join(f"- {_escape(text)}" for text in prompts)
        sections += ["## Prompts", listed]
    if config is not None:
        sections += ["## Training", "The settings of the run:", _settings(config)]
    named = f"`{teacher_license}`" if teacher_license != "other" else "not named here"
    sections += [
        "## Licence",
        f"Text encoder, tokenizer and VAE are those of {teacher}, and the UNet was trained from "
        f"its weights: the licence of the teacher ({named}) holds for this model, with its "
        "restrictions of use. The licence of the code that trained it does not change that.",
    ]
    return "\n\n".join(sections) + "\n"


def student_card(
    sd: StableDiffusion, *, teacher_license: str | None = None, repo_id: str | None = None
) -> str | None:
    """Return the card of `sd` with what its `training.json` tells; None if it is no student.

    Args:
        teacher_license: as of `model_card`; None: what `training.json` says, or "other".
    """
    if sd.student is None:
        return None
    told = _told(sd.training or {}, teacher_license)
    prompts = told.config.get("log.validation_prompts")
    return model_card(
        sd.student,
        repo_id=repo_id,
        base_model=told.teacher,
        teacher_license=told.license,
        config=told.config or None,
        steps=told.steps,
        prompts=[x for x in prompts if isinstance(x, str)] if isinstance(prompts, list) else [],
    )


def lora_card(training: Mapping[str, Any], *, teacher_license: str | None = None) -> str:
    """Return the README.md beside the LoRA teacher of a run.

    Args:
        training: what `training.json` says.
        teacher_license: as of `student_card`.
    """
    told = _told(training, teacher_license)
    teacher = _escape(told.teacher) if told.teacher else "a Stable Diffusion"
    front: dict[str, Any] = {
        "license": told.license,
        "library_name": "diffusers",
        "tags": ["lora", "tiue", f"arxiv:{_PAPER}"],
        "inference": False,
    }
    if told.teacher is not None and is_repo_id(told.teacher):
        front["base_model"] = told.teacher
    after = "" if told.steps is None else f" after {told.steps:,} iterations"
    sections = [
        _front_matter(front),
        "# LoRA teacher of a TiUE distillation",
        f"The low-rank matrices{after} that, on {teacher}, predict the noise of the student's own "
        f"images ([arXiv {_PAPER}](https://arxiv.org/abs/{_PAPER})). It is half of the "
        "distillation and no faster model: to go on training, or to look at.",
        "## How to load it",
        _fenced("python -m tiue_jax.sample --model=TEACHER --lora=FOLDER --teacher ...", "sh"),
        "## Training",
        _settings(told.config),
        "## Licence",
        f"That of the teacher ({_escape(told.license)}) holds.",
    ]
    return "\n\n".join(sections) + "\n"


class _Told(NamedTuple):
    """What `training.json` says that a card can use."""

    config: dict[str, Any]
    steps: int | None
    teacher: str | None
    license: str


def _told(training: Mapping[str, Any], teacher_license: str | None) -> _Told:
    """Read it with care: it may come from a stranger. A teacher that is a local folder has no name.

    Raises:
        InputError: `teacher_license` is no identifier.
    """
    config, step = training.get("config"), training.get("step")
    config = config if isinstance(config, dict) else {}
    teacher, stored = config.get("teacher"), training.get("teacher_license")
    teacher = teacher if isinstance(teacher, str) and not Path(teacher or ".").exists() else None
    stored = stored if isinstance(stored, str) and _LICENSE.fullmatch(stored) else "other"
    return _Told(
        config=config,
        steps=step if isinstance(step, int) else None,
        teacher=None if teacher is None else teacher.partition("@")[0],
        license=_license(teacher_license or stored),
    )


def _license(name: str) -> str:
    if not _LICENSE.fullmatch(name):
        raise InputError(
            "not a licence identifier of the hub",
            key="license",
            expected='"openrail++", "other" or the like',
            found=repr(name),
        )
    return name


def _front_matter(fields: Mapping[str, Any]) -> str:
    """Return the fields as YAML: JSON values on one line each are YAML."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _escape(text: str) -> str:
    """Return `text` on one line, as Markdown that shows it and does nothing else."""
    return re.sub(r"[^\w .,/()'-]|_", lambda match: f"&#{ord(match[0])};", one_line(text))


def _fenced(text: str, language: str) -> str:
    """Return `text` as a block of code that nothing in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _settings(config: Mapping[str, Any]) -> str:
    """Return a run's config as a block of JSON."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    return _fenced(text, "json")


def _python_string(text: str) -> str:
    """Return `text` as a literal with double quotes, which JSON's are."""
    return json.dumps(text, ensure_ascii=False)
