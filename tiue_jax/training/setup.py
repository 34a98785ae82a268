"""Everything that a run reads, checked: config, mesh, prompts, teacher; and what identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import flax
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray
from ml_collections import ConfigDict

import tiue_jax
from tiue_jax.data.pipeline import CutReport, make_batches
from tiue_jax.data.prompts import Prompts, load_prompts
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.folder import StableDiffusion, load_stable_diffusion
from tiue_jax.training import sharding
from tiue_jax.training.checkpoint import inspect_arrays
from tiue_jax.training.config import check_config, flatten, step_options
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


def set_up(config: ConfigDict, say: Callable[[str], None]) -> Setup:
    """Read what `config` names. Small things are checked before large ones are read.

    Args:
        say: called with a line for a person.

    Raises:
        InputError: config, prompts or teacher are not usable.
    """
    check_config(config)
    with _blame("mesh"):
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    with _blame("train.batch_size"):
        sharding.check_batch_size(config.train.batch_size, mesh)
    prompts = load_prompts(
        config.data.source, field=config.data.field, deduplicate=config.data.deduplicate
    )
    sd = load_stable_diffusion(
        config.teacher, dtype=jnp.dtype(config.train.compute_dtype), place=np.ascontiguousarray
    )
    options = step_options(config, sd.latent_size)
    with _blame("teacher or student"):
        unet = sd.unet.clone(remat=config.train.remat)
        step, lora_step = (
            make_step(unet, sd.text_encoder, sd.schedule, options, lora_only=lora_only)
            for lora_only in (False, True)
        )
    frozen = sharding.shard(
        Frozen(
            sd.params.pop("unet"), sd.params["text_encoder"], jnp.asarray(sd.tokenizer.null_ids)
        ),
        mesh,
    )
    with _blame("lora"):
        start, abstract = _make_start(frozen, options, mesh)
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
        iterate=sharding.jit_step(step, mesh, abstract, frozen),
        iterate_lora=sharding.jit_step(lora_step, mesh, abstract, frozen),
        prompts=prompts,
        tokenize=tokenize,
        batches=batches,
        description={
            "config": flatten(config),
            "teacher": _digest_teacher(sd, frozen, prompts),
            "prompts": {"count": len(prompts), "sha256": prompts.digest},
            "code": {
                "tiue_jax": tiue_jax.__version__,
                "jax": jax.__version__,
                "flax": flax.__version__,
            },
        },
    )


@contextmanager
def _blame(key: str) -> Iterator[None]:
    """Turn a ValueError about the options into the user's error, with the config's key."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error), key=key) from error


def _make_start(
    frozen: Frozen, options: StepOptions, mesh: Mesh
) -> tuple[Callable[[PRNGKeyArray], TrainState], TrainState]:
    """Return key -> state, and the shapes of that state, both laid out on the mesh.

    The state is made where it will stay: no device holds more than its part.
    """

    def start(key: PRNGKeyArray, teacher: Any) -> TrainState:
        return init_state(key, teacher, options)

    shapes = jax.eval_shape(start, jax.random.key(0), frozen.teacher)
    places = sharding.shardings(shapes, mesh)
    made = jax.jit(start, out_shardings=places)
    abstract = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )
    return lambda key: made(key, frozen.teacher), abstract


def _digest_teacher(sd: StableDiffusion, frozen: Frozen, prompts: Prompts) -> dict[str, str]:
    """Return part -> digest of what training takes from the teacher, whatever file it was in."""

    def digest(content: Any) -> str:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    ids, _ = sd.tokenizer.encode([*prompts.texts[:256], ""])
    schedule = {
        **{k: v for k, v in vars(sd.schedule).items() if k != "alphas_cumprod"},
        "alphas_cumprod": sd.schedule.alphas_cumprod.tolist(),
    }
    return {
        "unet": digest([repr(sd.unet), inspect_arrays(frozen.teacher)[0]]),
        "text_encoder": digest([repr(sd.text_encoder), inspect_arrays(frozen.text_encoder)[0]]),
        "tokenizer": digest(ids.tolist()),
        "schedule": digest(schedule),
    }
