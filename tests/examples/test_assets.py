"""The embedded teacher and student are whole, small, and as good as the docs say."""

import json
from functools import cache

import pytest

from configs import tiny
from examples.tiny_sd.measure import evaluation_set, measure, model_sampler
from tests.conftest import ROOT
from tiue_jax.training.config import flatten

TEACHER, STUDENT = ROOT / "assets" / "tiny-sd", ROOT / "assets" / "tiny-sd-tiue"
NUM_PROMPTS = 60


@cache
def accuracy(folder, *, teacher: bool, number: int = NUM_PROMPTS) -> dict[str, float]:
    _, requests = evaluation_set(number, 0)
    guidance = 3.0 if teacher else None
    metrics, _ = measure(model_sampler(folder, teacher=teacher, guidance_scale=guidance), requests)
    return metrics


@pytest.mark.parametrize("folder", [TEACHER, STUDENT], ids=lambda f: f.name)
def test_an_embedded_model_takes_20_megabytes_at_most(folder):
    assert 10e6 < sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 20e6


def test_the_teacher_draws_what_captions_say():
    metrics = accuracy(TEACHER, teacher=True)
    # 93.9 % of 1,000: 60 prompts have a deviation of 3 %
    assert metrics["seen/all"] > 0.82
    assert metrics["seen/position"] > 0.9


def test_the_student_is_more_often_right_in_one_pass_than_before():
    before, after = accuracy(TEACHER, teacher=False), accuracy(STUDENT, teacher=False)
    assert after["seen/all"] > before["seen/all"] + 0.15
    # measured with 200 prompts: 90.5 % of 92.5 %, from 50.5 %; see above for how near 60 come
    assert after["seen/all"] > 0.85 * accuracy(TEACHER, teacher=True)["seen/all"]


@pytest.mark.slow
def test_teacher_and_student_keep_what_is_promised():
    """On the 1,000 prompts of README (the few above allow for chance): 93.9 % and 88.8 % there."""
    teacher = accuracy(TEACHER, teacher=True, number=1000)["seen/all"]
    assert teacher >= 0.85
    assert accuracy(STUDENT, teacher=False, number=1000)["seen/all"] >= 0.9 * teacher


def test_the_student_was_distilled_with_the_config_that_is_here():
    run = json.loads((STUDENT / "training.json").read_text())
    assert run["config"] == flatten(tiny.get_config())
    assert run["step"] == run["config"]["train.iterations"]


@pytest.mark.parametrize("part", ["text_encoder/model", "vae/diffusion_pytorch_model"])
def test_the_student_was_distilled_from_the_teacher_that_is_here(part):
    files = [folder / f"{part}.safetensors" for folder in (TEACHER, STUDENT)]
    assert files[0].read_bytes() == files[1].read_bytes()
