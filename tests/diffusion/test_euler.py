"""Euler: its numbers by hand, its kinship with DDIM, and guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.stand_in import PARAMS, StandIn, draws
from tiue_jax.diffusion.ddim import ddim_loop, guided_output
from tiue_jax.diffusion.euler import (
    euler_coefficients,
    euler_loop,
    euler_sample,
    euler_sigmas,
    euler_timesteps,
)
from tiue_jax.diffusion.schedule import make_schedule

SD_TURBO = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]}


@pytest.mark.parametrize("num_steps", SD_TURBO)
def test_timesteps_of_sd_turbo(num_steps: int) -> None:
    schedule = make_schedule(timestep_spacing="trailing")
    assert euler_timesteps(schedule, num_steps).tolist() == SD_TURBO[num_steps]


def test_linspace_is_not_rounded_and_its_sigmas_lie_between() -> None:
    schedule = make_schedule()
    assert euler_timesteps(schedule, 5, "linspace").tolist() == [999, 749.25, 499.5, 249.75, 0]
    known = euler_sigmas(schedule, np.array([999.0, 750.0, 749.0, 0.0]))
    (between, end) = euler_sigmas(schedule, np.array([749.25]))
    assert between == pytest.approx(0.25 * known[1] + 0.75 * known[2], rel=1e-12)
    assert end == known[-1] == 0.0
    # What Stable Diffusion samplers call sigma_max and sigma_min.
    assert known[[0, 3]] == pytest.approx([14.6146, 0.0292], abs=5e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_follows_the_noise(prediction_type: str) -> None:
    """x = x0 + sigma eps goes to x0 + sigma' eps, whichever of eps and v tells eps."""
    schedule = make_schedule(prediction_type=prediction_type)
    sigmas = np.array([3.0, 0.5, 0.0])
    x0, eps = 0.7, -1.2
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    v = alpha * eps - sigmas * alpha * x0
    output = {"epsilon": np.full(3, eps), "v_prediction": v}[prediction_type]
    c, d = euler_coefficients(schedule, sigmas)
    arrived = c * (x0 + sigmas * eps)[:-1] + d * output[:-1]
    np.testing.assert_allclose(arrived, (x0 + sigmas * eps)[1:], rtol=1e-12)  # float64


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_it_is_ddim_that_starts_at_sigma_z_and_ends_clean(prediction_type: str) -> None:
    schedule = make_schedule(
        prediction_type=prediction_type, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    noise, _, _ = draws()

    def predict(x, t):
        return jnp.tanh(x + 1e-3 * t.reshape(-1, 1, 1, 1))

    _, sigma = schedule.alpha_sigma(np.array([999]))
    ddim = ddim_loop(predict, schedule, float(sigma[0]) * noise, schedule.timesteps(4))
    euler = euler_loop(predict, schedule, noise, 4)
    # fp32 steps, in units of the largest value; worst seen 2e-7.
    np.testing.assert_allclose(euler, ddim, atol=2e-6 * float(jnp.abs(ddim).max()))


def test_sampling_is_unguided_unless_asked() -> None:
    noise, context, null = draws()
    unet, schedule = StandIn(), make_schedule(timestep_spacing="trailing")

    def sample(*positional, **options) -> np.ndarray:
        arguments = (unet, PARAMS, schedule, noise, context, null, *positional)
        return np.asarray(euler_sample(*arguments, **options))

    expected = euler_loop(
        lambda x, t: unet.apply({"params": PARAMS}, x, t, context), schedule, noise, 4
    )
    plain = sample(1.0, 4)
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)  # one jitted, one not
    np.testing.assert_array_equal(sample(5.0, 4), plain)
    np.testing.assert_allclose(sample(1.0, 4, guided=True), plain, rtol=1e-5, atol=1e-5)
    expected = euler_loop(
        lambda x, t: guided_output(unet, PARAMS, x, t, context, null, 3.0),
        schedule, noise, 4, "leading",
    )  # fmt: skip
    guided = sample(3.0, 4, guided=True, spacing="leading")
    np.testing.assert_allclose(guided, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(guided - sample(1.0, 4, spacing="leading")).max() > 0.1


def test_wrong_steps_are_refused() -> None:
    schedule = make_schedule()
    for num_steps, spacing in ((0, "linspace"), (1001, "trailing"), (4, "even")):
        with pytest.raises(ValueError, match="choose"):
            euler_timesteps(schedule, num_steps, spacing)
