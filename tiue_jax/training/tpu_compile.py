"""The training step, compiled for TPUs that are not there: does it fit, and what does it send?

libtpu holds the TPU compiler, which needs no TPU: `pip install libtpu`. Its figures are the
compiler's, not a run's.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from tiue_jax.diffusion.schedule import make_schedule
from tiue_jax.io.errors import InputError, RunError
from tiue_jax.models.variants import Variant
from tiue_jax.training import sharding
from tiue_jax.training.config import check_config, step_options
from tiue_jax.training.setup import blame
from tiue_jax.training.state import Frozen, init_state
from tiue_jax.training.step import make_step

_COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+))(?:\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Report:
    """What the compiler says of one program on one chip.

    Attributes:
        topology, chips: what it was compiled for.
        batch_size: of all chips.
        arguments, outputs, aliased, temporaries, peak: bytes a chip; `aliased` are outputs in the
            place of donated arguments; `peak` is arguments + outputs - aliased + temporaries.
        flops, bytes_accessed: of one chip in one iteration.
        collectives: kind -> {"count", "bytes"} of what they give out, a chip.
        seconds: the compilation took.
    """

    topology: str
    chips: int
    batch_size: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    flops: float
    bytes_accessed: float
    collectives: dict[str, dict[str, int]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def tpu_devices(topology: str) -> list[Any]:
    """Return the chips of a topology such as "v5e:2x4", as the compiler knows them.

    Raises:
        InputError: libtpu is not installed, or knows no such topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # of several classes, by what is wrong and by version
        expected = 'libtpu installed (pip install "jax[tpu]"), and "v5e:2x4", "v4:2x2x4", "v6e:4x4"'
        raise InputError(
            f"cannot be compiled for: {error}",
            key="--topology",
            expected=expected,
            found=topology,
        ) from error
    return list(found.devices)


def compile_step(config: ConfigDict, shapes: Variant, topology: str) -> Report:
    """Compile the whole training iteration of `config` for a TPU slice. No weights are needed.

    Args:
        shapes: the teacher's networks.
        topology: KIND:SHAPE.

    Raises:
        InputError: the config or the topology is not usable.
        RunError: it does not compile; on TPUs mostly because it does not fit.
    """
    check_config(config)
    if config.clip.tau > 0:
        raise InputError("the CLIP term is not compiled for TPUs yet: 0", key="clip.tau")
    devices = tpu_devices(topology)
    with blame("mesh"):
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    with blame("train.batch_size"):
        sharding.check_batch_size(config.train.batch_size, mesh)
    dtype = jnp.dtype(config.train.compute_dtype)
    unet = shapes.unet.clone(dtype=dtype, remat=config.train.remat)
    text_encoder = shapes.text_encoder.clone(dtype=dtype)
    options = step_options(config, shapes.latent_size)
    size, length = shapes.latent_size, text_encoder.max_length
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init_frozen(key: Any) -> Frozen:
        x, t = jnp.zeros((1, size, size, unet.in_channels)), jnp.zeros((1,), jnp.int32)
        context = jnp.zeros((1, length, unet.context_dim))
        return Frozen(
            teacher=unet.init(key, x, t, context)["params"],
            text_encoder=text_encoder.init(key, jnp.zeros((1, length), jnp.int32))["params"],
            null_ids=jnp.zeros((length,), jnp.int32),
        )

    frozen = jax.eval_shape(init_frozen, key)
    schedule = make_schedule(prediction_type=shapes.prediction_type)
    with blame("lora"):
        state = jax.eval_shape(lambda k, p: init_state(k, p, options), key, frozen.teacher)
    with blame("student"):
        step = make_step(unet, text_encoder, schedule, options)
    ids = jax.ShapeDtypeStruct((config.train.batch_size, length), jnp.int32)
    began = time.monotonic()
    try:
        lowered = sharding.jit_step(step, mesh, state, frozen).lower(state, frozen, ids, key)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise RunError(f"{topology}: does not compile: {str(error)[:400]}") from error
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    text = compiled.as_text()
    assert memory is not None and isinstance(cost, Mapping) and text is not None
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    aliased, temporaries = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    return Report(
        topology=topology,
        chips=len(devices),
        batch_size=config.train.batch_size,
        arguments=arguments,
        outputs=outputs,
        aliased=aliased,
        temporaries=temporaries,
        peak=arguments + outputs - aliased + temporaries,
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        collectives=collectives(text),
        seconds=time.monotonic() - began,
    )


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Count the collectives in a program's HLO text, and the bytes that they give out.

    A collective within a loop is counted once.
    """
    found: dict[str, dict[str, int]] = {}
    for result, kind, start in _COLLECTIVE.findall(hlo):
        arrays = _ARRAY.findall(result)
        if start and kind in ("all-gather", "collective-permute"):  # (operands, results, ...)
            arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]
        size = 0
        for dtype, bits, shape in arrays:
            count = math.prod(int(side) for side in shape.split(",") if side)
            size += count * (1 if dtype == "pred" else int(bits) // 8)
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    return found
