"""Stable Diffusion at full size, random weights: conversion, memory, and torch's numbers.

`pytest -s -m slow tests/full_size` prints what was measured.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from tests.conftest import ROOT
from tests.make_random_sd import KINDS, make_random_sd
from tests.parity.comparison import relative_error
from tiue_jax.diffusion.ddim import closed_form
from tiue_jax.diffusion.images import decode_images
from tiue_jax.diffusion.student import student_forward
from tiue_jax.pretrained.folder import StableDiffusion, load_stable_diffusion
from tiue_jax.pretrained.weights import open_weights

pytestmark = pytest.mark.slow
FP32 = 1e-4  # of the largest value
BF16 = 0.1  # of the largest value: 8 bits of mantissa through some 60 layers
PROMPT = "a photo of a waterfall surrounded by rocks"


@pytest.fixture(scope="module", params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_sd(request.param, tmp_path_factory.mktemp("full") / request.param)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_sd("sd15", tmp_path_factory.mktemp("one") / "sd15")


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Nothing stays from test to test: three of these models do not fit."""
    yield
    jax.clear_caches()
    gc.collect()


def command(module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-m", module, *flags], env=env, capture_output=True, text=True, check=False
    )


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().float().numpy(), 1, -1)


def load(folder: Path, part: str, dtype: str = "float32") -> StableDiffusion:
    return load_stable_diffusion(folder, dtype=dtype, param_dtype=dtype, parts=(part,))


def test_conversion_and_back_is_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    flax, back = tmp_path / "flax", tmp_path / "back"
    for source, target in ((folder, flax), (flax, back)):
        began = time.monotonic()
        done = command("tiue_jax.convert", f"--input={source}", f"--output={target}")
        assert done.returncode == 0, done.stderr
        print(f"{folder.name}: {done.stdout.strip()}: {time.monotonic() - began:.0f} s")
    for file in sorted(folder.rglob("*.safetensors")):
        ours, theirs = open_weights(back / file.relative_to(folder)), open_weights(file)
        assert ours.shapes == theirs.shapes
        for name in theirs.shapes:
            assert np.array_equal(ours.read(name), theirs.read(name)), name


