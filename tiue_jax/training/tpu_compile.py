"""Programs compiled for TPUs that are not there: do they fit, what do they compute, move and send?

libtpu holds the TPU compiler, which needs no TPU. Memory, bytes and collectives are the compiler's
figures; operations are counted from the traced program; nothing was run.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tiue_jax.diffusion.ddim import closed_form
from tiue_jax.diffusion.images import decode_images
from tiue_jax.diffusion.schedule import make_schedule
from tiue_jax.diffusion.student import student_forward
from tiue_jax.diffusion.text_image import TextImage
from tiue_jax.io.errors import RunError
from tiue_jax.io.files import write_atomic
from tiue_jax.models.clip import CLIP
from tiue_jax.models.taesd import AutoencoderTiny
from tiue_jax.models.variants import Variant
from tiue_jax.training import sharding
from tiue_jax.training.chips import Chip, Slice
from tiue_jax.training.config import check_config, step_options
from tiue_jax.training.flops import traced_flops
from tiue_jax.training.hlo import collectives, loop_share, moved_bytes, totals
from tiue_jax.training.setup import blame
from tiue_jax.training.state import Frozen, init_state
from tiue_jax.training.step import make_step

_TOO_LARGE = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")


class Program(NamedTuple):
    """A jitted function with the shapes it is called with; what of them lies where."""

    function: Any
    arguments: tuple[Any, ...]
    placements: dict[str, sharding.Placement]


@dataclass(frozen=True)
class Report:
    """What is known of one program on one chip of a slice.

    Attributes:
        topology, chips: what it was compiled for.
        what: "train" or "sample".
        batch_size: of all chips.
        memory: bytes of a chip.
        parameters: tree -> bytes of it that a chip holds.
        arguments, outputs, aliased, temporaries, peak: bytes a chip; `aliased` are outputs in the
            place of donated arguments; `peak` is arguments + outputs - aliased + temporaries.
        flops: of one chip's share of the products and convolutions, recomputation included.
        bytes_accessed: that the instructions of one chip read and write, loops counted: more than
            goes to HBM, as the compiler keeps some of it on chip.
        collectives: kind -> {"count": in the text, "times": run, "bytes": given out}, one chip.
        network_bytes: that one chip sends, for rings.
        seconds: the compilation took.
        effort: the compiler's, see `EFFORTS`.
        jax, compiler: versions.
        compiler_flags: LIBTPU_INIT_ARGS, which the compiler reads: its options, as of a run.
    """

    topology: str
    chips: int
    what: str
    batch_size: int
    memory: int
    parameters: dict[str, int]
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    flops: float
    bytes_accessed: float
    collectives: dict[str, dict[str, int]]
    network_bytes: float
    seconds: float
    effort: str
    jax: str
    compiler: str
    compiler_flags: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Return the seconds of one run at the chip's peaks, by what they would limit.

        "compute" and "network" are minima; "memory" is none, see `bytes_accessed`.
        """
        return {
            "compute": self.flops / chip.flops,
            "memory": self.bytes_accessed / chip.bandwidth,
            "network": self.network_bytes / chip.network,
        }


