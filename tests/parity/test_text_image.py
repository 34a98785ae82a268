"""The CLIP term beside torch: TAESD's decoder, bicubic resizing, both towers, the hinge."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPModel

from tests.parity.auxiliary_cases import image_features, text_features
from tests.parity.cases import assert_parity
from tests.parity.comparison import from_torch, normal, relative_error, to_torch
from tests.pretrained.folders import MODEL
from tiue_jax.diffusion.text_image import TextImage
from tiue_jax.pretrained.auxiliary import LoadedCLIP, LoadedTAESD, load_clip, load_taesd
from tiue_jax.pretrained.tokenizer import Tokenizer

PROMPTS = ["a red cube on the blue table", "rocks"]
LATENTS = normal(2, 8, 8, 4, std=1.5)


@cache
def networks() -> tuple[LoadedTAESD, LoadedCLIP]:
    return load_taesd(MODEL / "taesd"), load_clip(MODEL / "clip")


def ours(tau: float, *, faithful: bool) -> tuple[float, np.ndarray]:
    """The loss, and its gradient by the latents."""
    taesd, clip = networks()
    mean, std = (None, None) if faithful else (clip.mean, clip.std)
    term = TextImage(taesd.module, clip.module, clip.size, mean, std)
    ids = jnp.asarray(Tokenizer(MODEL / "tokenizer")(PROMPTS))
    value, gradient = jax.value_and_grad(
        lambda x0: term.loss(taesd.params, clip.params, x0, ids, tau)
    )(jnp.asarray(LATENTS))
    return float(value), np.asarray(gradient)


def theirs(tau: float, *, faithful: bool) -> tuple[float, np.ndarray]:
    taesd: Any = AutoencoderTiny.from_pretrained(MODEL / "taesd", local_files_only=True)
    clip: Any = CLIPModel.from_pretrained(MODEL / "clip", local_files_only=True).eval()
    x0 = to_torch(LATENTS).requires_grad_()
    pixels = ((taesd.decode(x0).sample + 1) / 2).clamp(0, 1)
    pixels = torch.nn.functional.interpolate(
        pixels, size=(224, 224), mode="bicubic", align_corners=False
    )
    if not faithful:
        mean, std = (
            torch.tensor(v).reshape(1, 3, 1, 1) for v in (networks()[1].mean, networks()[1].std)
        )
        pixels = (pixels - mean) / std
    ids = torch.from_numpy(np.asarray(Tokenizer(MODEL / "tokenizer")(PROMPTS)).astype(np.int64))
    text = text_features(clip, ids).detach()
    image = image_features(clip, pixels)
    text, image = (f / f.norm(dim=-1, keepdim=True) for f in (text, image))
    cos = torch.nn.CosineSimilarity(dim=-1, eps=1e-7)(text, image)
    loss = torch.relu(tau - cos.mean())
    loss.backward()
    return float(loss.detach()), from_torch(x0.grad)


@pytest.mark.parametrize("faithful", [True, False])
def test_the_term_and_its_gradient_are_torch_s(faithful: bool) -> None:
    (value, gradient), (expected, slope) = (f(1.0, faithful=faithful) for f in (ours, theirs))
    assert expected > 0.1 and np.abs(slope).max() > 1e-5  # the hinge is open
    assert_parity("CLIP term", abs(value - expected) / expected)
    # torch's bicubic backward rounds positions another way; see tests/diffusion/test_resize.py
    assert_parity("CLIP term's gradient", relative_error(gradient, slope), 1e-4)


def test_a_fit_beyond_tau_costs_nothing() -> None:
    value, gradient = ours(-1.0, faithful=True)
    assert value == 0.0 and not gradient.any()


def test_normalising_the_pixels_matters() -> None:
    assert ours(1.0, faithful=True)[0] != pytest.approx(ours(1.0, faithful=False)[0], rel=1e-3)
