"""One training iteration of TiUE, as one pure function.

    z ~ N(0, I);   eps_1..K, x0 = student(z, y)
    t ~ U{20..980}, n ~ N(0, I);   x_t = alpha_t x0 + sigma_t n
    e_T = teacher(x_t, t, y),  e_L = (teacher + LoRA)(x_t, t, y)          both guided, no gradient
    g = sigma_t^2 (e_T - e_L);   L = 0.5 mean((x0 - stop(x0 - nan_to_num(g)))^2) + lambda KL(eps)
                                                       (+ weight * L_clip; diffusion/text_image.py)
    student: clip, Adam;   moving average
    t ~ U{0..999}, fresh n, the x0 from BEFORE the student's update;   LoRA: clip, Adam on L_lora

A teacher that predicts v: e is the noise its outputs stand for, in every one of these terms.

Source: arXiv 2505.21960; TiUE's public code (sen-mao/Loopfree at 9a232a9).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tiue_jax.diffusion import losses
from tiue_jax.diffusion.ddim import closed_form, guided_output, predicted_noise
from tiue_jax.diffusion.schedule import NoiseSchedule
from tiue_jax.diffusion.student import student_forward
from tiue_jax.diffusion.text_image import TextImage
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.lora import merge_lora
from tiue_jax.models.unet import UNet
from tiue_jax.training.options import StepOptions
from tiue_jax.training.sharding import gather, spread
from tiue_jax.training.state import Frozen, TrainState, ema_decay, update_ema

Metrics = dict[str, Array]
StepFunction = Callable[..., Any]

__all__ = ["Draws", "Frozen", "StepOptions", "make_step", "sample_draws"]


@flax.struct.dataclass
class Draws:
    """Every random number of one iteration.

    Attributes:
        noise: z, the student's input.
        vsd_noise, vsd_t: of the VSD term's x_t.
        lora_noise, lora_t: of the LoRA loss's x_t.
        null_uniform: below null_prompt_prob, the LoRA loss takes the null prompt for the batch.
            None where the others are meant alone, with their axis of examples.
    """

    noise: Float[Array, "b h w c"]
    vsd_noise: Float[Array, "b h w c"]
    vsd_t: Int[Array, " b"]
    lora_noise: Float[Array, "b h w c"]
    lora_t: Int[Array, " b"]
    null_uniform: Float[Array, ""] | None


def sample_draws(
    key: PRNGKeyArray,
    step: int | Int[Array, ""],
    batch_size: int,
    latent_shape: tuple[int, int, int],
    *,
    vsd_t_range: tuple[int, int] = (20, 980),
    num_train_timesteps: int = 1000,
) -> Draws:
    """The draws of iteration `step`: a function of key, step and place in the batch, nothing else.

    Every example has its own key, so its draws do not depend on the batch size or on how the batch
    is split over devices.

    Args:
        key: of the whole training run.
        latent_shape: (h, w, c) of one example.
        vsd_t_range: both ends included.
    """
    batch_key, null_key = jax.random.split(jax.random.fold_in(key, step))
    keys = jax.vmap(lambda i: jax.random.fold_in(batch_key, i))(jnp.arange(batch_size))

    def example(key: PRNGKeyArray) -> tuple[Array, ...]:
        k_noise, k_vsd, k_vsd_t, k_lora, k_lora_t = jax.random.split(key, 5)
        return (
            jax.random.normal(k_noise, latent_shape),
            jax.random.normal(k_vsd, latent_shape),
            jax.random.randint(k_vsd_t, (), vsd_t_range[0], vsd_t_range[1] + 1),
            jax.random.normal(k_lora, latent_shape),
            jax.random.randint(k_lora_t, (), 0, num_train_timesteps),
        )

    noise, vsd_noise, vsd_t, lora_noise, lora_t = jax.vmap(example)(keys)
    null_uniform = jax.random.uniform(null_key)
    return Draws(noise, vsd_noise, vsd_t, lora_noise, lora_t, null_uniform)


def make_step(
    unet: UNet,
    text_encoder: CLIPTextEncoder,
    schedule: NoiseSchedule,
    options: StepOptions,
    *,
    text_image: TextImage | None = None,
    with_gradients: bool = False,
    lora_only: bool = False,
) -> StepFunction:
    """Build the iteration. Compute dtype and rematerialisation are the modules' own options.

    Args:
        text_image: the networks of the CLIP term; `frozen` has to hold their parameters then.
        with_gradients: return them too.
        lora_only: build that of `options.is_lora_only`, in which the LoRA teacher learns to follow
            a student that stays: no gradient of the student is taken.

    Returns:
        step(state, frozen, input_ids [b n], key, draws=None) -> (state, metrics): a pure function
        to be jitted (`sharding.jit_step`). Metrics are fp32 scalars. `draws` replaces what (key,
        state.step) gives. `with_gradients` adds a third result, {"student", "lora"}: the gradients
        before clipping.

    Raises:
        ValueError: for a teacher that is an LCM, timesteps that it does not have, or a CLIP term
            without its networks.
    """
    if unet.time_cond_dim is not None:
        raise ValueError(
            "the teacher's UNet takes the guidance scale (an LCM): distillation needs one that "
            "guidance is computed for, an ordinary Stable Diffusion"
        )
    count = schedule.num_train_timesteps
    if options.vsd_t_max >= count:
        raise ValueError(f"vsd_t_max {options.vsd_t_max}: the teacher has {count} timesteps")
    if options.clip_tau > 0 and text_image is None and not lora_only:
        raise ValueError(f"clip_tau {options.clip_tau}: the CLIP term needs TAESD and CLIP")
    timesteps = np.asarray(options.student_timesteps(schedule), np.int32)
    t_enc = options.encoder_timestep(schedule)
    S, E = closed_form(schedule, timesteps)
    student_optimizer, lora_optimizer = options.optimizers()
    latent_shape = (options.latent_size, options.latent_size, unet.in_channels)

    def student(params: Mapping, draws: Draws, context: Array) -> tuple[Array, Array]:
        params = gather(params, unet.dtype)
        x0, outputs = student_forward(unet, params, draws.noise, context, timesteps, t_enc, S, E)
        return x0, predicted_noise(schedule, timesteps, draws.noise, outputs)

    def score_gradient(
        x0: Array, draws: Draws, state: TrainState, frozen: Frozen, context: Array, null: Array
    ) -> Array:
        teacher, lora = gather((frozen.teacher, state.lora), unet.dtype)
        x_t = schedule.add_noise(x0, draws.vsd_noise, draws.vsd_t)
        _, sigma = schedule.coefficients(draws.vsd_t, x0.ndim)

        def guided(scales: tuple[Array, Array]) -> Array:
            lora_scale, guidance_scale = scales
            params = merge_lora(teacher, lora, lora_scale)
            output = guided_output(unet, params, x_t, draws.vsd_t, context, null, guidance_scale)
            return schedule.to_eps(output, x_t, draws.vsd_t)

        # One program run twice: where the LoRA is 0 and w the same, so is every bit of the results.
        lora_scales = jnp.asarray(options.lora_scale, jnp.float32) * jnp.array([0.0, 1.0])
        guidance_scales = jnp.stack([jnp.asarray(w, jnp.float32) for w in options.guidance_scales])
        eps_teacher, eps_lora = jax.lax.map(guided, (lora_scales, guidance_scales))
        return losses.vsd_gradient(eps_teacher, eps_lora, sigma)

    def clip_term(
        x0: Array, state: TrainState, frozen: Frozen, input_ids: Array
    ) -> tuple[Array | float, Metrics]:
        if options.clip_tau == 0 or text_image is None:
            return 0.0, {}
        taesd, clip = gather((frozen.taesd, frozen.clip), unet.dtype)
        loss = text_image.loss(taesd, clip, x0, input_ids, options.clip_tau)
        weight = options.clip_weight * jnp.maximum(1.0 - state.step / options.clip_iterations, 0.0)
        return weight * loss, {"loss/clip": loss, "clip/weight": weight}

    def update_student(
        state: TrainState,
        frozen: Frozen,
        draws: Draws,
        input_ids: Array,
        context: Array,
        null: Array,
    ) -> tuple[TrainState, Array, Metrics, Mapping]:
        kl_weight = options.kl_weight(len(input_ids)) * options.accumulate  # of a part's sum

        def loss(params: Mapping, part: tuple) -> tuple[Array, tuple[Array, Metrics]]:
            draws, input_ids, context, null = part
            x0, eps = student(params, draws, context)
            fixed = jax.lax.stop_gradient(x0)
            gradient = score_gradient(fixed, draws, state, frozen, context, null)
            vsd = losses.vsd_loss(x0, gradient)
            kl = kl_weight * losses.kl_loss(eps)
            clip, clip_terms = clip_term(x0, state, frozen, input_ids)
            total = vsd + kl + clip
            terms = clip_terms | {
                "loss/student": total,
                "loss/vsd": vsd,
                "loss/kl": kl,
                # Of g as it is, so that a NaN is seen; its root is taken below.
                "vsd/gradient_rms": losses.mean_square(gradient),
            }
            return total, (x0, terms)

        batch = replace(draws, null_uniform=None), input_ids, context, null
        grads, x0, metrics = mean_gradient(loss, state.student, batch, options.accumulate)
        updates, opt = student_optimizer.update(grads, state.student_opt, state.student)
        params: Any = optax.apply_updates(state.student, updates)
        decay = ema_decay(options.student_updates(state.step + 1), options.ema_max_decay)
        metrics |= {
            "vsd/gradient_rms": jnp.sqrt(metrics["vsd/gradient_rms"]),
            "latents/std": jnp.std(x0),
            "grad_norm/student": optax.tree.norm(grads),
            "update_norm/student": optax.tree.norm(updates),
            "ema/decay": decay,
        }
        ema = update_ema(state.ema, params, decay)
        state = replace(state, student=params, ema=ema, student_opt=opt)
        return state, jax.lax.stop_gradient(x0), metrics, grads if with_gradients else {}

    def update_lora(
        state: TrainState, frozen: Frozen, draws: Draws, x0: Array, context: Array, null: Array
    ) -> tuple[TrainState, Metrics, Mapping]:
        assert draws.null_uniform is not None
        context = jnp.where(draws.null_uniform < options.null_prompt_prob, null, context)
        x_t = schedule.add_noise(x0, draws.lora_noise, draws.lora_t)
        alpha, _ = schedule.coefficients(draws.lora_t, x0.ndim)

        def loss(lora: Mapping, part: tuple) -> tuple[Array, tuple[None, Metrics]]:
            x_t, t, noise, alpha, context = part
            teacher, lora = gather((frozen.teacher, lora), unet.dtype)
            params = merge_lora(teacher, lora, options.lora_scale)
            output = unet.apply({"params": params}, x_t, t, context)
            eps = schedule.to_eps(output.astype(jnp.float32), x_t, t)
            value = losses.lora_loss(eps, noise, alpha)
            return value, (None, {"loss/lora": value})

        batch = x_t, draws.lora_t, draws.lora_noise, alpha, context
        grads, _, metrics = mean_gradient(loss, state.lora, batch, options.accumulate)
        updates, opt = lora_optimizer.update(grads, state.lora_opt, state.lora)
        metrics |= {
            "grad_norm/lora": optax.tree.norm(grads),
            "update_norm/lora": optax.tree.norm(updates),
        }
        lora: Any = optax.apply_updates(state.lora, updates)
        return replace(state, lora=lora, lora_opt=opt), metrics, grads

    def step(
        state: TrainState,
        frozen: Frozen,
        input_ids: Int[Array, "b n"],
        key: PRNGKeyArray,
        draws: Draws | None = None,
    ) -> Any:
        if draws is None:
            draws = sample_draws(
                key,
                state.step,
                len(input_ids),
                latent_shape,
                vsd_t_range=(options.vsd_t_min, options.vsd_t_max),
                num_train_timesteps=schedule.num_train_timesteps,
            )
        draws = replace(spread(replace(draws, null_uniform=None)), null_uniform=draws.null_uniform)
        context, null = encode_prompts(text_encoder, frozen, input_ids)
        metrics: Metrics = {}
        student_grads: Mapping = {}
        if lora_only:
            batch = replace(draws, null_uniform=None), context
            draw = partial(student, state.student)
            new, x0 = state, in_parts(lambda part: draw(*part)[0], batch, options.accumulate)
        else:
            new, x0, metrics, student_grads = update_student(
                state, frozen, draws, input_ids, context, null
            )
        new, lora_metrics, lora_grads = update_lora(new, frozen, draws, x0, context, null)
        new = replace(new, step=state.step + 1)
        metrics = metrics | lora_metrics
        if with_gradients:
            return new, metrics, {"student": student_grads, "lora": lora_grads}
        return new, metrics

    return step


def mean_gradient(
    loss: Callable[[Any, Any], tuple[Array, tuple[Any, Metrics]]],
    params: Mapping,
    batch: Any,
    parts: int,
) -> tuple[Mapping, Any, Metrics]:
    """The gradient of a batch's mean loss, of the batch as a whole or of parts in turn.

    Args:
        loss: (params, examples) -> (mean over the examples, (results of each, means over them)).
        batch: a tree of arrays [b ...].
        parts: how many; b divides by it.
    Returns:
        The gradient, each example's results in the batch's order, and the means.
    """
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        grads, (each, means) = gradient(params, batch)
        return grads, each, means

    def add(total: Mapping, part: Any) -> tuple[Mapping, Any]:
        grads, results = gradient(params, part)
        return jax.tree.map(jnp.add, total, grads), results

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, (each, means) = jax.lax.scan(add, zeros, split_batch(batch, parts))
    grads = jax.tree.map(lambda g: g / parts, total)
    return grads, join_batch(each), jax.tree.map(lambda x: jnp.mean(x, 0), means)


def in_parts(compute: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """What `compute` makes of each example, of the batch as a whole or of parts in turn."""
    if parts == 1:
        return compute(batch)
    return join_batch(jax.lax.map(compute, split_batch(batch, parts)))


def split_batch(batch: Any, parts: int) -> Any:
    """Arrays [b ...] as [parts b/parts ...]; every part takes every parts-th example.

    So each part of a batch that is split over devices is on all of them.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def join_batch(parts: Any) -> Any:
    """The inverse of `split_batch`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def encode_prompts(
    text_encoder: CLIPTextEncoder, frozen: Frozen, input_ids: Int[Array, "b n"]
) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
    """The context of every prompt, and of the null prompt repeated; fp32, no gradient."""
    params = gather(frozen.text_encoder, text_encoder.dtype)

    def encode(ids: Array) -> Array:
        context = text_encoder.apply({"params": params}, ids)
        return jax.lax.stop_gradient(context.astype(jnp.float32))

    context = encode(input_ids)
    return context, jnp.broadcast_to(encode(frozen.null_ids[None]), context.shape)
