from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL as TorchVAE
from diffusers import UNet2DConditionModel

from tests.pretrained.folders import MODEL
from tiue_jax.io.errors import InputError
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.models.variants import VARIANTS
from tiue_jax.pretrained import configs
from tiue_jax.pretrained.jsonfile import MAX_CONFIG_BYTES, Fields, dump_object, read_object

FILE = Path("model/unet/config.json")


def _read(part: str) -> dict[str, Any]:
    return json.loads((MODEL / part / "config.json").read_text())


def test_the_reference_model() -> None:
    unet = configs.unet_from_config(Fields(_read("unet"), FILE))
    assert unet == UNet(block_out_channels=(32, 32, 64, 64), context_dim=48)
    vae = configs.vae_from_config(Fields(_read("vae"), FILE))
    assert vae == AutoencoderKL(block_out_channels=(32, 32, 32, 64))
    text = configs.text_encoder_from_config(Fields(_read("text_encoder"), FILE))
    assert text == CLIPTextEncoder(525, 48, 96, num_layers=3, num_heads=4)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_survive_their_configs(name: str) -> None:
    variant = VARIANTS[name]
    unet = configs.unet_config(variant.unet, variant.latent_size)
    assert configs.unet_from_config(Fields(unet, FILE)) == variant.unet
    assert configs.latent_size_from_config(Fields(unet, FILE)) == variant.latent_size
    vae = configs.vae_config(variant.vae)
    assert configs.vae_from_config(Fields(vae, FILE)) == variant.vae
    text = configs.text_encoder_config(variant.text_encoder)
    assert configs.text_encoder_from_config(Fields(text, FILE)) == variant.text_encoder


def test_published_configs_are_the_variants() -> None:
    """What the folders of SD 1.5 and SD 2.1 say, where it is not diffusers' default."""
    sd15 = {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
    assert configs.unet_from_config(Fields(sd15, FILE)) == VARIANTS["sd15"].unet
    sd21 = {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "dual_cross_attention": False,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    }
    assert configs.unet_from_config(Fields(sd21, FILE)) == VARIANTS["sd21"].unet
    text = {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "some_old_generation_option": [1, 2],
    }
    found = configs.text_encoder_from_config(Fields(text, FILE))
    assert found == VARIANTS["sd21"].text_encoder


def test_every_setting_of_diffusers_is_known_and_its_default_is_ours() -> None:
    """A new diffusers with a new setting fails here, and not in a user's hands."""
    tables = (
        (UNet2DConditionModel, configs._UNET_ONLY, configs._UNET_READ),
        (TorchVAE, configs._VAE_ONLY, configs._VAE_READ),
    )
    for torch_class, only, read in tables:
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(torch_class.__init__).parameters.items()
            if name != "self"
        }
        assert defaults.keys() == only.keys() | read
        for name, supported in only.items():
            value = defaults[name]
            assert (value[0] if isinstance(value, tuple) else value) in supported, name
            assert supported[0] == value or isinstance(value, tuple), name


