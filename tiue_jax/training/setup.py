"""Everything that a run reads, checked: config, mesh, prompts, teacher; and what identifies it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray
from ml_collections import ConfigDict

from tiue_jax.data.pipeline import CutReport, make_batches
from tiue_jax.data.prompts import Prompts, load_prompts
from tiue_jax.diffusion.text_image import TextImage
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.auxiliary import load_clip, load_taesd
from tiue_jax.pretrained.folder import StableDiffusion, load_stable_diffusion
from tiue_jax.pretrained.hub import resolve_model, resolve_network
from tiue_jax.training import sharding
from tiue_jax.training.config import flatten, step_options
from tiue_jax.training.digests import cast, digest_teacher
from tiue_jax.training.hosts import ALONE, Hosts, code_version
from tiue_jax.training.options import StepOptions
from tiue_jax.training.state import Frozen, TrainState, init_state
from tiue_jax.training.step import make_step

Iterate = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclass(frozen=True)
class Setup:
    """What a run works with.

    Attributes:
        sd: the teacher; its UNet's parameters are in `frozen`, and no more here.
        start: key -> the state before the first iteration, laid out on the mesh.
        abstract: that state as shapes with shardings: what a checkpoint is restored into.
        iterate: one iteration, jitted: (state, frozen, input_ids, key) -> (state, metrics).
        iterate_lora: the same for those of `options.is_lora_only`.
        batches, tokenize: the prompts, endless, and what turns them into token ids.
        description: what the run is, as its checkpoints say it (JSON).
    """

    mesh: Mesh
    sd: StableDiffusion
    frozen: Frozen
    options: StepOptions
    start: Callable[[PRNGKeyArray], TrainState]
    abstract: TrainState
    iterate: Iterate
    iterate_lora: Iterate
    prompts: Prompts
    tokenize: CutReport
    batches: grain.DatasetIterator
    description: dict[str, Any]


def set_up(config: ConfigDict, say: Callable[[str], None], hosts: Hosts = ALONE) -> Setup:
    """Read what `config` names. Small things are checked before large ones are read.

    Args:
        say: called with a line for a person.
        hosts: what they have read is compared before it is put on their devices.

    Raises:
        InputError: config, prompts or teacher are not usable, or not the same on all hosts.
    """
    with blame("mesh"):
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    with blame("train.batch_size"):
        sharding.check_batch_size(config.train.batch_size, mesh, config.train.accumulate)
    prompts = load_prompts(
        config.data.source, field=config.data.field, deduplicate=config.data.deduplicate
    )
    described = {"count": len(prompts), "sha256": prompts.digest}
    hosts.agree("prompts", {f"prompts: {key}": value for key, value in described.items()})
    dtype = jnp.dtype(config.train.compute_dtype)
    load = partial(load_stable_diffusion, dtype=dtype, place=np.ascontiguousarray)
    sd = load(resolve_model(config.teacher))
    options = step_options(config, sd.latent_size, len(prompts))
    text_image, auxiliary = _load_text_image(config, sd, dtype)
    with blame("teacher or student"):
        unet = sd.unet.clone(remat=config.train.remat)
        build = partial(make_step, unet, sd.text_encoder, sd.schedule, options)
        step, lora_step = build(text_image=text_image), build(lora_only=True)
    teacher, kept_in = sd.params.pop("unet"), jnp.dtype(config.train.teacher_dtype)
    frozen = Frozen(
        cast(teacher, kept_in),
        cast(sd.params["text_encoder"], kept_in),
        jnp.asarray(sd.tokenizer.null_ids),
        **auxiliary,
    )
    student = _load_start(config, sd, load)
    digests = digest_teacher(sd, frozen, prompts, student=student, text_image=text_image)
    hosts.agree("teacher", {f"teacher: {part}": digest for part, digest in digests.items()})
    frozen = sharding.shard(frozen, mesh, split=config.mesh.shard_teacher)
    rounded = kept_in != jnp.float32  # then the student does not start from what is on the device
    with blame("lora"):
        start, abstract = _make_start(
            frozen, options, mesh, teacher if student is None and rounded else student
        )
    jit_step = partial(
        sharding.jit_step,
        mesh=mesh,
        state=abstract,
        frozen=frozen,
        shard_teacher=config.mesh.shard_teacher,
    )
    tokenize = CutReport(sd.tokenizer.encode, say)
    batches = make_batches(
        prompts,
        tokenize,
        batch_size=config.train.batch_size,
        seed=config.data.shuffle_seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return Setup(
        mesh=mesh,
        sd=sd,
        frozen=frozen,
        options=options,
        start=start,
        abstract=abstract,
        iterate=jit_step(step),
        iterate_lora=jit_step(lora_step),
        prompts=prompts,
        tokenize=tokenize,
        batches=batches,
        description={
            "config": flatten(config),
            "teacher": digests,
            "prompts": described,
            "code": code_version(),
        },
    )


@contextmanager
def blame(key: str) -> Iterator[None]:
    """Turn a ValueError about the options into the user's error, with the config's key."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error), key=key) from error


