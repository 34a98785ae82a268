from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tiue_jax.io.errors import InputError
from tiue_jax.models.taesd import AutoencoderTiny
from tiue_jax.models.variants import VARIANTS
from tiue_jax.pretrained import configs
from tiue_jax.pretrained.names import (
    DIFFUSERS,
    FLAX,
    LISTS,
    Layout,
    canonical_name,
    flax_path,
    to_flax,
    to_torch,
    torch_name,
    torch_shape,
)
from tiue_jax.pretrained.parameters import param_shapes

FILE = Path("somewhere/file.safetensors")
SHAPES = {
    ("conv_in", "kernel"): (3, 3, 4, 8),
    ("conv_in", "bias"): (8,),
    ("mid_block", "attentions_0", "proj_in", "kernel"): (1, 1, 8, 16),
    ("time_embedding", "linear_1", "kernel"): (8, 32),
}


@pytest.mark.parametrize(
    ("path", "name", "rank"),
    [
        (("conv_in", "kernel"), "conv_in.weight", 4),
        (("time_embedding", "linear_1", "bias"), "time_embedding.linear_1.bias", 1),
        (("up_blocks_10", "resnets_2", "norm1", "scale"), "up_blocks.10.resnets.2.norm1.weight", 1),
        (("attn1", "to_out_0", "kernel"), "attn1.to_out.0.weight", 2),
        (("ff", "net_0", "proj", "kernel"), "ff.net.0.proj.weight", 2),
        (("e", "token_embedding", "embedding"), "e.token_embedding.weight", 2),
        (("encoder", "layers_11", "mlp", "fc1", "bias"), "encoder.layers.11.mlp.fc1.bias", 1),
        (("decoder", "layers_2", "conv_4", "kernel"), "decoder.layers.2.conv.4.weight", 4),
        (
            ("v", "embeddings", "patch_embedding", "kernel"),
            "v.embeddings.patch_embedding.weight",
            4,
        ),
        (("v", "embeddings", "class_embedding"), "v.embeddings.class_embedding", 1),
    ],
)
def test_names_by_hand(path: tuple[str, ...], name: str, rank: int) -> None:
    assert torch_name(path) == name
    assert flax_path(name, rank) == path


