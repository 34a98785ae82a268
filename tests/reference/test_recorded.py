"""Our numbers are the authors': the recorded pass and both recorded trainings, replayed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.reference.iterations import replay_record
from tests.reference.made import changed
from tests.reference.replay import replay_sampling
from tiue_jax.pretrained.folder import StableDiffusion, load_stable_diffusion

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return load_stable_diffusion(HERE / "model")


def test_one_pass(model: StableDiffusion, capsys: pytest.CaptureFixture) -> None:
    assert replay_sampling(model, HERE / "sampling.npz") == 0
    text = capsys.readouterr().out
    for name in ("K2/parallel/latents", "K4/sequential/pixels", "encoder/skip_11", "encoder/mid"):
        assert name in text


@pytest.mark.parametrize("name", ["train", "train_vsd_only"])
def test_training(model: StableDiffusion, name: str, capsys: pytest.CaptureFixture) -> None:
    assert replay_record(model, HERE / name) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^iteration \d", text, re.M)) == 3


def test_where_bounds_are_widened_another_number_fails_still(
    model: StableDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The VSD term alone, of which rounding makes a part: its loss, and a gradient of its own."""

    def change(content: dict, arrays: dict) -> None:
        content["logs"][1]["step_loss_vsd"] *= 1.005
        arrays["grad/02_student/conv_in.weight"] *= 1.05

    record = changed(HERE / "train_vsd_only", tmp_path / "changed", change)
    assert replay_record(model, record) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "<-- FAIL" in line]
    assert len(failed) == 2
    assert "vsd" in failed[0] and "conv_in.weight" in failed[1]


def test_another_number_fails(
    model: StableDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of latents, features and images alike, and by little more than each one's bound."""
    with np.load(HERE / "sampling.npz") as stored:
        arrays = {k: stored[k].copy() for k in stored.files}
    arrays["K4/parallel/latents"] += np.float32(1e-4)  # 2.3e-5 of their root mean square
    arrays["encoder/skip_03"] += np.float32(1e-4)
    arrays["K2/sequential/uint8"] ^= 2  # by 2 of 255, up or down
    np.savez(tmp_path / "sampling.npz", **arrays)
    assert replay_sampling(model, tmp_path / "sampling.npz") == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "<-- FAIL" in line]
    for part in ("K4/parallel/latents", "encoder/skip_03", "K2/sequential/uint8"):
        assert sum(part in line for line in failed) == 1, failed
    assert len(failed) == 3
