"""Which method a folder says it is for, and what the others are asked by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.pretrained.folders import MODEL, copy_model, edit_json
from tiue_jax.diffusion.ddim import ddim_sample
from tiue_jax.diffusion.euler import euler_sample
from tiue_jax.diffusion.images import decode_images
from tiue_jax.diffusion.lcm import lcm_sample
from tiue_jax.diffusion.one_step import one_step_sample
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.auxiliary import load_taesd
from tiue_jax.pretrained.folder import StudentOptions, load_stable_diffusion
from tiue_jax.pretrained.load import load_model
from tiue_jax.pretrained.methods import METHODS, choose_method, default_guidance, original_steps
from tiue_jax.pretrained.pipeline import Pipeline, load_pipeline, seed_noise, seed_step_noises

PROMPTS, SEEDS = ["a red cube on the blue table", "rocks"], [4, 5]
_SCHEDULER = "scheduler/scheduler_config.json"


def _tiue(folder: Path) -> None:
    (folder / "tiue.json").write_text(
        '{"method": "tiue", "num_steps": 4, "timestep_spacing": "leading"}'
    )


def _lcm(folder: Path) -> None:
    edit_json(folder / _SCHEDULER, _class_name="LCMScheduler", clip_sample=False)


def _turbo(folder: Path) -> None:
    edit_json(
        folder / _SCHEDULER, _class_name="EulerDiscreteScheduler", timestep_spacing="trailing"
    )


@pytest.mark.parametrize(
    ("change", "expected"), [(_tiue, "tiue"), (_lcm, "lcm"), (_turbo, "turbo")]
)
def test_what_a_folder_says(tmp_path: Path, change: Callable, expected: str) -> None:
    folder = copy_model(tmp_path / "model")
    change(folder)
    model = load_stable_diffusion(folder, parts=())
    assert choose_method(model) == expected
    assert choose_method(model, "teacher") == "teacher"


def test_a_unet_that_takes_the_guidance_is_an_lcm_and_nothing_else() -> None:
    model = load_stable_diffusion(MODEL, parts=())
    assert default_guidance(model, "lcm") == 1.0
    lcm = replace(model, unet=model.unet.clone(time_cond_dim=32))
    assert choose_method(lcm) == "lcm"
    assert default_guidance(lcm, "lcm") == 8.0
    with pytest.raises(ValueError, match=r"'tiue': this UNet takes the guidance scale"):
        choose_method(lcm, "tiue")


def test_the_folders_of_diffusers_lcm_pipeline_are_read(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    edit_json(folder / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    edit_json(
        folder / _SCHEDULER,
        _class_name="LCMScheduler", clip_sample=False, original_inference_steps=40,
    )  # fmt: skip
    model = load_stable_diffusion(folder, parts=())
    assert (choose_method(model), original_steps(model)) == ("lcm", 40)
    edit_json(folder / _SCHEDULER, original_inference_steps="many")
    with pytest.raises(ValueError, match="original_inference_steps 'many'"):
        original_steps(load_stable_diffusion(folder, parts=()))
    edit_json(folder / _SCHEDULER, original_inference_steps=50, timestep_scaling=8.0)
    with pytest.raises(ValueError, match=r"timestep_scaling 8\.0 .*: expected 10\.0"):
        original_steps(load_stable_diffusion(folder, parts=()))


@pytest.mark.parametrize("scale", ["nan", "inf", "much"])
def test_a_lora_scale_that_is_none_is_refused(scale: str) -> None:
    with pytest.raises(InputError, match=r"\[--lora\]: not a scale, expected FILE:0.8, found"):
        load_model(MODEL, parts=(), loras=(f"file.safetensors:{scale}",))


def test_a_folder_that_does_not_say_has_to_be_told() -> None:
    model = load_stable_diffusion(MODEL, parts=())
    with pytest.raises(ValueError, match="the folder does not say how it makes images"):
        choose_method(model)
    with pytest.raises(ValueError, match=r"method 'ddim': choose from"):
        choose_method(model, "ddim")
    assert choose_method(replace(model, student=StudentOptions())) == "tiue"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load_pipeline(MODEL)


@pytest.mark.parametrize(
    ("method", "sampler", "options", "told"),
    [
        ("one-step", one_step_sample, {"num_steps": 1}, {}),
        pytest.param(
            "turbo",
            euler_sample,
            {"num_steps": 2, "spacing": "trailing"},
            {"num_steps": 2},
            marks=pytest.mark.slow,
        ),
        ("lcm", lcm_sample, {"num_steps": 2, "guided": False}, {"num_steps": 2}),
        pytest.param(
            "teacher",
            ddim_sample,
            {"num_steps": 2, "guidance_scale": 3.0},
            {"num_steps": 2, "guidance_scale": 3.0},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_method_is_its_sampler(
    pipeline: Pipeline, method: str, sampler: Callable, options: dict, told: dict
) -> None:
    model = pipeline.model
    seeds = np.asarray(SEEDS, np.uint32)
    noise = seed_noise(seeds, (16, 16, 4))
    context = pipeline.encode(model.tokenizer(PROMPTS))
    null = jnp.broadcast_to(pipeline.encode(model.tokenizer([""])), context.shape)
    if method == "lcm":
        options = options | {"noises": seed_step_noises(seeds, 2, (16, 16, 4))}
    options = {"guidance_scale": 1.0} | options
    x0 = sampler(model.unet, model.params["unet"], model.schedule, noise, context, null, **options)
    expected = np.asarray(decode_images(model.vae, model.params["vae"], x0)).astype(int)
    found = pipeline.sample(PROMPTS, SEEDS, method=method, **told).astype(int)
    # Another batch size is another order of summation: a byte may be cut to the one below.
    assert np.abs(found - expected).max() <= 1
    alone = pipeline.sample(PROMPTS[1:], SEEDS[1:], method=method, **told).astype(int)
    assert np.abs(alone - found[1:]).max() <= 1


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("tiue", {"guidance_scale": 2.0}, "guidance_scale 2.0: method tiue has no guidance"),
        ("one-step", {"num_steps": 2}, "num_steps 2"),
        ("lcm", {"num_steps": 51}, "num_steps 51: choose 1..50"),
        ("turbo", {"negative_prompt": "rain"}, "negative_prompt: method turbo without guidance"),
        ("lcm", {"timestep_spacing": "leading"}, "timestep_spacing: method lcm has timesteps"),
    ],
)
def test_settings_that_a_method_has_no_use_for(
    pipeline: Pipeline, method: str, options: dict, said: str
) -> None:
    assert method in METHODS
    with pytest.raises(ValueError, match=said):
        pipeline.sample(PROMPTS, SEEDS, method=method, **options)


def test_taesd_decodes_in_place_of_the_vae(pipeline: Pipeline) -> None:
    small = replace(pipeline, taesd=load_taesd(MODEL / "taesd"))
    x0 = seed_noise(np.asarray(SEEDS, np.uint32), (16, 16, 4))
    found = np.asarray(small._decode(x0)[0])
    pixels = small.taesd.module.apply({"params": small.taesd.params}, x0, method="decode")
    assert found.shape == (2, 128, 128, 3)
    expected = np.clip(np.asarray(pixels) * 127.5 + 128, 0, 255)
    assert np.abs(found - expected).max() <= 1
