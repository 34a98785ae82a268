"""The folder of a run that was never made: one checkpoint of known parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from tests.pretrained.folders import MODEL
from tiue_jax.data.pipeline import make_batches
from tiue_jax.data.prompts import Prompts
from tiue_jax.pretrained.folder import load_stable_diffusion
from tiue_jax.training.checkpoint import Checkpoints
from tiue_jax.training.digests import digest_rest
from tiue_jax.training.workdir import write_run


@flax.struct.dataclass
class State:
    student: Any
    ema: Any
    lora: Any


def make_workdir(folder: Path, teacher: Path) -> dict[str, Any]:
    """A run with one checkpoint of the reference model's UNet, student and EMA each changed."""
    sd = load_stable_diffusion(MODEL, dtype=jnp.dtype("float32"), place=np.asarray)
    params = sd.params["unet"]
    trees = {
        name: jax.tree.map(lambda x, f=factor: np.ascontiguousarray(x * np.float32(f)), params)
        for name, factor in (("student", 1.5), ("ema", 0.75))
    }
    attention = "transformer_blocks_0/attn1/to_q".split("/")
    rng = np.random.default_rng(0)
    pair = {"a": rng.standard_normal((64, 2)), "b": rng.standard_normal((2, 64))}
    pair = {name: jnp.asarray(x, jnp.float32) for name, x in pair.items()}
    lora = unflatten_dict(
        {("mid_block", "attentions_0", *attention, n): x for n, x in pair.items()}
    )
    trees["lora"] = lora
    state = State(jax.device_put(trees["student"]), jax.device_put(trees["ema"]), lora)
    batches = make_batches(
        Prompts(("a", "b"), "two"),
        lambda texts: np.zeros((len(texts), 3), np.int32),
        batch_size=2,
        seed=0,
    )
    config = {
        "teacher": str(teacher),
        "lora.alpha": 3.0,
        "student.num_steps": 2,
        "student.timestep_spacing": "trailing",
    }
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, state, {"config": config}, batches)
    checkpoints.close()
    digests = digest_rest(sd, sd.params["text_encoder"])
    write_run(folder, {"config": config, "teacher": digests})
    return trees
