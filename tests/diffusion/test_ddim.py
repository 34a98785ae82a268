"""DDIM: the closed form, and trajectories equal to diffusers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from tiue_jax.diffusion.ddim import (
    closed_form,
    ddim_loop,
    ddim_sample,
    ddim_step,
    guided_output,
    step_coefficients,
)
from tiue_jax.diffusion.schedule import TIMESTEP_SPACINGS, make_schedule
from tiue_jax.models.unet import UNet

TABLE = {
    2: ([501, 1], 1.9061, [-1.5817, -0.0121]),
    4: ([751, 501, 251, 1], 4.2346, [-2.4919, -0.9249, -0.6568, -0.0121]),
    8: (
        [876, 751, 626, 501, 376, 251, 126, 1],
        7.4362,
        [-3.2538, -1.6051, -0.8869, -0.5474, -0.3775, -0.2961, -0.3607, -0.0121],
    ),
}


@pytest.mark.parametrize("num_steps", TABLE)
def test_closed_form_of_stable_diffusion(num_steps: int) -> None:
    timesteps, S, E = TABLE[num_steps]
    schedule = make_schedule()
    assert schedule.timesteps(num_steps).tolist() == timesteps
    found = closed_form(schedule, schedule.timesteps(num_steps))
    assert found[0] == pytest.approx(S, abs=5.1e-5)  # the table has four decimals
    np.testing.assert_allclose(found[1], E, atol=5.1e-5)


def test_one_step_from_the_noise_end_is_the_usual_one_step_student() -> None:
    """x0 = (z - sigma eps) / alpha at t = 999, where the last step goes to a clean image."""
    schedule = make_schedule(set_alpha_to_one=True)
    S, E = closed_form(schedule, schedule.timesteps(1, "trailing"))
    alpha, sigma = schedule.alpha_sigma(np.array([999]))
    assert pytest.approx(1 / alpha[0], rel=1e-12) == S
    assert E[0] == pytest.approx(-sigma[0] / alpha[0], rel=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timesteps", [[501, 1], [999, 749, 499, 249], [900, 650, 13], [7]])
def test_closed_form_is_stepping(prediction_type: str, timesteps: list[int]) -> None:
    schedule = make_schedule(prediction_type=prediction_type)
    rng = np.random.default_rng(0)
    z, outputs = rng.normal(size=(2, 3)), rng.normal(size=(len(timesteps), 2, 3))
    x = z
    for c, d, output in zip(
        *step_coefficients(schedule, np.array(timesteps)), outputs, strict=True
    ):
        x = c * x + d * output
    S, E = closed_form(schedule, np.array(timesteps))
    # float64 throughout; worst seen 2e-15.
    np.testing.assert_allclose(S * z + np.tensordot(E, outputs, 1), x, rtol=1e-12, atol=1e-12)


def stand_in(x, t, sin, cos):
    """A smooth function of latents and timestep, the same in jax and torch."""
    return 0.5 * sin(x * 1.3 + t * 0.01) + 0.3 * x * cos(t * 0.002)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [1, 4, 25, 50])
def test_trajectory_is_that_of_diffusers(
    spacing: str, prediction_type: str, num_steps: int
) -> None:
    noise = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    schedule = make_schedule(timestep_spacing=spacing, prediction_type=prediction_type)

    def predict(x, t):
        return stand_in(x, t.reshape(-1, 1, 1, 1).astype(jnp.float32), jnp.sin, jnp.cos)

    ours = ddim_loop(predict, schedule, jnp.asarray(noise), schedule.timesteps(num_steps))

    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
    )
    theirs.set_timesteps(num_steps)
    x = torch.tensor(noise, dtype=torch.float64)  # the exact trajectory but for their alphas
    for t in theirs.timesteps:
        output = stand_in(x, float(t) * torch.ones(()).double(), torch.sin, torch.cos)
        x = theirs.step(output, t, x).prev_sample
    # fp32 steps, in units of the largest value; worst seen 1.8e-6.
    np.testing.assert_allclose(ours, x.numpy(), atol=1e-5 * float(x.abs().max()))


def test_step() -> None:
    schedule = make_schedule()
    (c,), (d,) = step_coefficients(schedule, np.array([500]))
    alpha, sigma = schedule.alpha_sigma(np.array([500, -1]))
    x, eps = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])
    x0 = (x - sigma[0] * eps) / alpha[0]
    expected = alpha[1] * x0 + sigma[1] * eps
    np.testing.assert_allclose(ddim_step(x, eps, c, d), expected, rtol=1e-6)  # fp32 rounding


class StandIn(UNet):
    """A UNet of one parameter: w times the mean of the context, plus a little of the latents."""

    def setup(self) -> None:
        """One parameter."""
        self.w = self.param("w", lambda key: jnp.ones(()))

    def __call__(self, x, t, context):
        mean = context.mean(axis=(1, 2)).reshape(-1, 1, 1, 1)
        return self.w * mean + 0.1 * x + 1e-4 * t.reshape(-1, 1, 1, 1)


def test_guidance_pairs_every_example_with_its_own_prompt() -> None:
    rng = np.random.default_rng(0)
    x, context = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(3, 2, 2, 4), (3, 5, 6)])
    null, t = jnp.zeros_like(context), jnp.array([1, 500, 999])
    unet, params = StandIn(), {"w": jnp.asarray(2.0)}
    null_eps, eps = (unet.apply({"params": params}, x, t, c) for c in (null, context))
    guided = guided_output(unet, params, x, t, context, null, 4.5)
    np.testing.assert_allclose(guided, null_eps + 4.5 * (eps - null_eps), atol=2e-6)  # fp32


def test_sampling_with_guidance_and_without() -> None:
    """A negative prompt is another null context; w = 1 is the prompt alone."""
    rng = np.random.default_rng(0)
    noise, context = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(2, 2, 2, 4), (2, 5, 6)]
    )
    null = -context
    unet, params, schedule = StandIn(), {"w": jnp.asarray(2.0)}, make_schedule()

    def sample(**options) -> np.ndarray:
        arguments = {"guidance_scale": 1.0, "num_steps": 5} | options
        return np.asarray(ddim_sample(unet, params, schedule, noise, context, null, **arguments))

    plain = sample(guided=False)
    np.testing.assert_allclose(sample(), plain, atol=1e-5)  # fp32 steps; worst seen 2.4e-7
    for scale in (0.0, 3.0):
        assert np.abs(sample(guidance_scale=scale) - plain).max() > 0.1
    expected = ddim_loop(
        lambda x, t: guided_output(unet, params, x, t, context, null, 3.0),
        schedule,
        noise,
        schedule.timesteps(5, "trailing"),
    )
    trailing = sample(guidance_scale=3.0, spacing="trailing")
    np.testing.assert_allclose(trailing, expected, atol=1e-5)  # one jitted, one not


def test_the_loop_is_compiled_once_for_all_steps() -> None:
    """25 steps are one scan: the program is as long as that of 4."""
    noise, schedule = jnp.zeros((1, 2, 2, 4)), make_schedule()

    def program(num_steps: int) -> str:
        loop = jax.jit(
            lambda z: ddim_loop(lambda x, t: x, schedule, z, schedule.timesteps(num_steps))
        )
        return loop.lower(noise).as_text()

    assert len(program(25).splitlines()) == len(program(4).splitlines())
