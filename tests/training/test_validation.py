"""The images of the validation prompts are the student's, in their order, of noise that stays."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.training.tiny_run import make_teacher
from tiue_jax.pretrained.folder import load_stable_diffusion
from tiue_jax.pretrained.pipeline import Pipeline
from tiue_jax.training.options import StepOptions
from tiue_jax.training.sharding import make_mesh
from tiue_jax.training.validation import make_validation

PROMPTS = ("a red cube", "a blue photo", "the green table")
KEY = jax.random.key(3)


def test_images_are_those_of_the_student(tmp_path: Path, monkeypatch) -> None:
    """As the sampling command makes them, of a student with other weights than its teacher."""
    sd = load_stable_diffusion(make_teacher(tmp_path / "teacher"))
    text = jax.tree.map(lambda x: 4 * x, sd.params["text_encoder"])  # so that the prompts matter
    sd = replace(sd, params={**sd.params, "text_encoder": text})
    student = jax.tree.map(lambda x: x * 1.1, sd.params["unet"])

    def noise(seeds: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
        return jnp.stack([jax.random.normal(jax.random.fold_in(KEY, s), shape) for s in seeds])

    changed = replace(sd, params={**sd.params, "unet": student})
    pipeline = Pipeline(changed, batch_size=len(PROMPTS))
    monkeypatch.setattr("tiue_jax.pretrained.pipeline.seed_noise", noise)
    wanted = pipeline.sample(PROMPTS, [0, 1, 2], method="tiue", num_steps=4).astype(int)

    options = StepOptions(num_steps=4, latent_size=4)
    mesh = make_mesh(-1, 1, jax.devices()[:2])  # three images do not divide by two devices
    draw = make_validation(sd, PROMPTS, options, KEY, mesh)
    images = draw(student)
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - wanted).max() <= 1
    assert np.abs(images.astype(int) - draw(sd.params["unet"])).max() > 5
    others = make_validation(sd, PROMPTS[::-1], options, KEY, mesh)(student)
    assert np.abs(images.astype(int) - others).max() > 5


def test_what_is_cut_of_a_prompt_is_said(tmp_path: Path, capsys) -> None:
    sd = load_stable_diffusion(make_teacher(tmp_path / "teacher"))
    long = [f"{color} cube " * 60 for color in ("red", "blue", "green", "red", "purple")]
    options, mesh = StepOptions(num_steps=4, latent_size=4), make_mesh(1, 1, jax.devices()[:1])
    make_validation(sd, [*PROMPTS, *long], options, KEY, mesh)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4  # each of them, and each once
    for line, prompt in zip(told, dict.fromkeys(long), strict=True):
        assert line.startswith("warning: prompt is longer than 77 tokens, cut off: ")
        assert line.endswith(f"of {prompt!r}")
