"""What training changes: everything that a checkpoint must hold, and nothing else."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tiue_jax.models.lora import init_lora
from tiue_jax.training.options import StepOptions

Params = Mapping[str, Any]


@flax.struct.dataclass
class TrainState:
    """The state between two iterations.

    Attributes:
        step: iterations done.
        student: the student UNet's parameters, fp32.
        ema: their moving average: what is exported.
        lora: the LoRA teacher's matrices, fp32.
        student_opt, lora_opt: Adam's states.
    """

    step: Int[Array, ""]
    student: Params
    ema: Params
    lora: Params
    student_opt: optax.OptState
    lora_opt: optax.OptState


@flax.struct.dataclass
class Frozen:
    """What training reads and never changes.

    Attributes:
        teacher: the teacher UNet's parameters.
        text_encoder: the text encoder's parameters.
        null_ids: token ids of the empty prompt.
        taesd, clip: parameters of the CLIP term's networks, where there is one.
    """

    teacher: Params
    text_encoder: Params
    null_ids: Int[Array, " n"]
    taesd: Params | None = None
    clip: Params | None = None


def init_state(
    key: PRNGKeyArray,
    teacher_params: Params,
    options: StepOptions,
    lora: Params | None = None,
    student: Params | None = None,
) -> TrainState:
    """The state before iteration 0: student and moving average are copies of the teacher.

    Copies in memory too, for the state is donated to every step and the teacher outlives it.

    Args:
        key: for the LoRA's random half.
        teacher_params: the teacher UNet's, of any float type; the student's are fp32.
        lora: LoRA matrices to begin with, instead of random ones.
        student: what the student begins as, instead of the teacher.
    """

    def copy(tree: Params) -> Params:
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree)

    start = teacher_params if student is None else student
    student = copy(start)
    if lora is None:
        lora = init_lora(key, teacher_params, options.lora_rank, options.lora_targets)
    else:
        lora = copy(lora)
    student_optimizer, lora_optimizer = options.optimizers()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        ema=copy(start),
        lora=lora,
        student_opt=student_optimizer.init(student),
        lora_opt=lora_optimizer.init(lora),
    )


def ema_decay(updates: Int[Array, ""], max_decay: float) -> Float[Array, ""]:
    """min(max_decay, (1 + n) / (10 + n)) with n = updates - 1, and 0 where n <= 0.

    Args:
        updates: optimizer steps of the student so far, the one just made included. The first makes
            the moving average the student itself.
    Source: diffusers' EMAModel, as TiUE's public code uses it.
    """
    n = (updates - 1).astype(jnp.float32)
    return jnp.where(n > 0, jnp.minimum(max_decay, (1.0 + n) / (10.0 + n)), 0.0)


def update_ema(ema: Params, student: Params, decay: Float[Array, ""]) -> Params:
    """ema - (1 - decay) (ema - student), in fp32."""
    return jax.tree.map(lambda e, s: e - (1.0 - decay) * (e - s), ema, student)
