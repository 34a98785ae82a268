"""Folders of TAESD and CLIP: what their configs mean, what is loaded, and what is refused."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny as TorchTiny
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from tests.pretrained.folders import MODEL, bits, edit_json
from tiue_jax.io.errors import InputError
from tiue_jax.models.clip import CLIP, Tower
from tiue_jax.models.taesd import AutoencoderTiny
from tiue_jax.pretrained import configs
from tiue_jax.pretrained.auxiliary import CLIP_MEAN, CLIP_STD, load_clip, load_taesd
from tiue_jax.pretrained.jsonfile import Fields
from tiue_jax.pretrained.names import canonical_name, torch_name, torch_shape
from tiue_jax.pretrained.parameters import param_shapes

FILE = Path("folder/config.json")
WEIGHTS = {"taesd": "diffusion_pytorch_model.safetensors", "clip": "model.safetensors"}
LOAD: dict[str, Callable[..., Any]] = {"taesd": load_taesd, "clip": load_clip}


def _read(part: str) -> dict[str, Any]:
    return json.loads((MODEL / part / "config.json").read_text())


def _clip(config: Mapping[str, Any]) -> CLIP:
    return configs.clip_from_config(Fields(config, FILE))


@pytest.fixture
def folder(tmp_path: Path, part: str) -> Path:
    return shutil.copytree(MODEL / part, tmp_path / part, copy_function=shutil.copyfile)


def _edit(folder: Path, edit: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> None:
    file = folder / WEIGHTS[folder.name]
    save_file(dict(edit(load_file(file))), file, metadata={"format": "pt"})


# --- Configs --------------------------------------------------------------------------------------


def test_the_reference_configs() -> None:
    taesd = configs.taesd_from_config(Fields(_read("taesd"), FILE))
    assert taesd == AutoencoderTiny(encoder_channels=16, decoder_channels=16)
    assert _clip(_read("clip")) == CLIP(
        text=Tower(32, 64, 2, 4),
        vision=Tower(32, 64, 2, 4),
        vocab_size=525,
        projection_dim=24,
        eos_token_id=524,
    )


def _taesd_config(taesd: AutoencoderTiny) -> dict[str, Any]:
    """Return the AutoencoderTiny config of `taesd`."""
    levels = len(taesd.num_encoder_blocks)
    return {
        "_class_name": "AutoencoderTiny",
        **{key: values[0] for key, values in configs._TAESD_ONLY.items()},
        "block_out_channels": [taesd.decoder_channels] * levels,
        "decoder_block_out_channels": [taesd.decoder_channels] * levels,
        "encoder_block_out_channels": [taesd.encoder_channels] * levels,
        "in_channels": taesd.in_channels,
        "latent_channels": taesd.latent_channels,
        "num_decoder_blocks": list(taesd.num_decoder_blocks),
        "num_encoder_blocks": list(taesd.num_encoder_blocks),
        "out_channels": taesd.in_channels,
        "scaling_factor": taesd.scaling_factor,
    }


def test_taesd_survives_its_config_and_its_default_is_diffusers() -> None:
    small = AutoencoderTiny(
        encoder_channels=8, num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1)
    )
    for taesd in (AutoencoderTiny(), small):
        config = _taesd_config(taesd)
        assert configs.taesd_from_config(Fields(config, FILE)) == taesd
        theirs = TorchTiny.from_config(
            {k: v for k, v in config.items() if k != "block_out_channels"}
        )
        ours = {torch_name(p): torch_shape(p, s) for p, s in param_shapes(taesd).items()}
        assert ours == {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert configs.taesd_from_config(Fields({}, FILE)) == AutoencoderTiny()


def test_every_setting_of_taesd_is_known() -> None:
    parameters = inspect.signature(TorchTiny.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    known = configs._TAESD_ONLY.keys() | configs._TAESD_READ
    assert defaults.keys() | {"block_out_channels"} == known
    for name, supported in configs._TAESD_ONLY.items():
        assert supported[0] == defaults[name], name


def test_clip_has_the_defaults_names_and_shapes_of_transformers() -> None:
    """What the nested objects leave out is ViT-B/32, also for the object that is not there."""
    written = {  # the old file of openai/clip-vit-base-patch32, less what is of no consequence
        "architectures": ["CLIPModel"],
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 512,
        "text_config": {"bos_token_id": 0, "eos_token_id": 2, "model_type": "clip_text_model"},
        "text_config_dict": None,
        "vision_config": {"model_type": "clip_vision_model", "top_k": 50},
        "vision_config_dict": None,
    }
    assert _clip(written) == CLIP(eos_token_id=2)
    assert _clip({}) == CLIP()
    with torch.device("meta"):
        state = CLIPModel(CLIPConfig()).state_dict()
    theirs = {k: tuple(v.shape) for k, v in state.items() if canonical_name("clip", k) is not None}
    ours = {torch_name(p): torch_shape(p, s) for p, s in param_shapes(CLIP()).items()}
    assert ours == theirs


def test_the_older_objects_go_before_as_in_transformers() -> None:
    config = {
        "text_config": {"hidden_size": 64, "hidden_act": "gelu"},
        "text_config_dict": {"hidden_size": 128, "eos_token_id": 2},
        "vision_config": {"hidden_size": 96},
        "vision_config_dict": None,
    }
    theirs, ours = CLIPConfig(**json.loads(json.dumps(config))), _clip(config)
    assert ours.text == Tower(128, 2048, 12, 8) and ours.eos_token_id == 2
    assert (theirs.text_config.hidden_size, theirs.text_config.hidden_act) == (128, "quick_gelu")
    assert ours.vision.hidden_size == theirs.vision_config.hidden_size == 96


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "silu"},
        {"upsample_fn": "bilinear"},
        {"upsampling_scaling_factor": 4},
        {"latent_shift": 0.0},
        {"shift_factor": 0.1},
        {"encoder_block_out_channels": [16, 16, 16, 32]},
        {"decoder_block_out_channels": [16, 16, 16]},
        {"num_decoder_blocks": [3, 3, 1]},
        {"num_encoder_blocks": [1, 3, 3, -3]},
        {"num_encoder_blocks": []},
        {"out_channels": 4},
        {"latent_channels": "4"},
        {"scaling_factor": 0},
        {"a_new_setting": "on"},
        {"_class_name": "AutoencoderKL"},
    ],
)
def test_taesds_that_we_do_not_implement_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        configs.taesd_from_config(Fields(_read("taesd") | change, FILE))
    assert error.value.key in (*change, "decoder_block_out_channels")
    assert error.value.file == str(FILE)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "siglip"}, "model_type"),
        ({"architectures": ["CLIPTextModel"]}, "architectures"),
        ({"projection_dim": 0}, "projection_dim"),
        ({"text_config": [1]}, "text_config"),
        ({"vision_config_dict": "no"}, "vision_config_dict"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act"),
        ({"text_config": {"num_attention_heads": 7}}, "text_config.num_attention_heads"),
        ({"text_config": {"vocab_size": 525}}, "text_config.eos_token_id"),
        ({"text_config": {"eos_token_id": [2, 3]}}, "text_config.eos_token_id"),
        ({"text_config": {"hidden_size": 1 << 40}}, "text_config.hidden_size"),
        ({"vision_config": {"hidden_act": "gelu_new"}}, "vision_config.hidden_act"),
        ({"vision_config": {"num_channels": 1}}, "vision_config.num_channels"),
        ({"vision_config": {"image_size": [224, 224]}}, "vision_config.image_size"),
        ({"vision_config": {"patch_size": 225}}, "vision_config.patch_size"),
        ({"vision_config": {"layer_norm_eps": 0}}, "vision_config.layer_norm_eps"),
    ],
)
def test_clips_that_we_do_not_implement_are_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as error:
        _clip(_read("clip") | change)
    assert error.value.key == key


# --- Folders --------------------------------------------------------------------------------------


def test_what_is_loaded_is_in_the_dtype_and_place_asked_for() -> None:
    clip = load_clip(MODEL / "clip", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, place=np.asarray)
    assert clip.module.dtype == jnp.bfloat16
    leaves = jax.tree.leaves(clip.params)
    assert {(type(x), x.dtype) for x in leaves} == {(np.ndarray, np.dtype(jnp.bfloat16))}
    assert (clip.size, clip.mean, clip.std) == (224, CLIP_MEAN, CLIP_STD)
    taesd = load_taesd(str(MODEL / "taesd"))
    assert {(isinstance(x, jax.Array), x.dtype) for x in jax.tree.leaves(taesd.params)} == {
        (True, np.dtype(np.float32))
    }


@pytest.mark.parametrize("part", ["clip"])
def test_buffers_of_older_files_are_passed_over(folder: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = {
            f"{m}.embeddings.position_ids": np.arange(9)[None]
            for m in ("text_model", "vision_model")
        }
        return {k: v for k, v in tensors.items() if k != "logit_scale"} | ids

    _edit(folder, add)
    assert bits(load_clip(folder).params) == bits(load_clip(MODEL / "clip").params)


@pytest.mark.parametrize("part", ["clip"])
def test_preprocessing_of_other_files(folder: Path) -> None:
    file = folder / "preprocessor_config.json"
    edit_json(file, crop_size=224, size=224, image_mean=[0.5, 0.5, 0], image_std=[1, 2, 3])
    found = load_clip(folder)
    assert (found.mean, found.std) == ((0.5, 0.5, 0.0), (1.0, 2.0, 3.0))
    edit_json(file, do_normalize=False)
    assert load_clip(folder).mean == (0.0, 0.0, 0.0)
    file.unlink()
    assert load_clip(folder).mean == CLIP_MEAN


@pytest.mark.parametrize(
    "change",
    [
        {"crop_size": 256},
        {"crop_size": {"height": 224}},
        {"crop_size": {"height": 224, "width": 256}},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": 0.5},
        {"image_std": [0.5, 0.5, 0]},
        {"image_std": [0.5, 0.5, "0.5"]},
        {"do_normalize": 1},
    ],
)
@pytest.mark.parametrize("part", ["clip"])
def test_preprocessing_that_does_not_fit_is_refused(folder: Path, change: dict[str, Any]) -> None:
    edit_json(folder / "preprocessor_config.json", **change)
    with pytest.raises(InputError, match=r"preprocessor_config\.json") as error:
        load_clip(folder)
    assert error.value.key in change


@pytest.mark.parametrize("part", ["taesd", "clip"])
def test_weights_that_do_not_fit_are_refused(folder: Path, part: str) -> None:
    load, one = LOAD[part], max(load_file(folder / WEIGHTS[part]))
    changes: list[tuple[Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]], str]] = [
        (lambda t: t | {one: t[one] * np.float32(np.nan)}, "not finite"),
        (lambda t: t | {one: t[one][:1]}, "1 misshapen"),
        (lambda t: t | {"more.weight": t[one]}, "1 unexpected"),
        (lambda t: {k: v for k, v in t.items() if k not in (one, "more.weight")}, "1 missing"),
    ]
    for edit, message in changes:
        whole = MODEL / part / WEIGHTS[part]
        shutil.copyfile(whole, folder / WEIGHTS[part])
        _edit(folder, edit)
        with pytest.raises(InputError, match=message) as error:
            load(folder)
        assert error.value.file == str(folder / WEIGHTS[part])
    content = whole.read_bytes()
    (folder / WEIGHTS[part]).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="truncated"):
        load(folder)


@pytest.mark.parametrize("part", ["taesd", "clip"])
def test_folders_that_are_none_are_refused(folder: Path, part: str) -> None:
    load = LOAD[part]
    with pytest.raises(InputError, match="no such folder, expected the folder of a"):
        load(folder / "missing")
    with pytest.raises(InputError, match="not a folder"):
        load(folder / "config.json")
    (folder / WEIGHTS[part]).rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle files can run any code"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load(folder)
