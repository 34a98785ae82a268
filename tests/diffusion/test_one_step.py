"""One step from the noise end, by hand, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.stand_in import PARAMS, StandIn, draws
from tiue_jax.diffusion.one_step import one_step, one_step_sample
from tiue_jax.diffusion.schedule import make_schedule

SCHEDULES = {
    prediction_type: make_schedule(prediction_type=prediction_type)
    for prediction_type in ("epsilon", "v_prediction")
}


@pytest.mark.parametrize("prediction_type", SCHEDULES)
def test_by_hand(prediction_type: str) -> None:
    """alpha^2 = 0.00466 at t = 999, whatever the spacing and the end of the schedule."""
    noise, _, _ = draws()
    alpha, sigma = 0.00466**0.5, (1 - 0.00466) ** 0.5
    expected = {
        "epsilon": (noise - sigma * jnp.tanh(noise)) / alpha,
        "v_prediction": alpha * noise - sigma * jnp.tanh(noise),
    }[prediction_type]

    def predict(x, t):
        np.testing.assert_array_equal(t, [999, 999])
        return jnp.tanh(x)

    x0 = one_step(predict, SCHEDULES[prediction_type], noise)
    np.testing.assert_allclose(x0, expected, rtol=2e-4, atol=1e-4)  # 0.00466 has three digits


def test_sampling_looks_at_no_guidance() -> None:
    noise, context, null = draws()
    unet, schedule = StandIn(), SCHEDULES["epsilon"]
    found = one_step_sample(unet, PARAMS, schedule, noise, context, null)
    expected = one_step(lambda x, t: unet.apply({"params": PARAMS}, x, t, context), schedule, noise)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # one jitted, one not
    other = one_step_sample(unet, PARAMS, schedule, noise, context, context, 7.5, 1)
    np.testing.assert_array_equal(other, found)


@pytest.mark.parametrize(("num_steps", "guided"), [(2, False), (0, False), (1, True)])
def test_more_than_one_unguided_step_is_refused(num_steps: int, guided: bool) -> None:
    noise, context, null = draws()
    arguments = (StandIn(), PARAMS, SCHEDULES["epsilon"], noise, context, null, 3.0, num_steps)
    with pytest.raises(ValueError, match=f"num_steps {num_steps}, guided {guided}"):
        one_step_sample(*arguments, guided=guided)
