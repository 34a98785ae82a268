"""Every latents on the way of every sampler are those of diffusers' schedulers, in fp32.

Worst seen, of the largest value: DDIM 1.2e-6, Euler 2.4e-6, LCM 3.6e-7, one step 1.5e-7.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler

from tests.diffusion.trajectories import (
    SHAPE,
    STABLE_DIFFUSION,
    draw,
    inject,
    our_trajectory,
    their_trajectory,
    worst_error,
)
from tiue_jax.diffusion.ddim import ddim_loop
from tiue_jax.diffusion.euler import euler_loop
from tiue_jax.diffusion.lcm import lcm_loop, lcm_timesteps
from tiue_jax.diffusion.one_step import one_step
from tiue_jax.diffusion.schedule import make_schedule

NUM_STEPS = (1, 2, 4, 8, 25)
PREDICTIONS = ("epsilon", "v_prediction")
NOISE = draw(*SHAPE)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "clean_end"), [("leading", False), ("trailing", True)])
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_ddim(num_steps: int, spacing: str, clean_end: bool, prediction_type: str) -> None:
    options: dict[str, Any] = {
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
        "set_alpha_to_one": clean_end,
        "steps_offset": 1,
    }
    theirs = DDIMScheduler(**STABLE_DIFFUSION, **options, clip_sample=False)
    schedule = make_schedule(**options)

    ours = our_trajectory(
        lambda predict: ddim_loop(
            predict, schedule, jnp.asarray(NOISE), schedule.timesteps(num_steps)
        )
    )

    name = f"ddim {spacing} {prediction_type} {num_steps}"
    worst_error(name, ours, their_trajectory(theirs, NOISE, num_steps))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_euler(num_steps: int, spacing: str, prediction_type: str) -> None:
    options: dict[str, Any] = {
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
        "steps_offset": 1,
    }
    theirs = EulerDiscreteScheduler(**STABLE_DIFFUSION, **options)
    schedule = make_schedule(**options)

    ours = our_trajectory(
        lambda predict: euler_loop(predict, schedule, jnp.asarray(NOISE), num_steps)
    )

    name = f"euler {spacing} {prediction_type} {num_steps}"
    worst_error(name, ours, their_trajectory(theirs, NOISE, num_steps))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_lcm(num_steps: int, prediction_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = LCMScheduler(**STABLE_DIFFUSION, prediction_type=prediction_type)
    schedule = make_schedule(prediction_type=prediction_type)
    noises = draw(num_steps - 1, *SHAPE, seed=1)
    timesteps = lcm_timesteps(schedule, num_steps)

    ours = our_trajectory(
        lambda predict: lcm_loop(
            predict, schedule, jnp.asarray(NOISE), timesteps, jnp.asarray(noises)
        )
    )

    left = inject(noises, monkeypatch)
    name = f"lcm {prediction_type} {num_steps}"
    worst_error(name, ours, their_trajectory(theirs, NOISE, num_steps))
    assert next(left, None) is None, "they used all the noise that we did"


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_one_step(prediction_type: str) -> None:
    """The clean image that DDIM's first trailing step predicts, whatever its last step goes to."""
    options = {"prediction_type": prediction_type, "timestep_spacing": "trailing"}
    theirs = DDIMScheduler(**STABLE_DIFFUSION, **options, clip_sample=False, set_alpha_to_one=True)
    schedule = make_schedule(prediction_type=prediction_type, set_alpha_to_one=False)

    ours = our_trajectory(lambda predict: one_step(predict, schedule, jnp.asarray(NOISE)))

    assert ours[0] == [999.0]
    worst_error(f"one step {prediction_type}", ours, their_trajectory(theirs, NOISE, 1))
    np.testing.assert_array_equal(ours[1][0], NOISE)