def _load_text_image(
    config: ConfigDict, sd: StableDiffusion, dtype: jnp.dtype
) -> tuple[TextImage | None, dict[str, Any]]:
    """Return the networks of the CLIP term and their parameters by name; None and none without."""
    if config.clip.tau == 0:
        return None, {}
    place = np.ascontiguousarray
    taesd = load_taesd(resolve_network(config.clip.taesd), dtype=dtype, place=place)
    clip = load_clip(resolve_network(config.clip.model), dtype=dtype, place=place)
    if clip.module.vocab_size != sd.text_encoder.vocab_size:
        raise InputError(
            "CLIP has another vocabulary than the teacher's tokenizer",
            key="clip.model",
            expected=sd.text_encoder.vocab_size,
            found=clip.module.vocab_size,
        )
    if clip.module.max_length < sd.tokenizer.max_length:
        raise InputError(
            "CLIP takes shorter prompts than the teacher",
            key="clip.model",
            expected=f"{sd.tokenizer.max_length} tokens",
            found=clip.module.max_length,
        )
    if taesd.module.latent_channels != sd.unet.in_channels:
        raise InputError(
            "TAESD decodes other latents than the teacher's",
            key="clip.taesd",
            expected=f"{sd.unet.in_channels} channels",
            found=taesd.module.latent_channels,
        )
    faithful = config.clip.source_faithful
    term = TextImage(
        taesd.module,
        clip.module,
        clip.size,
        None if faithful else clip.mean,
        None if faithful else clip.std,
    )
    return term, {"taesd": taesd.params, "clip": clip.params}


def _load_start(
    config: ConfigDict, sd: StableDiffusion, load: Callable[..., StableDiffusion]
) -> Any:
    """Return the UNet's parameters that the student starts as; None: the teacher's."""
    if not config.student.start:
        return None
    folder = resolve_model(config.student.start)
    found = load(folder, parts=("unet",))
    if found.unet != sd.unet:
        what = "the student's UNet is not of the teacher's shape"
        raise InputError(what, file=folder, key="student.start")
    kinds = found.schedule.prediction_type, sd.schedule.prediction_type
    if kinds[0] != kinds[1]:
        what = "the student predicts something else than the teacher"
        raise InputError(what, file=folder, key="student.start", expected=kinds[1], found=kinds[0])
    return found.params["unet"]


def _make_start(
    frozen: Frozen, options: StepOptions, mesh: Mesh, student: Any
) -> tuple[Callable[[PRNGKeyArray], TrainState], TrainState]:
    """Return key -> state, and the shapes of that state, both laid out on the mesh.

    The state is made where it will stay: no device holds more than its part.
    """

    def start(key: PRNGKeyArray, teacher: Any, student: Any) -> TrainState:
        return init_state(key, teacher, options, student=student)

    shapes = jax.eval_shape(start, jax.random.key(0), frozen.teacher, student)
    places = sharding.shardings(shapes, mesh)
    made = jax.jit(start, out_shardings=places)
    abstract = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )
    return lambda key: made(key, frozen.teacher, sharding.shard(student, mesh)), abstract
