from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from tests.pretrained.folders import MODEL
from tiue_jax.diffusion.schedule import make_schedule
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.jsonfile import Fields, read_object
from tiue_jax.pretrained.scheduler import SCHEDULERS, schedule_from_config, scheduler_config

FILE = Path("model/scheduler/scheduler_config.json")
SD15: dict[str, Any] = read_object(MODEL / "scheduler" / "scheduler_config.json")


def _facts(schedule: Any) -> tuple[Any, ...]:
    return (
        schedule.alphas_cumprod.tolist(),
        schedule.prediction_type,
        schedule.steps_offset,
        schedule.set_alpha_to_one,
        schedule.timestep_spacing,
    )


def test_the_schedule_of_sd15() -> None:
    schedule = schedule_from_config(Fields(SD15, FILE))
    assert _facts(schedule) == _facts(make_schedule())
    assert schedule.timesteps(4).tolist() == [751, 501, 251, 1]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
@pytest.mark.parametrize("name", SCHEDULERS)
def test_defaults_are_those_of_diffusers(name: str) -> None:
    torch_class = getattr(diffusers, name)
    signature = inspect.signature(torch_class.__init__).parameters
    for key, ours in SCHEDULERS[name]._asdict().items():
        if key in signature:
            assert signature[key].default == ours, key
    config = {"_class_name": name} | ({"clip_sample": False} if "clip_sample" in signature else {})
    schedule = schedule_from_config(Fields(config, FILE))
    torch_alphas = torch_class(**{k: v for k, v in config.items() if k != "_class_name"})
    # rtol: their cumulative product is in float32; worst seen 3.6e-7
    theirs = torch_alphas.alphas_cumprod.numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=2e-6)


def test_v_prediction_and_trailing_spacing_are_read() -> None:
    config = SD15 | {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "set_alpha_to_one": True,
    }
    schedule = schedule_from_config(Fields(config, FILE))
    assert _facts(schedule)[1:] == ("v_prediction", 0, True, "trailing")


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": None},
        {"_class_name": ["PNDMScheduler"]},
        {"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True},
        {"_class_name": "DDIMScheduler", "clip_sample": True},
        {"thresholding": True},
        {"trained_betas": [0.1, 0.2]},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_start": 0.1},
        {"beta_end": -1},
        {"prediction_type": "sample"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10**12},
        {"steps_offset": -1},
        {"timestep_spacing": "karras"},
        {"set_alpha_to_one": "no"},
    ],
)
def test_schedules_that_we_do_not_implement_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        schedule_from_config(Fields(SD15 | change, FILE))
    assert error.value.file == str(FILE)
    assert error.value.key in {*change, None}


def test_ddim_clips_where_its_config_is_silent() -> None:
    config = {k: v for k, v in SD15.items() if k != "clip_sample"}
    schedule_from_config(Fields(config, FILE))  # PNDM never does
    with pytest.raises(InputError, match=r"clip_sample.*expected false, found no such key"):
        schedule_from_config(Fields(config | {"_class_name": "DDIMScheduler"}, FILE))


def test_a_config_comes_back_as_it_was_and_a_students_is_ddims() -> None:
    schedule = schedule_from_config(Fields(SD15, FILE))
    assert scheduler_config(schedule, SD15) == SD15
    student = scheduler_config(schedule, SD15, ddim=True)
    assert student["_class_name"] == "DDIMScheduler"
    assert "skip_prk_steps" not in student
    assert _facts(schedule_from_config(Fields(student, FILE))) == _facts(schedule)
    from_nothing = scheduler_config(schedule, {})
    assert _facts(schedule_from_config(Fields(from_nothing, FILE))) == _facts(schedule)


def test_a_schedule_that_the_betas_do_not_give_is_not_written() -> None:
    with pytest.raises(ValueError, match="alphas_cumprod are not those of"):
        scheduler_config(make_schedule("linear"), {})
    config = scheduler_config(
        make_schedule("linear"),
        {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
        },
    )
    assert _facts(schedule_from_config(Fields(config, FILE))) == _facts(make_schedule("linear"))