def training_program(config: ConfigDict, shapes: Variant, devices: list[Any]) -> Program:
    """Return the whole training iteration of `config`. No weights are needed.

    Args:
        shapes: the teacher's networks. A CLIP term's are ViT-B/32 and TAESD.
        devices: of the slice, or any others.

    Raises:
        InputError: the config is not usable on so many devices.
    """
    check_config(config)
    with blame("mesh"):
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    with blame("train.batch_size"):
        sharding.check_batch_size(config.train.batch_size, mesh, config.train.accumulate)
    dtype = jnp.dtype(config.train.compute_dtype)
    unet = shapes.unet.clone(dtype=dtype, remat=config.train.remat)
    text_encoder = shapes.text_encoder.clone(dtype=dtype)
    options = step_options(config, shapes.latent_size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = _param_shapes(shapes)
    with blame("lora"):
        state = jax.eval_shape(lambda k, p: init_state(k, p, options), key, params["unet"])
    kept_in = jnp.dtype(config.train.teacher_dtype)
    length = text_encoder.max_length
    term = _text_image(config, shapes, dtype) if config.clip.tau > 0 else None
    frozen = Frozen(
        teacher=_cast(params["unet"], kept_in),
        text_encoder=_cast(params["text_encoder"], kept_in),
        null_ids=jax.eval_shape(lambda: jnp.zeros((length,), jnp.int32)),
        **({} if term is None else _text_image_params(term, shapes.latent_size)),
    )
    schedule = make_schedule(prediction_type=shapes.prediction_type)
    with blame("student"):
        step = make_step(unet, text_encoder, schedule, options, text_image=term)
    ids = jax.ShapeDtypeStruct((config.train.batch_size, length), jnp.int32)
    split = config.mesh.shard_teacher
    whole = sharding.make_mesh(1, 1, devices[:1])
    return Program(
        sharding.jit_step(step, mesh, state, frozen, shard_teacher=split),
        (state, frozen, ids, key),
        {
            "state": sharding.placement(state, mesh),
            "teacher": sharding.placement(frozen, mesh if split else whole),
        },
    )


def sampling_program(config: ConfigDict, shapes: Variant, devices: list[Any]) -> Program:
    """Return the making of `train.batch_size` images in one pass: text encoder, student, VAE.

    Every chip holds the whole student, in the compute dtype, and makes its part of the images.

    Raises:
        InputError: the config is not usable on so many devices.
    """
    check_config(config)
    dtype = jnp.dtype(config.train.compute_dtype)
    unet, vae, text = (network.clone(dtype=dtype) for network in shapes[:3])
    schedule = make_schedule(prediction_type=shapes.prediction_type)
    options = step_options(config, shapes.latent_size)
    with blame("student"):
        timesteps = np.asarray(options.student_timesteps(schedule), np.int32)
    S, E = closed_form(schedule, timesteps)
    mesh = sharding.make_mesh(-1, 1, devices)
    with blame("train.batch_size"):
        sharding.check_batch_size(config.train.batch_size, mesh)

    def images(params: Any, ids: Any, noise: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            context = text.apply({"params": params["text_encoder"]}, ids)
            x0, _ = student_forward(
                unet, params["unet"], noise, context, timesteps, timesteps[0], S, E
            )
            return decode_images(vae, params["vae"], x0)

    count, side = config.train.batch_size, shapes.latent_size
    params = _cast(_param_shapes(shapes), dtype)
    ids = jax.ShapeDtypeStruct((count, text.max_length), jnp.int32)
    noise = jax.ShapeDtypeStruct((count, side, side, unet.in_channels), jnp.float32)
    everywhere = sharding.shardings(params, mesh, split=False)
    split = sharding.batch_sharding(mesh)
    jitted = jax.jit(images, in_shardings=(everywhere, split, split), out_shardings=split)
    return Program(jitted, (params, ids, noise), {"parameters": sharding.placement(params, mesh)})


PROGRAMS = {"train": training_program, "sample": sampling_program}
EFFORTS = ("O1", "O2")  # JAX_OPTIMIZATION_LEVEL; a run takes O2 where nothing else is said


class Outline(NamedTuple):
    """What is known of `PROGRAMS[what]` before it is compiled, of one chip.

    Attributes:
        parameters, flops: as in `Report`.
    """

    program: Program
    parameters: dict[str, int]
    flops: float


def outline(config: ConfigDict, shapes: Variant, where: Slice, what: str) -> Outline:
    """Trace `PROGRAMS[what]` for a slice, in a minute where compiling takes an hour.

    Raises:
        InputError: the config is not usable on this slice.
    """
    program = PROGRAMS[what](config, shapes, where.devices)
    parameters = {name: placed.per_device for name, placed in program.placements.items()}
    flops = traced_flops(program.function, *program.arguments) / len(where.devices)
    return Outline(program, parameters, flops)


def compile_program(
    config: ConfigDict,
    shapes: Variant,
    where: Slice,
    what: str,
    effort: str = "O2",
    known: Outline | None = None,
    text_to: str | None = None,
) -> Report:
    """Compile `PROGRAMS[what]` for a slice.

    Args:
        effort: one of `EFFORTS`; O1 searches no tilings, which is most of the work.
        known: its `outline`, if it was made already.
        text_to: file to write the compiled program to, as the compiler prints it, gzipped.

    Raises:
        InputError: the config is not usable on this slice.
        RunError: it does not fit a chip's memory (and what would help), or does not compile.
    """
    program, parameters, flops = known or outline(config, shapes, where, what)
    lowered = program.function.lower(*program.arguments)
    began = time.monotonic()
    try:
        with _optimization_level(effort):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise RunError(_refusal(str(error), config, where, what)) from error
    seconds = time.monotonic() - began
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None and isinstance(cost, Mapping) and text is not None
    if text_to is not None:
        write_atomic(text_to, gzip.compress(text.encode(), 6))
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    aliased, temporaries = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    found = collectives(text)
    return Report(
        topology=where.topology,
        chips=len(where.devices),
        what=what,
        batch_size=config.train.batch_size,
        memory=where.chip.memory,
        parameters=parameters,
        arguments=arguments,
        outputs=outputs,
        aliased=aliased,
        temporaries=temporaries,
        peak=arguments + outputs - aliased + temporaries,
        flops=flops,
        bytes_accessed=float(cost.get("bytes accessed", math.nan)) * loop_share(text),
        collectives=totals(found),
        network_bytes=moved_bytes(found),
        seconds=seconds,
        effort=effort,
        jax=jax.__version__,
        compiler=", ".join(where.devices[0].client.platform_version.splitlines()),
        compiler_flags=os.environ.get("LIBTPU_INIT_ARGS", ""),
    )


@contextmanager
def _optimization_level(effort: str) -> Iterator[None]:
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", effort)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def advice(config: ConfigDict, chips: int, what: str) -> str:
    """Say which options would make a program smaller, the cheapest first."""
    if what == "sample":
        return f"--config.train.batch_size below {config.train.batch_size}, or a larger --topology"
    found = []
    if config.train.remat != "blocks":
        found.append("--config.train.remat=blocks")
    if 0 < config.mesh.fsdp < min(chips, sharding.TOGETHER):
        found.append(f"--config.mesh.fsdp={min(chips, sharding.TOGETHER)}")
    if not config.mesh.shard_teacher:
        found.append("--config.mesh.shard_teacher=True")
    if config.train.teacher_dtype != "bfloat16":
        found.append("--config.train.teacher_dtype=bfloat16")
    per_chip = config.train.batch_size // (chips * config.train.accumulate)
    if per_chip > 1:
        found.append(f"--config.train.accumulate={config.train.accumulate * 2}")
        found.append(f"--config.train.batch_size={config.train.batch_size // 2}")
    return ", ".join(found) or "a larger --topology"


def _refusal(error: str, config: ConfigDict, where: Slice, what: str) -> str:
    """Say in a line why a program does not compile."""
    size, said = _TOO_LARGE.search(error), " ".join(error.split())[:400]
    if size is None and "RESOURCE_EXHAUSTED" not in error:
        return f"{where.topology}: does not compile: {said}"
    if size is None:
        told = f" ({said})"
    else:
        told = f": it takes {size[1]} {size[2]}iB of {size[3]} {size[4]}iB a chip"
    help_ = advice(config, len(where.devices), what)
    return f"{where.topology}: does not fit{told}; what would help: {help_}"


def _param_shapes(shapes: Variant) -> dict[str, Any]:
    """Return the shapes of all three networks' parameters, fp32."""
    size, length = shapes.latent_size, shapes.text_encoder.max_length

    def init(key: Any) -> dict[str, Any]:
        x, t = jnp.zeros((1, size, size, shapes.unet.in_channels)), jnp.zeros((1,), jnp.int32)
        context = jnp.zeros((1, length, shapes.unet.context_dim))
        pixels = jnp.zeros((1, 8 * size, 8 * size, shapes.vae.in_channels))
        ids = jnp.zeros((1, length), jnp.int32)
        return {
            "unet": shapes.unet.init(key, x, t, context)["params"],
            "vae": shapes.vae.init(key, pixels)["params"],
            "text_encoder": shapes.text_encoder.init(key, ids)["params"],
        }

    return jax.eval_shape(init, jax.random.key(0))


def _text_image(config: ConfigDict, shapes: Variant, dtype: Any) -> TextImage:
    text = shapes.text_encoder
    clip = CLIP(vocab_size=text.vocab_size, max_length=text.max_length, dtype=dtype)
    taesd = AutoencoderTiny(latent_channels=shapes.unet.in_channels, dtype=dtype)
    moments = None if config.clip.source_faithful else (0.5, 0.5, 0.5)  # of any value, here
    return TextImage(taesd, clip, clip.image_size, moments, moments)


def _text_image_params(term: TextImage, latent_size: int) -> dict[str, Any]:
    """Return the shapes of a CLIP term's parameters, in the compute dtype."""
    side, pixels = 8 * latent_size, term.size

    def init(key: Any) -> dict[str, Any]:
        ids = jnp.zeros((1, term.clip.max_length), jnp.int32)
        return {
            "taesd": term.taesd.init(key, jnp.zeros((1, side, side, 3)))["params"],
            "clip": term.clip.init(key, ids, jnp.zeros((1, pixels, pixels, 3)))["params"],
        }

    return _cast(jax.eval_shape(init, jax.random.key(0)), jnp.dtype(term.clip.dtype))


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)
