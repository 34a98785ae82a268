"""Original one-file models against the same models as folders, and what else people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel

from tests.pretrained.folders import MODEL, WEIGHTS, bits
from tests.pretrained.original import (
    UNET_OF_FOUR_LEVELS,
    make_sd2,
    original_text_encoder,
    original_unet,
    original_vae,
    sd2_tensors,
    training_leftovers,
)
from tiue_jax.io.errors import InputError
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.variants import VARIANTS
from tiue_jax.pretrained import single_file
from tiue_jax.pretrained.folder import StableDiffusion, load_stable_diffusion
from tiue_jax.pretrained.ldm import ldm_form, split_fused
from tiue_jax.pretrained.names import torch_shape
from tiue_jax.pretrained.parameters import param_shapes
from tiue_jax.pretrained.single_file import load_single_file
from tiue_jax.pretrained.weights import TensorEntry, WeightFile

TOKENIZER = MODEL / "tokenizer"
TEXT_SD1 = CLIPTextEncoder(  # of the reference model: 12 channels a head, which no file says
    vocab_size=525, hidden_size=48, intermediate_size=96, num_layers=3, num_heads=4
)


def _tensors(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {part: load_file(folder / name) for part, name in WEIGHTS.items()}


def _sd1() -> dict[str, np.ndarray]:
    parts = _tensors(MODEL)
    unet, vae = original_unet(parts["unet"], UNET_OF_FOUR_LEVELS), original_vae(parts["vae"], 4)
    return {**unet, **vae, **original_text_encoder(parts["text_encoder"]), **training_leftovers()}


def _save(tensors: dict[str, np.ndarray], file: Path) -> Path:
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)
    return file


@pytest.fixture(scope="module")
def sd1_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(_sd1(), tmp_path_factory.mktemp("sd1") / "model.safetensors")


@pytest.fixture(scope="module")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd2(tmp_path_factory.mktemp("sd2") / "folder")


@pytest.fixture(scope="module")
def sd2_file(sd2_folder: Path) -> Path:
    return _save(sd2_tensors(sd2_folder), sd2_folder.parent / "model.safetensors")


@pytest.fixture(scope="module")
def sd2_tokenizer(sd2_folder: Path) -> Path:
    return sd2_folder / "tokenizer"


def _assert_same(found: StableDiffusion, expected: StableDiffusion) -> None:
    assert found.unet == expected.unet
    assert found.vae == expected.vae
    assert found.text_encoder == expected.text_encoder
    assert found.schedule.prediction_type == expected.schedule.prediction_type
    assert np.array_equal(found.schedule.alphas_cumprod, expected.schedule.alphas_cumprod)
    assert bits(found.params) == bits(expected.params)


def test_sd1_is_bit_for_bit_the_folder(sd1_file: Path) -> None:
    found = load_single_file(
        sd1_file, tokenizer=TOKENIZER, text_encoder=TEXT_SD1, param_dtype=None, place=np.asarray
    )
    _assert_same(found, load_stable_diffusion(MODEL, param_dtype=None, place=np.asarray))
    assert (found.latent_size, found.folder) == (64, sd1_file)


def test_sd2_is_bit_for_bit_the_folder(
    sd2_file: Path, sd2_folder: Path, sd2_tokenizer: Path
) -> None:
    found = load_single_file(
        sd2_file, tokenizer=sd2_tokenizer, prediction_type="v_prediction", place=np.asarray
    )
    expected = load_stable_diffusion(sd2_folder, place=np.asarray)
    _assert_same(found, expected)
    assert found.tokenizer.special_ids == expected.tokenizer.special_ids == (523, 524, 0)
    assert found.latent_size == expected.latent_size == 96


def test_the_tables_of_these_tests_are_those_of_diffusers(
    sd1_file: Path, sd2_file: Path, sd2_folder: Path
) -> None:
    """diffusers' own converter finds in our files what its folders hold."""
    for file, folder in ((sd1_file, MODEL), (sd2_file, sd2_folder)):
        stored = {k: torch.from_numpy(v) for k, v in load_file(file).items()}
        parts = _tensors(folder)
        for part, convert in (
            ("unet", theirs.convert_ldm_unet_checkpoint),
            ("vae", theirs.convert_ldm_vae_checkpoint),
        ):
            config = json.loads((folder / part / "config.json").read_text())
            found = convert(dict(stored), config)
            assert found.keys() == parts[part].keys()
            for name, tensor in found.items():
                expected = parts[part][name]
                assert np.array_equal(tensor.numpy().reshape(expected.shape), expected), name
        if file == sd2_file:
            text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
            found = theirs.convert_open_clip_checkpoint(text_encoder, stored)
            found = {k.removeprefix("text_model."): v.numpy() for k, v in found.items()}
            for name, expected in parts["text_encoder"].items():
                assert np.array_equal(found[name.removeprefix("text_model.")], expected), name


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_published_sizes_are_detected(name: str) -> None:
    """The shapes of the full-size networks under their original names tell the networks."""
    whole, openclip = VARIANTS[name], name == "sd21"
    parts = {p: getattr(whole, p) for p in ("unet", "vae", "text_encoder")}
    forms = ldm_form(*parts.values(), openclip)
    entries = {
        forms[part].key(path): TensorEntry("F32", torch_shape(path, shape), 0, 0)
        for part, module in parts.items()
        for path, shape in param_shapes(module).items()
    }
    if openclip:
        entries["cond_stage_model.model.transformer.resblocks.23.ln_1.bias"] = TensorEntry(
            "F32", (1024,), 0, 0
        )
    assert len(split_fused(entries)) == len(entries)
    found = single_file._Contents(WeightFile(Path("model.safetensors"), entries, {}))
    assert single_file._require_model(found) is openclip
    assert single_file._detect_unet(found, openclip) == whole.unet
    assert single_file._detect_vae(found) == whole.vae
    assert single_file._detect_text_encoder(found, openclip) == whole.text_encoder