REFUSED_UNET: list[tuple[dict[str, Any], str]] = [
    ({"act_fn": "gelu"}, r"\[act_fn\]: value is not supported, expected \"silu\""),
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"time_cond_proj_dim": 255}, r"\[time_cond_proj_dim\].*expected null or an even integer"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type"),
    ({"transformer_layers_per_block": [1, 2, 10, 10]}, "transformer_layers_per_block"),
    ({"num_attention_heads": 8}, "num_attention_heads"),
    ({"only_cross_attention": [True, True, True, False]}, "only_cross_attention"),
    ({"dropout": 0.1}, "dropout"),
    ({"freq_shift": 1}, "freq_shift"),
    ({"freq_shift": False}, "freq_shift"),
    ({"a_new_setting": "on"}, r"\[a_new_setting\]: unknown setting"),
    ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}, "down_block_types"),
    ({"down_block_types": ["DownBlock2D"] * 3}, "expected 4 of CrossAttnDownBlock2D or"),
    ({"up_block_types": ["CrossAttnUpBlock2D"] * 4}, "expected down_block_types in reverse"),
    ({"attention_head_dim": [8, 8, 8]}, "4 integers"),
    ({"attention_head_dim": 7}, "divide"),
    ({"attention_head_dim": -8}, "attention_head_dim"),
    ({"block_out_channels": [320, 640, 1280, 1281]}, "multiples of norm_num_groups 32"),
    ({"block_out_channels": []}, "1 to 8 integers"),
    ({"block_out_channels": [10**30] * 4}, "block_out_channels"),
    ({"block_out_channels": "320"}, "block_out_channels"),
    ({"norm_num_groups": 0}, "norm_num_groups"),
    ({"norm_num_groups": None}, "norm_num_groups"),
    ({"norm_eps": "1e-5"}, "norm_eps"),
    ({"norm_eps": 1e999}, "norm_eps"),
    ({"layers_per_block": [2, 2, 2, 3]}, "the same for all levels"),
    ({"layers_per_block": 10**9}, "layers_per_block"),
    ({"cross_attention_dim": [768, 768, 768, 1024]}, "the same for all levels"),
    ({"use_linear_projection": 1}, "true or false"),
    ({"_class_name": "UNet2DModel"}, "another kind of network, expected UNet2DConditionModel"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_UNET)
def test_unets_that_we_do_not_implement_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        configs.unet_from_config(Fields(_read("unet") | change, FILE))
    assert error.value.file == str(FILE)
    assert error.value.key in change
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sample_size": [64, 96]}, "sample_size"),
        ({"sample_size": 0}, "sample_size"),
        ({"sample_size": "64"}, "sample_size"),
    ],
)
def test_sample_sizes_that_are_no_square_are_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=key):
        configs.latent_size_from_config(Fields(change, FILE))
    assert configs.latent_size_from_config(Fields({"sample_size": [96, 96]}, FILE)) == 96
    assert configs.latent_size_from_config(Fields({}, FILE)) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "relu"},
        {"latents_mean": [0.1] * 4},
        {"shift_factor": 0.1159},
        {"use_quant_conv": False},
        {"mid_block_add_attention": False},
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"] * 2},
        {"down_block_types": ["DownEncoderBlock2D"] * 3},
        {"down_block_types": 4},
        {"out_channels": 1},
        {"latent_channels": 0},
        {"block_out_channels": [33, 33, 33, 33]},
        {"scaling_factor": None},
        {"_class_name": "AutoencoderTiny"},
    ],
)
def test_vaes_that_we_do_not_implement_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        configs.vae_from_config(Fields(_read("vae") | change, FILE))
    assert error.value.key in change


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"model_type": "clip"},
        {"architectures": ["CLIPTextModelWithProjection"]},
        {"num_attention_heads": 5},
        {"vocab_size": -1},
        {"hidden_size": 1 << 40},
        {"layer_norm_eps": 0},
    ],
)
def test_text_encoders_that_we_do_not_implement_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        configs.text_encoder_from_config(Fields(_read("text_encoder") | change, FILE))
    assert error.value.key in change


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object, found list"),
        (b"{", "not JSON"),
        (b'{"a": Infinity}', "not JSON"),
        (b'{"a": [1e308, 1e999]}', "1e999 is beyond the range of numbers"),
        (b'{"a": -1E400}', "-1E400 is beyond the range of numbers"),
        (b'{"a": 1, "a": 1}', "same key twice"),
        (b'{"a": "\xe9"}', "not UTF-8"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b" " * (MAX_CONFIG_BYTES + 1), "too large"),
    ],
)
def test_files_that_are_no_json_object_are_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_object(tmp_path / "config.json")


def test_json_is_written_as_diffusers_writes_it() -> None:
    text = (MODEL / "unet" / "config.json").read_text()
    assert dump_object(json.loads(text)) == text
