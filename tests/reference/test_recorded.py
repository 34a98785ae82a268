"""Our numbers are the authors': the recorded pass and both recorded trainings, replayed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.reference.iterations import replay_record
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


@pytest.mark.parametrize(
    ("key", "offset"),
    [("K4/parallel/latents", 1e-3), ("encoder/skip_03", 1e-4), ("K2/sequential/uint8", 2)],
)
@pytest.mark.slow
def test_another_number_fails(
    model: StableDiffusion, tmp_path: Path, key: str, offset: float
) -> None:
    with np.load(HERE / "sampling.npz") as stored:
        arrays = {k: stored[k].copy() for k in stored.files}
    arrays[key] += np.asarray(offset, arrays[key].dtype)
    np.savez(tmp_path / "sampling.npz", **arrays)
    assert replay_sampling(model, tmp_path / "sampling.npz") == 1
