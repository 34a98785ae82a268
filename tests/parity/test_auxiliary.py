"""The reference TAESD and CLIP, loaded by us and by diffusers and transformers: the same numbers.

Worst seen: TAESD 6.2e-7 (encode), CLIP 5.6e-7 (text).
"""

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPImageProcessor, CLIPModel

from tests.parity.auxiliary_cases import image_features, text_features
from tests.parity.cases import assert_parity
from tests.parity.comparison import from_torch, normal, relative_error, to_torch
from tests.pretrained.folders import MODEL
from tiue_jax.pretrained.auxiliary import load_clip, load_taesd
from tiue_jax.pretrained.tokenizer import Tokenizer

PROMPTS = ["a red cube on the blue table", "the blue sky", ""]


def test_taesd():
    ours, theirs = (
        load_taesd(MODEL / "taesd"),
        AutoencoderTiny.from_pretrained(MODEL / "taesd", local_files_only=True),
    )
    variables = {"params": ours.params}
    latents, pixels = normal(2, 4, 6, 4, std=2.0), normal(2, 32, 48, 3)
    with torch.no_grad():
        decoded = from_torch(theirs.decode(to_torch(latents)).sample)
        encoded = from_torch(theirs.encode(to_torch(pixels)).latents)
    found = ours.module.apply(variables, jnp.asarray(latents), method="decode")
    assert_parity("reference taesd decode", relative_error(found, decoded))
    found = ours.module.apply(variables, jnp.asarray(pixels), method="encode")
    assert_parity("reference taesd encode", relative_error(found, encoded))


def test_clip():
    ours = load_clip(MODEL / "clip")
    theirs = CLIPModel.from_pretrained(MODEL / "clip", local_files_only=True).eval()
    variables = {"params": ours.params}
    input_ids = Tokenizer(MODEL / "tokenizer")(PROMPTS)
    images = np.random.default_rng(0).integers(0, 256, (2, ours.size, ours.size, 3), np.uint8)
    processor = CLIPImageProcessor.from_pretrained(MODEL / "clip", local_files_only=True)
    pixels = (images / 255.0 - np.asarray(ours.mean)) / np.asarray(ours.std)
    with torch.no_grad():
        text = text_features(theirs, torch.from_numpy(np.asarray(input_ids)))
        inputs = processor(list(images), return_tensors="pt")["pixel_values"]
        image = image_features(theirs, inputs)
    np.testing.assert_allclose(pixels, from_torch(inputs), atol=2e-6)  # fp32; worst seen 4e-7
    found = ours.module.apply(variables, jnp.asarray(input_ids), method="encode_text")
    assert_parity("reference clip text", relative_error(found, text.numpy()))
    found = ours.module.apply(variables, jnp.asarray(pixels, jnp.float32), method="encode_image")
    assert_parity("reference clip image", relative_error(found, image.numpy()))
