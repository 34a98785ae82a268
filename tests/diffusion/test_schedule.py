"""The schedule: exact numbers, and equality with diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import DDIMScheduler

from tiue_jax.diffusion.schedule import (
    BETA_SCHEDULES,
    TIMESTEP_SPACINGS,
    NoiseSchedule,
    make_schedule,
)


def theirs(**changes) -> DDIMScheduler:
    options = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    return DDIMScheduler(**(options | changes))


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_alphas_are_those_of_diffusers(beta_schedule: str) -> None:
    ours = make_schedule(beta_schedule).alphas_cumprod
    reference = theirs(beta_schedule=beta_schedule).alphas_cumprod.double().numpy()
    assert ours.dtype == np.float64
    # diffusers multiplies in float32; worst seen 6.8e-8 absolute, 3.5e-7 relative.
    np.testing.assert_allclose(ours, reference, rtol=1e-6, atol=1e-7)


def test_known_alphas() -> None:
    abar = make_schedule().alphas_cumprod
    assert abar[0] == pytest.approx(0.99915, abs=1e-7)
    assert abar[999] == pytest.approx(0.00466, abs=1e-5)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_timesteps_are_those_of_diffusers_for_every_number_of_steps(spacing: str) -> None:
    """Trailing spacing: diffusers yields one timestep too many for 62 of the 1000, ours never."""
    ours, reference = make_schedule(), theirs(timestep_spacing=spacing)
    for num_steps in range(1, 1000):
        reference.set_timesteps(num_steps)
        expected = reference.timesteps.numpy()[:num_steps]
        np.testing.assert_array_equal(ours.timesteps(num_steps, spacing), expected)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [751, 501, 251, 1]),
        ("trailing", [999, 749, 499, 249]),
        ("linspace", [999, 666, 333, 0]),
    ],
)
def test_four_timesteps(spacing: str, expected: list[int]) -> None:
    schedule = make_schedule(timestep_spacing=spacing)
    timesteps = schedule.timesteps(4)
    assert timesteps.dtype == np.int32
    assert timesteps.tolist() == expected


def test_previous_timesteps() -> None:
    schedule = make_schedule()
    assert schedule.previous_timesteps(np.array([751, 501, 251, 1])).tolist() == [501, 251, 1, -249]
    assert schedule.previous_timesteps(np.array([999, 749, 499, 249])).tolist() == [
        749,
        499,
        249,
        -1,
    ]
    # diffusers' rule, not the next of the list: a folder samples the same in both.
    assert schedule.previous_timesteps(np.array([999, 666, 333, 0])).tolist() == [
        749,
        416,
        83,
        -250,
    ]
    assert schedule.previous_timesteps(np.array([800, 300, 7])).tolist() == [300, 7, -1]


def test_alpha_past_the_end() -> None:
    t = np.array([-1, 0])
    alpha, sigma = make_schedule().alpha_sigma(t)
    assert alpha[0] == alpha[1] and sigma[0] == sigma[1] > 0
    alpha, sigma = make_schedule(set_alpha_to_one=True).alpha_sigma(t)
    assert alpha[0] == 1.0 and sigma[0] == 0.0


def test_add_noise_and_to_eps_invert_each_other() -> None:
    schedule = make_schedule(prediction_type="v_prediction")
    rng = np.random.default_rng(0)
    x0, eps = (jnp.asarray(rng.normal(size=(3, 2, 2, 4)), jnp.float32) for _ in range(2))
    t = jnp.array([0, 500, 999])
    alpha, sigma = schedule.coefficients(t, 4)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    x_t, v = schedule.add_noise(x0, eps, t), alpha * eps - sigma * x0
    # fp32 sums of order-1 numbers; worst seen 2.4e-7.
    np.testing.assert_allclose(schedule.to_eps(v, x_t, t), eps, atol=2e-6)
    assert make_schedule().to_eps(v, x_t, t) is v


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_schedule("cosine"), "choose from"),
        (lambda: make_schedule(prediction_type="sample"), "choose from"),
        (lambda: make_schedule(timestep_spacing="even"), "choose from"),
        (lambda: make_schedule(beta_start=0.02, beta_end=0.01), r"betas 0.02\.\.0.01"),
        (lambda: make_schedule(num_train_timesteps=0), "num_train_timesteps 0"),
        (lambda: NoiseSchedule(np.array([0.5, 0.0])), "expected within"),
        (lambda: make_schedule().timesteps(0), r"choose 1\.\.1000"),
        (lambda: make_schedule().timesteps(1001), r"choose 1\.\.1000"),
        (lambda: make_schedule().timesteps(1000), "take fewer steps"),
        (lambda: make_schedule().timesteps(4, "even"), "choose from"),
    ],
)
def test_what_cannot_be_is_refused_with_the_choices(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