PEAK = """
import json, re, sys, time
import numpy as np, jax
from tiue_jax.pretrained.folder import load_stable_diffusion
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
jax.device_put(np.zeros(8)).block_until_ready()
before, began = peak(), time.monotonic()
sd = load_stable_diffusion(sys.argv[1], param_dtype=sys.argv[2])
seconds = time.monotonic() - began
size = sum(x.nbytes for x in jax.tree.leaves(sd.params))
print(json.dumps({"size": size, "peak": peak() - before, "seconds": seconds}))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_streams(sd15: Path, dtype: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(sd15), dtype],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    share = told["peak"] / told["size"]
    print(f"{dtype}: {told['size'] / 1e9:.2f} GB of parameters, peak {share:.2f} times that, "
          f"{told['seconds']:.0f} s")  # fmt: skip
    assert 0.9 < share <= 1.2  # below, it would not have been measured


def test_unet(folder: Path) -> None:
    rng, width = np.random.default_rng(0), KINDS[folder.name]["unet"]["cross_attention_dim"]
    x = rng.standard_normal((1, 32, 32, 4), np.float32)
    context = rng.standard_normal((1, 77, width), np.float32)
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        out = nhwc(theirs(nchw(x), torch.tensor([501]), torch.from_numpy(context)).sample)
    del theirs
    for dtype, bound in (("float32", FP32), ("bfloat16", BF16)):
        sd = load(folder, "unet", dtype)
        run = jax.jit(lambda p, x, t, c, unet=sd.unet: unet.apply({"params": p}, x, t, c))
        ours = run(sd.params["unet"], x, jnp.array([501]), context)
        error = relative_error(np.asarray(ours, np.float32), out)
        print(f"{folder.name} UNet, {dtype}: {error:.1e} of the largest value")
        assert error <= bound
        del sd, run, ours


def test_text_encoder(folder: Path) -> None:
    theirs = CLIPTextModel.from_pretrained(folder / "text_encoder")
    sd = load(folder, "text_encoder")
    ids = sd.tokenizer([PROMPT, ""])
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids.astype(np.int64))).last_hidden_state.numpy()
    for dtype, bound in (("float32", FP32), ("bfloat16", BF16)):
        sd = load(folder, "text_encoder", dtype)
        ours = jax.jit(lambda p, i, net=sd.text_encoder: net.apply({"params": p}, i))(
            sd.params["text_encoder"], ids
        )
        error = relative_error(np.asarray(ours, np.float32), out)
        print(f"{folder.name} text encoder, {dtype}: {error:.1e} of the largest value")
        assert error <= bound


def test_vae_decoder(sd15: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 64, 64, 4), np.float32)
    theirs = AutoencoderKL.from_pretrained(sd15 / "vae")
    with torch.no_grad():
        out = nhwc(theirs.decode(nchw(x)).sample)
    del theirs
    for dtype, bound in (("float32", FP32), ("bfloat16", BF16)):
        sd = load(sd15, "vae", dtype)
        run = jax.jit(lambda p, x, vae=sd.vae: vae.apply({"params": p}, x, method="decode"))
        error = relative_error(np.asarray(run(sd.params["vae"], x), np.float32), out)
        print(f"VAE decoder, {dtype}: {error:.1e} of the largest value")
        assert error <= bound


def test_one_pass_makes_torch_s_image(sd15: Path) -> None:
    """The encoder once at 751, the decoder at 751, 501, 251 and 1; diffusers' modules and DDIM."""
    noise = np.random.default_rng(1).standard_normal((1, 64, 64, 4), np.float32)
    sd = load_stable_diffusion(sd15)
    ids = sd.tokenizer([PROMPT])
    timesteps = sd.schedule.timesteps(4)
    S, E = closed_form(sd.schedule, timesteps)

    @jax.jit
    def image(params, ids, noise):
        context = sd.text_encoder.apply({"params": params["text_encoder"]}, ids)
        x0, _ = student_forward(
            sd.unet, params["unet"], noise, context, timesteps, timesteps[0], S, E
        )
        return decode_images(sd.vae, params["vae"], x0)

    ours = np.asarray(image(sd.params, ids, noise))[0].astype(int)
    del sd, image
    jax.clear_caches()
    gc.collect()
    expected = torch_one_pass(sd15, ids, noise)
    error = np.abs(ours - expected)
    print(f"one pass: {error.max()}/255 apart at most, {(error > 0).mean():.1e} of the bytes")
    assert error.max() <= 1
    assert expected.std() > 1  # there is a picture to compare


def torch_one_pass(folder: Path, ids: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """What diffusers' modules make of it, put together as the paper says; uint8 as int [h, w, 3].

    The encoder's outputs are caught at its blocks; for the other timesteps the blocks return them.
    """
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        context = text_encoder(torch.from_numpy(ids.astype(np.int64))).last_hidden_state
        shared: dict[torch.nn.Module, object] = {}
        for block in (unet.conv_in, *unet.down_blocks, unet.mid_block):
            block.forward = once(block, block.forward, shared)
        z = latents = nchw(noise)
        for t in scheduler.timesteps:
            latents = scheduler.step(unet(z, t, context).sample, t, latents).prev_sample
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        pixels = vae.decode(latents / vae.config.scaling_factor).sample
    return (
        (pixels[0] * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy().astype(int)
    )


def once(block: torch.nn.Module, forward, shared: dict):
    """`forward`, computed the first time and remembered."""

    def remembered(*arguments, **named):
        if block not in shared:
            shared[block] = forward(*arguments, **named)
        return shared[block]

    return remembered
