from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from tests.pretrained.folders import MODEL
from tiue_jax.diffusion.ddim import closed_form
from tiue_jax.diffusion.student import student_forward, student_timesteps
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.card import model_card, student_card
from tiue_jax.pretrained.folder import (
    StudentOptions,
    load_stable_diffusion,
    save_stable_diffusion,
)

STUDENT = StudentOptions(num_steps=4, timestep_spacing="leading")
HOSTILE = (
    "</script><img src=x onerror=alert(1)> ```\n---\nlicense: mit\n--- *b* [a](javascript:b) "
    "{x} %s & | \u2028 \x1b[2J ' \" \\ `` #"
)


def _blocks(card: str) -> dict[str, str]:
    """Language -> code of every fenced block."""
    return {m[2]: m[3] for m in re.finditer(r"(?ms)^(`{3,})(\w+)\n(.*?)\n\1$", card)}


def test_a_card_is_what_the_hub_reads() -> None:
    card = model_card(
        STUDENT,
        title="tiny-sd-tiue",
        repo_id="owner/tiny-sd-tiue",
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        teacher_license="creativeml-openrail-m",
        config={"student.num_steps": 4, "train.steps": 20000},
        steps=20000,
        prompts=["a red circle", "a blue ring"],
    )
    data = ModelCard(card).data.to_dict()
    assert data["license"] == "creativeml-openrail-m"
    assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert data["pipeline_tag"] == "text-to-image"
    assert data["library_name"] == "tiue_jax"
    assert "arxiv:2505.21960" in data["tags"]
    blocks = _blocks(card)
    command = "python -m tiue_jax.sample --model=owner/tiny-sd-tiue --prompt='a red circle'"
    assert blocks["sh"] == command
    assert '"train.steps": 20000' in blocks["json"]
    assert "trained for 20,000 iterations" in card
    assert "**Do not call it as a `StableDiffusionPipeline`**" in card
    assert "- a blue ring" in card


def test_the_snippet_is_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' modules as the card composes them, beside ours. Worst seen: 4e-7."""
    sd = replace(load_stable_diffusion(MODEL), student=STUDENT)
    save_stable_diffusion(sd, tmp_path / "student")
    code = _blocks(model_card(STUDENT, prompts=["a red cube"]))["python"]
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code.replace('"FOLDER"', '"student"'), found)
    noise = jnp.asarray(found["noise"].numpy().transpose(0, 2, 3, 1))
    timesteps = student_timesteps(sd.schedule, 4, "leading")
    assert found["timesteps"].tolist() == timesteps.tolist()
    S, E = closed_form(sd.schedule, timesteps)
    context = sd.text_encoder.apply(
        {"params": sd.params["text_encoder"]}, jnp.asarray(sd.tokenizer(["a red cube"]))
    )
    x0, _ = student_forward(
        sd.unet, sd.params["unet"], noise, context, timesteps, timesteps[0], S, E
    )
    theirs = found["latents"].numpy().transpose(0, 2, 3, 1)
    worst = np.abs(np.asarray(x0) - theirs).max() / np.abs(theirs).max()
    assert worst < 1e-5
    with Image.open("image.png") as image:
        assert image.size == (128, 128)


def test_no_name_breaks_the_card() -> None:
    config = {"prompt": HOSTILE, HOSTILE: [1]}
    card = model_card(
        STUDENT, title=HOSTILE, base_model=HOSTILE, config=config, prompts=[HOSTILE, "b"]
    )
    data = ModelCard(card).data.to_dict()
    assert data["license"] == "other"
    assert "base_model" not in data
    blocks = _blocks(card)
    assert set(blocks) == {"sh", "python", "json"}
    text = re.sub(r"(?ms)^(`{3,})\w+\n.*?\n\1$", "", card)
    assert "<" not in text and "script&#62;" in text
    assert "```" not in text and "javascript:" not in text and "\x1b" not in text
    assert text.count("\n---") == 1
    found: dict[str, Any] = {}
    line = next(line for line in blocks["python"].splitlines() if line.startswith("PROMPT"))
    exec(line, found)
    assert found["PROMPT"].startswith("</script><img")
    compile(blocks["python"], "card", "exec")
    assert blocks["sh"].count("\n") == 0


def test_what_the_hub_would_not_take_is_refused() -> None:
    for wrong in ("MIT\nx: y", "", "a" * 61, "no spaces"):
        with pytest.raises(InputError, match="not a licence identifier of the hub"):
            model_card(STUDENT, teacher_license=wrong)
    with pytest.raises(InputError, match="not a repository of the hub"):
        model_card(STUDENT, repo_id="a b/c")


def test_a_hostile_training_json_makes_a_card() -> None:
    sd = replace(load_stable_diffusion(MODEL, parts=()), student=STUDENT)
    strange = (
        {"config": {"log.validation_prompts": 5, "teacher": [1]}, "step": "x"},
        {"config": 3},
    )
    for training in (*strange, {"teacher_license": "<b>", "config": {"teacher": ""}}):
        card = student_card(replace(sd, training=training))
        assert card is not None and 'license: "other"' in card
    local = student_card(replace(sd, training={"config": {"teacher": str(MODEL)}}))
    pinned = student_card(replace(sd, training={"config": {"teacher": "owner/name@main"}}))
    assert local is not None and "base_model" not in local
    assert pinned is not None and 'base_model: "owner/name"' in pinned
