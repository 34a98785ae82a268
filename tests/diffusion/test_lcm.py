"""LCM sampling: timesteps, scalings, fresh noise, and the two ways of guidance."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import LCMScheduler

from tests.diffusion.stand_in import PARAMS, StandIn, draws
from tests.diffusion.trajectories import STABLE_DIFFUSION, draw
from tiue_jax.diffusion.ddim import ddim_sample, guided_output
from tiue_jax.diffusion.euler import euler_sample
from tiue_jax.diffusion.lcm import (
    boundary_scalings,
    lcm_coefficients,
    lcm_loop,
    lcm_sample,
    lcm_timesteps,
    step_noises,
)
from tiue_jax.diffusion.one_step import one_step_sample
from tiue_jax.diffusion.schedule import make_schedule

TABLE = {
    1: [999],
    2: [999, 499],
    4: [999, 759, 499, 259],
    8: [999, 879, 759, 639, 499, 379, 259, 139],
}


@pytest.mark.parametrize("num_steps", TABLE)
def test_timesteps_of_lcm(num_steps: int) -> None:
    assert lcm_timesteps(make_schedule(), num_steps).tolist() == TABLE[num_steps]


@pytest.mark.parametrize("original_steps", [50, 30, 1])
def test_timesteps_are_those_of_diffusers(original_steps: int) -> None:
    theirs = LCMScheduler(**STABLE_DIFFUSION, original_inference_steps=original_steps)
    for num_steps in range(1, original_steps + 1):
        theirs.set_timesteps(num_steps)
        ours = lcm_timesteps(make_schedule(), num_steps, original_steps)
        assert ours.tolist() == theirs.timesteps.tolist(), num_steps


@pytest.mark.parametrize(
    ("num_steps", "original_steps", "message"),
    [
        (0, 50, r"num_steps 0: choose 1\.\.50"),
        (51, 50, r"num_steps 51: choose 1\.\.50"),
        (4, 1001, r"original_steps 1001: choose 1\.\.1000"),
        (4, 0, r"original_steps 0: choose 1\.\.1000"),
    ],
)
def test_wrong_steps_are_refused(num_steps: int, original_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lcm_timesteps(make_schedule(), num_steps, original_steps)


def test_boundary_scalings() -> None:
    """By hand at small t, where they matter: f is x itself at t = 0, and x0hat far from it."""
    t = np.array([0, 1, 999])
    c_skip, c_out = boundary_scalings(t)
    np.testing.assert_allclose(c_skip, [1, 0.25 / 100.25, 0.25 / 99800100.25], rtol=1e-12)
    np.testing.assert_allclose(c_out, [0, 10 / 100.25**0.5, 9990 / 99800100.25**0.5], rtol=1e-12)
    theirs = LCMScheduler().get_scalings_for_boundary_condition_discrete(t)
    np.testing.assert_allclose((c_skip, c_out), theirs, rtol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_by_hand(prediction_type: str) -> None:
    """A model that knows x0 gets f = c_out x0 + c_skip x, noised anew; the last is not noised."""
    schedule = make_schedule(prediction_type=prediction_type)
    timesteps = np.array([700, 1])  # at t = 1 c_skip is 0.0025
    alpha, sigma = schedule.alpha_sigma(timesteps)
    x0, eps, n = 0.7, -1.2, 0.4
    x = alpha * x0 + sigma * eps
    output = np.full(2, eps) if prediction_type == "epsilon" else alpha * eps - sigma * x0
    c, d, e = lcm_coefficients(schedule, timesteps)
    c_skip, c_out = boundary_scalings(timesteps)
    f = c_skip * x + c_out * x0
    expected = [alpha[1] * f[0] + sigma[1] * n, f[1]]
    np.testing.assert_allclose(c * x + d * output + e * n, expected, rtol=1e-12)  # float64


def test_noise_of_an_image_is_of_its_own_key_and_new_at_every_step() -> None:
    shape = (8, 8, 4)
    keys = jax.random.split(jax.random.key(0), 3)
    noises = np.asarray(step_noises(keys, 3, shape))
    start = np.asarray(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))
    rows = np.concatenate([noises, start[None]]).reshape(9, -1)
    assert np.abs(np.corrcoef(rows) - np.eye(9)).max() < 0.3  # 256 draws: 0.06 is one sigma
    assert abs(rows.mean()) < 0.08 and abs(rows.std() - 1) < 0.06  # 2304 draws: 0.02 and 0.015
    turned = step_noises(jax.random.split(jax.random.key(0), 3)[::-1], 3, shape)
    np.testing.assert_array_equal(turned, noises[:, ::-1])
    one_step = jax.eval_shape(lambda: step_noises(jax.random.split(jax.random.key(1), 3), 1, shape))
    assert one_step.shape == (0, 3, *shape)


def test_as_many_noises_as_steps_that_use_one() -> None:
    schedule, (noise, _, _) = make_schedule(), draws()
    for count in (1, 3):
        noises = jnp.asarray(draw(count, *noise.shape))
        with pytest.raises(ValueError, match=f"noises: {count}, expected 2: one for every step"):
            lcm_loop(lambda x, t: x, schedule, noise, np.array([999, 499, 19]), noises)
    with pytest.raises(ValueError, match="noises: 0, expected 1"):
        lcm_loop(lambda x, t: x, schedule, noise, np.array([999, 499]))


def sample(unet: StandIn, *positional, noises=None, **options) -> np.ndarray:
    noise, context, null = draws()
    arguments = (unet, PARAMS, make_schedule(), noise, context, null, *positional)
    return np.asarray(lcm_sample(*arguments, noises=noises, **options))


def test_guidance_is_told_to_a_unet_that_takes_it() -> None:
    unet, schedule = StandIn(time_cond_dim=32), make_schedule()
    noise, context, _ = draws()
    noises = jnp.asarray(draw(3, *noise.shape, seed=2))

    def expected(w: float) -> np.ndarray:
        told = jnp.full(2, w, jnp.float32)
        return lcm_loop(
            lambda x, t: unet.apply({"params": PARAMS}, x, t, context, told),
            schedule, noise, lcm_timesteps(schedule, 4), noises,
        )  # fmt: skip

    for w, found in (
        (8.0, sample(unet, 8.0, 4, noises=noises)),
        (3.0, sample(unet, 3.0, 4, noises=noises)),
        (1.0, sample(unet, 8.0, 4, noises=noises, guided=False)),
    ):
        np.testing.assert_allclose(found, expected(w), rtol=1e-5, atol=1e-5)  # one jitted, one not
    assert np.abs(expected(8.0) - expected(3.0)).max() > 0.01


def test_guidance_of_an_ordinary_unet_takes_two_predictions() -> None:
    unet, schedule = StandIn(), make_schedule()
    noise, context, null = draws()
    noises = jnp.asarray(draw(1, *noise.shape, seed=2))
    guided = sample(unet, 2.0, 2, noises=noises)
    expected = lcm_loop(
        lambda x, t: guided_output(unet, PARAMS, x, t, context, null, 2.0),
        schedule, noise, lcm_timesteps(schedule, 2), noises,
    )  # fmt: skip
    np.testing.assert_allclose(guided, expected, rtol=1e-5, atol=1e-5)  # one jitted, one not
    plain = sample(unet, 2.0, 2, noises=noises, guided=False)
    np.testing.assert_allclose(sample(unet, 1.0, 2, noises=noises), plain, rtol=1e-5, atol=1e-5)
    assert np.abs(guided - plain).max() > 0.01


def test_one_step_needs_no_noise_and_more_steps_depend_on_theirs() -> None:
    unet, shape = StandIn(), draws()[0].shape
    assert np.isfinite(sample(unet, 1.0, 1)).all()
    one, other = (sample(unet, 1.0, 2, noises=jnp.asarray(draw(1, *shape, seed=s))) for s in (1, 2))
    assert np.abs(one - other).max() > 0.1
    with pytest.raises(ValueError, match="noises: 0, expected 1"):
        sample(unet, 1.0, 2)


def test_a_table_can_call_every_sampler() -> None:
    """The same eight arguments in the same order, and `guided`; all at one step."""
    noise, context, null = draws()
    schedule = make_schedule(timestep_spacing="trailing")
    first = list(inspect.signature(ddim_sample).parameters)[:8]
    for sampler in (ddim_sample, euler_sample, lcm_sample, one_step_sample):
        assert list(inspect.signature(sampler).parameters)[:8] == first
        x0 = sampler(StandIn(), PARAMS, schedule, noise, context, null, 1.0, 1, guided=False)
        assert x0.shape == noise.shape and x0.dtype == jnp.float32