def _torch_shapes(variant: str, part: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of diffusers' and transformers' own modules; no memory is taken."""
    found = VARIANTS[variant]
    with torch.device("meta"):
        if part == "unet":
            config = configs.unet_config(found.unet, found.latent_size)
            module = UNet2DConditionModel.from_config(config)
        elif part == "vae":
            module = AutoencoderKL.from_config(configs.vae_config(found.vae))
        else:
            config = configs.text_encoder_config(found.text_encoder)
            module = CLIPTextModel(CLIPTextConfig(**config))
    state = module.state_dict()
    names = {name: canonical_name(part, name) for name in state}
    return {new: tuple(state[old].shape) for old, new in names.items() if new is not None}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("variant", ["sd15", "sd21"])
def test_full_size_models_have_the_names_and_shapes_of_torch(variant: str, part: str) -> None:
    ours = param_shapes(getattr(VARIANTS[variant], part))
    assert {torch_name(p): torch_shape(p, s) for p, s in ours.items()} == _torch_shapes(
        variant, part
    )
    for path, shape in ours.items():
        assert flax_path(torch_name(path), len(shape)) == path


def test_every_list_is_in_use() -> None:
    found = {part for v in ("sd15",) for part in _components(v)}
    assert {name.rpartition("_")[0] for name in found if name[-1].isdigit()} >= set(LISTS)


def _components(variant: str) -> set[str]:
    modules = VARIANTS[variant]
    networks = (modules.unet, modules.vae, modules.text_encoder, AutoencoderTiny())
    return {module for network in networks for path in param_shapes(network) for module in path}


def test_kernels_are_transposed() -> None:
    conv = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)  # [out, in, height, width]
    ours = to_flax(conv, ("conv", "kernel"), (5, 7, 3, 2))
    assert ours.shape == (5, 7, 3, 2)
    assert ours[4, 1, 2, 0] == conv[0, 2, 4, 1]
    dense = np.arange(6).reshape(2, 3)
    assert to_flax(dense, ("fc1", "kernel"), (3, 2)).tolist() == [[0, 3], [1, 4], [2, 5]]
    table = np.arange(6).reshape(2, 3)
    assert to_flax(table, ("token_embedding", "embedding"), (2, 3)).tolist() == table.tolist()
    for array, path in ((conv, ("c", "kernel")), (dense, ("d", "kernel"))):
        shape = tuple(array.transpose(*range(2, array.ndim), 1, 0).shape)
        assert np.array_equal(to_torch(to_flax(array, path, shape), path), array)


def test_a_linear_layer_and_a_1x1_convolution_hold_the_same() -> None:
    linear = np.arange(6.0).reshape(2, 3)
    conv = linear.reshape(2, 3, 1, 1)
    assert to_flax(linear, ("p", "kernel"), (1, 1, 3, 2)).shape == (1, 1, 3, 2)
    assert np.array_equal(to_flax(linear, ("p", "kernel"), (1, 1, 3, 2))[0, 0], linear.T)
    assert np.array_equal(to_flax(conv, ("p", "kernel"), (3, 2)), linear.T)


@pytest.mark.parametrize(
    ("part", "stored", "name"),
    [
        ("vae", "decoder.mid_block.attentions.0.query.weight", "to_q.weight"),
        ("vae", "encoder.mid_block.attentions.0.key.bias", "to_k.bias"),
        ("vae", "encoder.mid_block.attentions.0.value.bias", "to_v.bias"),
        ("vae", "encoder.mid_block.attentions.0.proj_attn.weight", "to_out.0.weight"),
        ("vae", "encoder.mid_block.attentions.0.group_norm.bias", "group_norm.bias"),
        ("text_encoder", "encoder.layers.0.mlp.fc1.bias", "text_model.encoder.layers.0"),
        ("text_encoder", "final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ("text_encoder", "text_model.embeddings.position_ids", None),
        ("unet", "mid_block.attentions.0.key.weight", "mid_block.attentions.0.key.weight"),
        ("clip", "vision_model.embeddings.position_ids", None),
        ("clip", "logit_scale", None),
        ("clip", "vision_model.pre_layrnorm.bias", "vision_model.pre_layrnorm.bias"),
    ],
)
def test_former_names(part: str, stored: str, name: str | None) -> None:
    found = canonical_name(part, stored)
    assert found is None if name is None else (found is not None and name in found)


def _stored() -> dict[str, tuple[int, ...]]:
    return {torch_name(path): torch_shape(path, shape) for path, shape in SHAPES.items()}


def test_a_file_that_fits_is_matched() -> None:
    found = Layout("unet", SHAPES).match(_stored(), FILE)
    assert found == {path: torch_name(path) for path in SHAPES}
    flat = {"/".join(path): shape for path, shape in SHAPES.items()}
    assert Layout("unet", SHAPES, FLAX).match(flat, FILE) == {p: "/".join(p) for p in SHAPES}


def test_a_1x1_convolution_may_be_stored_as_a_linear_layer_and_nothing_else_may() -> None:
    stored = _stored()
    stored["mid_block.attentions.0.proj_in.weight"] = (16, 8)
    assert len(Layout("unet", SHAPES).match(stored, FILE)) == 4
    stored["time_embedding.linear_1.weight"] = (8, 32)
    with pytest.raises(InputError, match=r"1 misshapen \(time_embedding.linear_1.weight"):
        Layout("unet", SHAPES).match(stored, FILE)


def test_all_faults_are_listed_at_once() -> None:
    stored = _stored()
    del stored["conv_in.bias"]
    stored["conv_in.weight"] = (8, 4, 3, 1)
    stored |= {f"extra.{i}.weight": (1,) for i in range(9)}
    with pytest.raises(InputError) as error:
        Layout("unet", SHAPES).match(stored, FILE)
    assert str(error.value) == (
        f"{FILE}: keys do not fit the unet: 1 missing (conv_in.bias); 9 unexpected "
        "(extra.0.weight, extra.1.weight, extra.2.weight, extra.3.weight, and 5 more); "
        "1 misshapen (conv_in.weight (expected [8, 4, 3, 3], found [8, 4, 3, 1]))"
    )


def test_a_parameter_under_both_its_names_is_refused() -> None:
    shapes = {("encoder", "mid_block", "attentions_0", "to_q", "bias"): (4,)}
    stored = {
        "encoder.mid_block.attentions.0.to_q.bias": (4,),
        "encoder.mid_block.attentions.0.query.bias": (4,),
    }
    with pytest.raises(InputError, match="1 given twice"):
        Layout("vae", shapes, DIFFUSERS).match(stored, FILE)
