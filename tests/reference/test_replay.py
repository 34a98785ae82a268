"""The replay passes what it should, fails what it should, and says what is wrong with bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.reference import iterations, made
from tests.reference.iterations import replay_record
from tests.reference.records import read_record
from tests.reference.replay import replay_sampling
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained.folder import StableDiffusion, load_stable_diffusion
from tiue_jax.training import step

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_model(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> StableDiffusion:
    return load_stable_diffusion(folder, parts=("unet", "text_encoder"))


@pytest.fixture(scope="module")
def record(model: StableDiffusion, folder: Path) -> Path:
    return made.write_record(model, folder.with_name("record"))


def test_a_record_of_our_own_passes_and_zero_gradients_are_shown(
    model: StableDiffusion, record: Path, capsys: pytest.CaptureFixture
) -> None:
    assert replay_record(model, record) == 0
    text = capsys.readouterr().out
    assert "PASS" in text and "<-- FAIL" not in text
    # One channel a group behind conv1 of the finer level: its bias moves nothing.
    bias = "down_blocks.0.resnets.0.conv1.bias"
    assert f"{bias}: zero in theory" in text
    assert f"{bias}: 32 of 32 entries have a gradient of rounding noise" in text


def test_a_record_with_a_clip_term_passes_and_another_one_fails(
    model: StableDiffusion, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for part in ("taesd", "clip"):
        shutil.copytree(HERE / "model" / part, folder / part, dirs_exist_ok=True)
    record = made.write_record(model, tmp_path / "record", clip_tau=1.0)
    assert replay_record(model, record) == 0
    assert "loss/clip" in capsys.readouterr().out

    def loss(content: dict, arrays: dict) -> None:
        content["logs"][1]["step_loss_textclip"] *= 1.0002

    assert replay_record(model, made.changed(record, tmp_path / "changed", loss)) == 1


def test_a_clip_record_for_a_model_without_its_networks_is_refused(
    record: Path, tmp_path: Path
) -> None:
    bare = made.write_model(tmp_path / "bare")
    change = _set("clip_tau", 0.35)
    with pytest.raises(InputError, match="taesd: no such folder"):
        replay_record(
            load_stable_diffusion(bare), made.changed(record, tmp_path / "changed", change)
        )


OPTION_CHANGES: dict[str, float | list[int]] = {
    "guidance_scale": 4.4,
    "lambda_kl": 0.11,
    "t_enc": 749,
    "student_lr": 1.05e-4,
    "lora_alpha": 5.2,
    "timesteps": [999, 498],
    "clip_grad_norm": 0.1,  # Adam does not see a factor that all iterations share
    "null_prompt_threshold": 0.01,
    "lora_lr": 2.1e-3,
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("t_enc", "timesteps") else name
        for name in OPTION_CHANGES
    ],
)
def test_another_option_fails(
    model: StableDiffusion, record: Path, tmp_path: Path, name: str
) -> None:
    """As if our step computed with this value in place of the recorded one."""

    def change(content: dict, arrays: dict) -> None:
        content["options"][name] = OPTION_CHANGES[name]

    assert replay_record(model, made.changed(record, tmp_path / "changed", change)) == 1


@pytest.mark.slow
def test_an_average_one_update_off_fails(
    model: StableDiffusion, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = step.ema_decay
    monkeypatch.setattr(step, "ema_decay", lambda updates, limit: right(updates + 1, limit))
    iterations._compiled_step.cache_clear()
    assert replay_record(model, record) == 1
    iterations._compiled_step.cache_clear()


def _scale(key: str, factor: float) -> Callable[[dict, dict], None]:
    def change(content: dict, arrays: dict) -> None:
        arrays[key] *= factor

    return change


def _loss(content: dict, arrays: dict) -> None:
    content["logs"][1]["step_loss_lora"] *= 1.0002


def _norm(content: dict, arrays: dict) -> None:
    content["grad_norms"][0][1] *= 0.9998


def _parameter_norm(content: dict, arrays: dict) -> None:
    arrays.pop("grad/02_student/conv_out.weight")  # held by its norm where it is not stored
    content["per_parameter_grad_norm"][2]["conv_out.weight"] *= 1.01


def _zero(content: dict, arrays: dict) -> None:
    arrays["grad/00_student/down_blocks.0.resnets.0.conv1.bias"] += 1e-2


def _final(content: dict, arrays: dict) -> None:
    key = "conv_in.weight"
    before = arrays[f"student_final/{key}"]
    before += 0.1 * 1e-4 * np.sign(before)  # of a change of one or two learning rates


def _average(content: dict, arrays: dict) -> None:
    for key in [k for k in arrays if k.startswith("ema_final/")]:
        arrays[key] = arrays[key.replace("ema_", "student_")]  # a decay of 0 in the last iteration


def _lora_final(content: dict, arrays: dict) -> None:
    key = next(k for k in arrays if k.startswith("lora_final/") and "lora_B" in k)
    arrays[key] *= 1.05


def _prompt(content: dict, arrays: dict) -> None:
    content["prompts"][4] = "a hippo"


@pytest.mark.parametrize(
    "change",
    [
        _loss,
        _norm,
        _parameter_norm,
        _scale("grad/02_student/conv_in.weight", 1.002),
        _scale(
            "grad/01_lora/mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora_B.default.weight",
            0.998,
        ),
        _zero,
        _final,
        _average,
        _lora_final,
        _prompt,
        _scale("draw/007_randn_like", 1.01),  # in iteration 0 LoRA is the teacher: no gradient
        _scale("draw/006_randn", 1.01),
    ],
)
def test_another_number_fails(
    model: StableDiffusion, record: Path, tmp_path: Path, change: Callable
) -> None:
    assert replay_record(model, made.changed(record, tmp_path / "changed", change)) == 1


def _set(key: str, value: object) -> Callable[[dict, dict], None]:
    def change(content: dict, arrays: dict) -> None:
        content["options"][key] = value

    return change


def _clip_weight(content: dict, arrays: dict) -> None:
    content["options"] |= {"clip_tau": 0.35, "clip_weight": "constant"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_clip_weight, r"\[options.clip_weight\]: not understood, found constant"),
        (_set("precision", "bfloat16"), r"\[options.precision\]: not supported"),
        (_set("optimizer", "SGD"), r"\[options.optimizer\]: not understood, found SGD"),
        (_set("timesteps", "many"), "malformed"),
        (_set("lora_rank", 2), r"lora_init: .*LoRA matrices are missing, unexpected or misshapen"),
        (_set("lora_targets", ["to_q", "to_x"]), "to_x"),
        (_set("lora_targets", [1]), "1"),
        (lambda content, arrays: content.pop("logs"), r"\[logs\]: missing"),
        (lambda content, arrays: content["prompts"].pop(), r"\[prompts\]: wrong, expected 6"),
        (
            lambda content, arrays: arrays.pop("draw/003_randn_like"),
            r"\[draw/003_randn_like\]: mis",
        ),
    ],
)
def test_a_bad_record_is_refused_in_one_line(
    model: StableDiffusion, record: Path, tmp_path: Path, change: Callable, message: str
) -> None:
    bad = made.changed(record, tmp_path / "changed", change)
    with pytest.raises(InputError) as error:
        replay_record(model, bad)
    assert error.match(message)


def test_files_that_are_none_are_refused(model: StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"record.json: no such file"):
        read_record(tmp_path)
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        read_record(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps({"options": {}}))
    (tmp_path / "train.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="not a readable npz file"):
        read_record(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        replay_sampling(model, tmp_path / "sampling.npz")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give --model and one of --sampling and --record"),
        (["--model=x", "--sampling=y", "--record=z"], "give --model and one of"),
        (["--model", "x", "--record", str(HERE / "absent")], "absent/record.json: no such file"),
    ],
)
def test_the_command_ends_with_2_and_one_line(arguments: list[str], expected: str) -> None:
    run = subprocess.run(
        [sys.executable, str(HERE / "replay.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert run.returncode == 2
    assert expected in run.stderr and run.stderr.count("\n") == 1, run.stderr
