"""The options of one training iteration, with the paper's values as defaults."""

from dataclasses import dataclass
from typing import TypeVar

import optax
from jaxtyping import Array

from tiue_jax.diffusion.schedule import NoiseSchedule
from tiue_jax.diffusion.student import student_timesteps

Number = float | Array
LearningRate = Number | optax.Schedule
Count = TypeVar("Count", int, Array)


@dataclass(frozen=True)
class StepOptions:
    """What an iteration computes.

    A `Number` may be a traced scalar too: other values then need no other program.

    Attributes:
        num_steps, timestep_spacing: K and the spread of the student's decoder timesteps.
        timesteps, t_enc: given outright instead, decreasing; None: from the two above, t_enc = t_1.
        latent_size: height and width of the latents (pixels / 8).
        guidance_scale: w of the teacher, and of the LoRA teacher unless that has its own.
        lora_guidance_scale: w of the LoRA teacher. Where both are the same, guidance weighs the
            direction, and the student still ends at the teacher's unguided distribution; with 1
            (arXiv 2305.16213, 2312.05239) it ends at the guided one. None: `guidance_scale`.
        vsd_t_min, vsd_t_max: the VSD timestep is uniform in this range, both ends included.
        lambda_kl: weight of the KL term, a SUM over noise maps.
        kl_batch: the sum is taken as over the maps of this many images, whatever the batch:
            lambda_kl * kl_batch / batch * sum. The paper sums over the 8 images of one device and
            averages over devices: 8. None: the sum over all images of the batch.
        clip_tau: the CLIP term is max(0, clip_tau - similarity); 0: there is none.
        clip_weight, clip_iterations: it weighs clip_weight * (1 - step / clip_iterations), and
            nothing from iteration clip_iterations on; the paper's code takes one epoch of prompts.
        student_lr, lora_lr: Adam's, constant or an optax schedule of the own update count.
        adam_b1, adam_b2, adam_eps: Adam's, for both; no weight decay.
        clip_grad_norm: each network's gradient is scaled down to at most this global norm.
        lora_rank, lora_alpha, lora_targets: the LoRA teacher is kernel + alpha / rank * a b.
        lora_warmup: in the first so many iterations only the LoRA learns.
        student_every: afterwards the student learns in every so-manieth iteration, the LoRA in all
            of them, so that it can follow (arXiv 2405.14867 calls it two time scales).
        null_prompt_prob: probability that the LoRA loss takes the null prompt for the whole batch.
        ema_max_decay: upper bound of the moving average's decay (1 + n) / (10 + n).
        accumulate: parts that a batch is computed in, one after the other, for less memory. Draws,
            losses and gradients are the same; but the CLIP term's hinge is that of every part.

    Raises:
        ValueError: on values out of range.
    """

    num_steps: int = 4
    timestep_spacing: str = "leading"
    timesteps: tuple[int, ...] | None = None
    t_enc: int | None = None
    latent_size: int = 64
    guidance_scale: Number = 4.5
    lora_guidance_scale: Number | None = None
    vsd_t_min: int = 20
    vsd_t_max: int = 980
    lambda_kl: Number = 0.1
    kl_batch: int | None = None
    clip_tau: float = 0.0
    clip_weight: Number = 0.1
    clip_iterations: Number = 1.0
    student_lr: LearningRate = 1e-6
    lora_lr: LearningRate = 1e-3
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad_norm: Number = 1.0
    lora_rank: int = 64
    lora_alpha: Number = 108.0
    lora_targets: tuple[str, ...] = ("to_q", "to_v")
    lora_warmup: int = 0
    student_every: int = 1
    null_prompt_prob: Number = 0.1
    ema_max_decay: float = 0.9999
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.vsd_t_min <= self.vsd_t_max:
            raise ValueError(
                f"vsd_t_min {self.vsd_t_min}, vsd_t_max {self.vsd_t_max}: "
                "expected 0 <= vsd_t_min <= vsd_t_max"
            )
        probability = self.null_prompt_prob
        if isinstance(probability, float | int) and not 0.0 <= probability <= 1.0:
            raise ValueError(f"null_prompt_prob {self.null_prompt_prob}: expected 0..1")
        if not 0.0 <= self.ema_max_decay < 1.0:
            raise ValueError(f"ema_max_decay {self.ema_max_decay}: expected 0 <= decay < 1")
        for name in ("num_steps", "latent_size", "clip_grad_norm", "lora_rank"):
            value = getattr(self, name)
            if isinstance(value, float | int) and value <= 0:
                raise ValueError(f"{name} {value}: expected more than 0")
        if self.lora_warmup < 0:
            raise ValueError(f"lora_warmup {self.lora_warmup}: expected at least 0")
        for name in ("student_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")

    @property
    def guidance_scales(self) -> tuple[Number, Number]:
        """w of the teacher and of the LoRA teacher."""
        own = self.lora_guidance_scale
        return self.guidance_scale, self.guidance_scale if own is None else own

    @property
    def lora_scale(self) -> Number:
        """alpha / rank."""
        return self.lora_alpha / self.lora_rank

    def student_updates(self, step: Count) -> Count:
        """How often the student has learnt after `step` iterations."""
        return (step - self.lora_warmup) // self.student_every

    def is_lora_only(self, step: int) -> bool:
        """Whether iteration `step` (from 1) is one in which only the LoRA learns."""
        after = step - self.lora_warmup
        return after <= 0 or after % self.student_every != 0

    def student_timesteps(self, schedule: NoiseSchedule) -> tuple[int, ...]:
        """The decoder timesteps t_1 > ... > t_K.

        Raises:
            ValueError: for timesteps that are not decreasing within the schedule, or a single step
                that would return the noise.
        """
        if self.timesteps is None:
            spread = student_timesteps(schedule, self.num_steps, self.timestep_spacing)
            return tuple(int(t) for t in spread)
        bounds = (schedule.num_train_timesteps, *self.timesteps, -1)
        if any(low >= high for high, low in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(
                f"timesteps {self.timesteps}: expected decreasing, within "
                f"0..{schedule.num_train_timesteps - 1}"
            )
        return self.timesteps

    def encoder_timestep(self, schedule: NoiseSchedule) -> int:
        """t_enc: the first decoder timestep unless given."""
        return self.student_timesteps(schedule)[0] if self.t_enc is None else self.t_enc

    def optimizers(self) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        """Adam behind global-norm clipping, for the student and for the LoRA."""

        def adam(learning_rate: LearningRate) -> optax.GradientTransformation:
            return optax.chain(
                optax.clip_by_global_norm(self.clip_grad_norm),
                optax.adam(learning_rate, self.adam_b1, self.adam_b2, self.adam_eps),
            )

        return adam(self.student_lr), adam(self.lora_lr)

    def kl_weight(self, batch_size: int) -> Number:
        """What the sum over the batch's K * batch_size maps is multiplied with."""
        scale = 1.0 if self.kl_batch is None else self.kl_batch / batch_size
        return self.lambda_kl * scale