def _keys(*keys: str) -> dict[str, np.ndarray]:
    return {key: np.zeros((1, 4, 1, 1), np.float32) for key in keys}


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
OTHERS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "SDXL": (_keys(CONV_IN, "conditioner.embedders.0.transformer.x"), "found SDXL$"),
    "SD 3": (_keys("model.diffusion_model.joint_blocks.0.context_block.x"), "found SD 3$"),
    "SD 3 too": (_keys("model.diffusion_model.x_embedder.proj.bias"), "found SD 3$"),
    "ControlNet": (_keys(CONV_IN, "control_model.input_hint_block.0.bias"), "found ControlNet$"),
    "FLUX": (_keys("double_blocks.0.img_attn.norm.key_norm.scale"), "found FLUX$"),
    "LoRA": (_keys("lora_unet_mid_block.lora_up.weight"), "found a LoRA"),
    "diffusers": (_keys("conv_in.bias"), "found one network in the diffusers layout"),
    "VAE": (_keys("encoder.conv_in.bias"), "found a VAE"),
    "nothing": (_keys("x"), r"\[model.diffusion_model.input_blocks.0.0.weight\]: not the file of"),
    "inpainting": (
        {CONV_IN: np.zeros((32, 9, 3, 3), np.float32)},
        "its UNet takes 9 channels, as an inpainting model does, expected 4",
    ),
    "no size": ({CONV_IN: np.zeros((0, 4, 3, 3), np.float32)}, "shape is not that of"),
    "no text": (_keys(CONV_IN), "no text encoder, expected cond_stage_model.transformer.[*] or "),
    "two texts": (
        _keys(CONV_IN, "cond_stage_model.model.x", "cond_stage_model.transformer.x"),
        "two text encoders",
    ),
    "more": (
        _keys(CONV_IN, "cond_stage_model.model.x", "safety.b", "safety.a"),
        "2 keys that are in no Stable Diffusion 1.x or 2.x, found safety.a, safety.b",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_called_by_their_name(kind: str, tmp_path: Path) -> None:
    tensors, message = OTHERS[kind]
    file = _save(tensors, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=message) as error:
        load_single_file(file, tokenizer=TOKENIZER)
    assert error.value.file == str(file)


def test_what_the_file_does_not_say_is_asked_for(sd1_file: Path, sd2_file: Path) -> None:
    with pytest.raises(InputError, match=r"\[prediction_type\]: the file of an SD 2.x does not"):
        load_single_file(sd2_file, tokenizer=TOKENIZER)
    with pytest.raises(InputError, match=r"not of a published size.*multiples of 64, found \[48\]"):
        load_single_file(sd1_file, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="prediction_type 'x0': choose from"):
        load_single_file(sd1_file, tokenizer=TOKENIZER, prediction_type="x0")
    with pytest.raises(InputError, match=r"differ, expected 48, found 64"):
        unet = VARIANTS["sd15"].unet.clone(context_dim=64)
        load_single_file(sd1_file, tokenizer=TOKENIZER, unet=unet, text_encoder=TEXT_SD1)
    with pytest.raises(InputError, match=r"\[latent_size\]: .*a multiple of 8, found 60"):
        load_single_file(sd1_file, tokenizer=TOKENIZER, text_encoder=TEXT_SD1, latent_size=60)
    with pytest.raises(InputError, match="expected a file, found a folder"):
        load_single_file(sd1_file.parent, tokenizer=TOKENIZER)
    with pytest.raises(InputError, match="pickle files can run any code"):
        load_single_file(sd1_file.with_suffix(".ckpt"), tokenizer=TOKENIZER)
    with pytest.raises(InputError, match="nowhere"):
        options: dict[str, Any] = {"tokenizer": sd1_file.parent / "nowhere"}
        load_single_file(sd1_file, text_encoder=TEXT_SD1, **options)


def test_the_tokenizer_pads_as_its_text_encoder_was_trained(
    sd1_file: Path, sd2_file: Path, sd2_tokenizer: Path
) -> None:
    with pytest.raises(InputError, match=r"\[--tokenizer\]: .* SD 2.x.*token 0 .*found token 524"):
        load_single_file(sd2_file, tokenizer=TOKENIZER, prediction_type="epsilon")
    with pytest.raises(
        InputError, match=r"\[--tokenizer\]: .* SD 1.x.*token, 524, found token 0"
    ) as error:
        load_single_file(sd1_file, tokenizer=sd2_tokenizer, text_encoder=TEXT_SD1)
    assert error.value.file == str(sd2_tokenizer)


def test_a_vae_of_other_images_than_rgb_is_refused(sd2_file: Path, tmp_path: Path) -> None:
    tensors = load_file(sd2_file)
    key = "first_stage_model.encoder.conv_in.weight"
    gray = _save(tensors | {key: tensors[key][:, :1]}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"encoder.conv_in.weight\]: .*expected 3, found 1"):
        load_single_file(gray, tokenizer=TOKENIZER, prediction_type="epsilon")


def test_faults_name_the_original_key(sd2_file: Path, sd2_tokenizer: Path, tmp_path: Path) -> None:
    tensors = load_file(sd2_file)
    file = tmp_path / "m.safetensors"
    options: dict[str, Any] = {"tokenizer": sd2_tokenizer, "prediction_type": "epsilon"}
    fused = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    part = {"parts": ["text_encoder"]}

    def load(changed: dict[str, Any]) -> None:
        kept = {k: v for k, v in (tensors | changed).items() if v is not None}
        load_single_file(_save(kept, file), **options, **part)

    broken = tensors[fused].copy()
    broken[70, 3] = np.nan
    with pytest.raises(InputError, match=r"in_proj_weight\[k\]\]: 1 of 4096 .* first at \[6, 3\]"):
        load({fused: broken})
    with pytest.raises(InputError, match=r"1 missing \(cond_stage_model.model.ln_final.bias\)"):
        load({"cond_stage_model.model.ln_final.bias": None})
    with pytest.raises(InputError, match=r"resblocks.1.attn.in_proj_weight\[k\], .*1 unexpected"):
        load({fused: broken[:100]})
    with pytest.raises(InputError, match=r"1 unexpected .*in_proj_weight\)"):
        load({f"{fused}[k]": broken[:64]})
