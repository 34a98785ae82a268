"""LoRA files beside diffusers with peft: what they write we merge, what we write they load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from flax.traverse_util import flatten_dict
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file

from tests.pretrained.folders import MODEL, bits
from tiue_jax.io.errors import InputError
from tiue_jax.models.lora import init_lora, merge_lora
from tiue_jax.models.unet import UNet
from tiue_jax.pretrained import lora_files
from tiue_jax.pretrained.folder import StableDiffusion, load_stable_diffusion
from tiue_jax.pretrained.lora_files import FILE_NAME, load_lora, merge_lora_file, save_lora
from tiue_jax.pretrained.parameters import param_shapes

Tensors = dict[str, np.ndarray]
TOLERANCE = 1e-5  # of the largest value: fp32, another order of sums; worst seen 2e-6
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv_in", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "conv_out"]
DENSE = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def plain_sd() -> StableDiffusion:
    """The reference model, on the host."""
    return load_stable_diffusion(MODEL, place=np.asarray)


@pytest.fixture
def sd(plain_sd: StableDiffusion) -> StableDiffusion:
    """The same to merge into: the tree is a copy, the arrays are not."""
    return _same(plain_sd)


def _same(sd: StableDiffusion) -> StableDiffusion:
    return replace(sd, params=jax.tree.map(lambda x: x, sd.params))


@pytest.fixture(scope="module")
def unet(plain_sd: StableDiffusion) -> Callable[..., np.ndarray]:
    """Our UNet's answer to one fixed input, by parameters."""
    apply = jax.jit(plain_sd.unet.apply)
    x, t, context = _inputs()

    def run(params: Any) -> np.ndarray:
        return np.asarray(apply({"params": params}, x.transpose(0, 2, 3, 1), t, context))

    return run


def _inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 8, 8), np.float32)
    return x, np.array([501]), rng.standard_normal((1, 5, 48), np.float32)


def _torch_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(MODEL / "unet", local_files_only=True)


def _torch_output(module: torch.nn.Module) -> np.ndarray:
    x, t, context = map(torch.from_numpy, _inputs())
    with torch.no_grad():
        return module(x, t, context).sample.numpy().transpose(0, 2, 3, 1)


def _pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)


def _adapt(module: torch.nn.Module, targets: list[str], seed: int = 0, **options: Any) -> None:
    """Give `module` an adapter that says something."""
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | options
    torch.manual_seed(seed)
    module.add_adapter(LoraConfig(target_modules=targets, **settings))
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)


def _assert_close(ours: np.ndarray, theirs: np.ndarray, plain: np.ndarray) -> None:
    largest = np.abs(theirs).max()
    assert np.abs(theirs - plain).max() > 0.01 * largest, "the LoRA says nothing"
    assert np.abs(ours - theirs).max() < TOLERANCE * largest


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (ATTENTION, {}),
        ([*CONVOLUTIONS, *DENSE], {}),
        (["to_q", "conv1"], {"use_rslora": True}),
        (
            [*ATTENTION, "proj_in"],
            {"rank_pattern": {"to_k": 2, "attn2.to_v": 3}, "alpha_pattern": {"attn1.to_q": 1.5}},
        ),
    ],
)
def test_what_diffusers_and_peft_write_is_merged(
    targets: list[str],
    options: dict[str, Any],
    sd: StableDiffusion,
    unet: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    """Worst seen: 2e-6."""
    module = _torch_unet()
    _adapt(module, targets, **options)
    module.save_lora_adapter(tmp_path, safe_serialization=True)
    merged = merge_lora_file(_same(sd), tmp_path)
    _assert_close(unet(merged.params["unet"]), _torch_output(module), unet(sd.params["unet"]))
    assert merged.params["vae"] == sd.params["vae"]
    untouched = flatten_dict(merged.params["unet"])["conv_norm_out", "scale"]
    assert untouched is sd.params["unet"]["conv_norm_out"]["scale"]


def _saved_by_pipeline(folder: Path) -> StableDiffusionPipeline:
    """A pipeline with adapters in UNet and text encoder, saved without metadata: alpha = rank."""
    pipeline = _pipeline()
    _adapt(pipeline.unet, ATTENTION, lora_alpha=4)
    _adapt(pipeline.text_encoder, TEXT, seed=1, lora_alpha=4)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name="default"),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
    )
    return pipeline


def test_a_pipelines_file_is_merged_into_the_text_encoder_too(
    sd: StableDiffusion, unet: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    pipeline = _saved_by_pipeline(tmp_path)
    merged = merge_lora_file(_same(sd), tmp_path / FILE_NAME)
    _assert_close(
        unet(merged.params["unet"]), _torch_output(pipeline.unet), unet(sd.params["unet"])
    )
    ids = jnp.asarray(sd.tokenizer(["a red circle"]))
    with torch.no_grad():
        theirs = pipeline.text_encoder(torch.tensor(ids.tolist()))[0].numpy()
    ours, plain = (
        np.asarray(sd.text_encoder.apply({"params": found.params["text_encoder"]}, ids))
        for found in (merged, sd)
    )
    _assert_close(ours, theirs, plain)
    half = merge_lora_file(_same(sd), tmp_path, scale=0.5)
    kernels = [_kernel(found) for found in (sd, half, merged)]
    np.testing.assert_allclose(kernels[1], (kernels[0] + kernels[2]) / 2, atol=1e-6)
    only_unet = replace(sd, params={"unet": sd.params["unet"]})
    with pytest.raises(ValueError, match=r"parameters of \['text_encoder'\] were not loaded"):
        merge_lora_file(only_unet, tmp_path)
    with pytest.raises(ValueError, match="LoRA scale nan"):
        merge_lora_file(_same(sd), tmp_path, scale=float("nan"))


def _kernel(sd: StableDiffusion) -> np.ndarray:
    layer = sd.params["unet"]["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn2"]
    return np.asarray(layer["to_out_0"]["kernel"])


def _former(key: str) -> str:
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        key = key.replace(f"{name}.lora_", f"processor.{name.removesuffix('.0')}_lora.lora_")
    for ours, theirs in zip(TEXT, ("to_q", "to_k", "to_v", "to_out"), strict=False):
        key = key.replace(f"{ours}.lora_", f"{theirs}_lora.lora_")
    key = key.replace("fc1.lora", "fc1.lora_linear_layer.lora")
    key = key.replace("fc2.lora", "fc2.lora_linear_layer.lora")
    return key.replace("lora_A", "down").replace("lora_B", "up").removeprefix("unet.")


def _kohya(key: str) -> str:
    part, name = key.split(".", 1)
    name, _, matrix = name.removesuffix(".weight").rpartition(".")
    if part == "text_encoder" and not name.startswith("text_model"):
        name = f"text_model.{name}"
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part]
    ending = {"lora_A": "lora_down", "lora_B": "lora_up"}[matrix]
    return f"{prefix}{name.replace('.', '_')}.{ending}.weight"


SPELLINGS: dict[str, Callable[[str], str]] = {
    "diffusers": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "text encoders before transformers 5": lambda key: key.replace(
        "text_encoder.text_model.", "text_encoder."
    ).replace("text_encoder.", "text_encoder.text_model."),
    "text encoders of transformers 5": lambda key: key.replace("text_model.", ""),
    "former diffusers": _former,
    "kohya": _kohya,
    "kohya, te1": lambda key: _kohya(key).replace("lora_te_", "lora_te1_"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_merged_the_same(
    spelling: str, sd: StableDiffusion, tmp_path: Path
) -> None:
    _saved_by_pipeline(tmp_path)
    tensors = load_file(tmp_path / FILE_NAME)
    renamed = {SPELLINGS[spelling](key): tensor for key, tensor in tensors.items()}
    assert len(renamed) == len(tensors)
    save_file(renamed, tmp_path / "other.safetensors")
    expected = merge_lora_file(_same(sd), tmp_path)
    assert bits(merge_lora_file(_same(sd), tmp_path / "other.safetensors").params) == bits(
        expected.params
    )


def test_kohyas_alpha_is_taken_as_diffusers_takes_it(
    sd: StableDiffusion, unet: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    """The form of LCM-LoRA: half precision, dense layers and convolutions, one alpha.

    Where alphas differ, diffusers 0.42 loses those of attention layers and warns.
    """
    module = _torch_unet()
    _adapt(module, [*ATTENTION, "conv1", "conv_shortcut", "proj_in", "ff.net.2"])
    tensors: Tensors = {}
    for key, value in get_peft_model_state_dict(module, adapter_name="default").items():
        name = _kohya(f"unet.{key}")
        tensors[name] = value.numpy().astype(np.float16)
        tensors[f"{name.split('.')[0]}.alpha"] = np.array(2.5, np.float16)
    save_file(tensors, tmp_path / FILE_NAME)
    pipeline = _pipeline()
    pipeline.load_lora_weights(tmp_path, weight_name=FILE_NAME)
    merged = merge_lora_file(_same(sd), tmp_path)
    theirs = _torch_output(pipeline.unet)
    _assert_close(unet(merged.params["unet"]), theirs, unet(sd.params["unet"]))


def test_every_layer_has_its_own_alpha(sd: StableDiffusion, tmp_path: Path) -> None:
    """By hand: weight + alpha/rank * up down, a dense layer and a 3x3 convolution."""
    rng = np.random.default_rng(2)
    shapes = {
        "lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": (32, 2, 1, 1),
        "lora_unet_time_embedding_linear_1.lora_down.weight": (1, 32),
        "lora_unet_time_embedding_linear_1.lora_up.weight": (128, 1),
    }
    tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    alphas = {"lora_unet_conv_in.alpha": np.array(3, np.float32)}
    save_file(tensors | alphas, tmp_path / FILE_NAME)
    merged = merge_lora_file(_same(sd), tmp_path, scale=2.0).params["unet"]
    conv_down, conv_up, down, up = tensors.values()
    conv = 2.0 * 3 / 2 * np.einsum("or,rikl->klio", conv_up[:, :, 0, 0], conv_down)
    dense = 2.0 * 1 / 1 * (up @ down).T
    for layer, update in (("conv_in", conv), ("time_embedding", dense)):
        before, after = (
            tree[layer] if layer == "conv_in" else tree[layer]["linear_1"]
            for tree in (sd.params["unet"], merged)
        )
        np.testing.assert_allclose(after["kernel"] - before["kernel"], update, atol=1e-5)
        assert after["bias"] is before["bias"]


@pytest.fixture(scope="module")
def lora(plain_sd: StableDiffusion) -> dict[str, Any]:
    """A LoRA as a training has it, of which b is not zero."""
    made = init_lora(jax.random.key(0), plain_sd.params["unet"], 8, ("to_q", "to_v"))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32)), made)


@pytest.mark.parametrize("alpha", [13.5, 8.0])
def test_what_we_write_is_loaded_by_diffusers_and_by_us(
    alpha: float,
    lora: dict[str, Any],
    sd: StableDiffusion,
    unet: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    """Worst seen: 1e-6."""
    file = save_lora(lora, alpha, tmp_path / "new")
    assert file == tmp_path / "new" / FILE_NAME
    pipeline = _pipeline()
    pipeline.load_lora_weights(tmp_path / "new", weight_name=FILE_NAME)
    trained = merge_lora(sd.params["unet"], lora, alpha / 8)
    ours, plain = unet(trained), unet(sd.params["unet"])
    _assert_close(ours, _torch_output(pipeline.unet), plain)
    module = _torch_unet()
    module.load_lora_adapter(tmp_path / "new", prefix="unet", weight_name=FILE_NAME)
    _assert_close(ours, _torch_output(module), plain)

    _assert_close(unet(merge_lora_file(_same(sd), file).params["unet"]), ours, plain)
    found, same = load_lora(file, param_shapes(sd.unet))
    assert (bits(found), same) == (bits(lora), alpha)
    with pytest.raises(InputError, match="is there already"):
        save_lora(lora, alpha, tmp_path / "new")


def test_what_cannot_be_written_or_read_back_is_refused(
    lora: dict[str, Any], sd: StableDiffusion, tmp_path: Path
) -> None:
    bad = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), lora)
    with pytest.raises(InputError, match=r"lora_A.weight\]: 1 of \d+ values are not finite"):
        save_lora(bad, 8.0, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"alpha 0\.0: expected one, above 0"):
        save_lora(lora, 0.0, tmp_path / "lora.safetensors")
    assert list(tmp_path.iterdir()) == []
    module = _torch_unet()
    _adapt(module, ["to_q", "conv_in"])
    module.save_lora_adapter(tmp_path / "conv", safe_serialization=True)
    with pytest.raises(InputError, match=r"conv_in.lora_A.weight\]: not a dense layer"):
        load_lora(tmp_path / "conv", param_shapes(sd.unet))
    module = _torch_unet()
    _adapt(module, ["to_q"], alpha_pattern={"attn1.to_q": 2})
    module.save_lora_adapter(tmp_path / "two", safe_serialization=True)
    with pytest.raises(InputError, match="expected one rank and alpha, found 4 and 2, 4 and 6"):
        load_lora(tmp_path / "two", param_shapes(sd.unet))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_keep_their_dtype_and_place(
    dtype: str, lora: dict[str, Any], sd: StableDiffusion, tmp_path: Path
) -> None:
    file = save_lora(lora, 8.0, tmp_path)
    half = {"unet": jax.tree.map(lambda x: jnp.asarray(x, dtype), sd.params["unet"])}
    merged = merge_lora_file(_same(replace(sd, params=half)), file).params["unet"]
    leaves = jax.tree.leaves(merged)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), half["unet"])
    exact = flatten_dict(merge_lora(wide, lora, 1.0))
    for path, leaf in flatten_dict(merged).items():
        expected = np.asarray(exact[path]).astype(leaf.dtype)
        np.testing.assert_array_max_ulp(
            np.asarray(leaf, np.float32), expected.astype(np.float32), maxulp=2**16
        )  # one step of bfloat16: the fp32 sums before the rounding differ in their last bit


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN, UP = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
PAIR = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP}
CONFIG: dict[str, Any] = {"unet.r": 2, "unet.lora_alpha": 2}

FAULTS: dict[str, tuple[Mapping[str, np.ndarray], Mapping[str, Any] | None, str]] = {
    "unknown": (PAIR | {"unet.mid_block.to_x.lora_A.weight": DOWN}, None, "1 unknown (unet.mid_"),
    "another model": (
        {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": DOWN},
        None,
        "1 unknown (lora_unet_input_blocks_1_1_proj_in.lora_down.weight)",
    ),
    "second text encoder": ({"lora_te2_x.alpha": DOWN}, None, "1 unknown (lora_te2_x.alpha)"),
    "DoRA": (PAIR | {f"{Q}.lora_magnitude_vector": UP}, None, "1 unknown"),
    "bias": (PAIR | {f"{Q}.lora_B.bias": UP}, None, "1 unknown"),
    "peft's own folder": (
        {k.replace("unet.", "base_model.model."): v for k, v in PAIR.items()},
        None,
        "2 unknown",
    ),
    "half a pair": ({f"{Q}.lora_A.weight": DOWN}, None, "1 without the other half (unet.mid_"),
    "lone alpha": ({f"{Q}.alpha": np.ones((), np.float32)}, None, "1 without the other half"),
    "given twice": (PAIR | {f"{Q}.lora.up.weight": UP}, None, "1 given twice (unet.mid_"),
    "input": (
        PAIR | {f"{Q}.lora_A.weight": DOWN[:, :3]},
        None,
        "to_q.lora_A.weight (expected [2, 64], found [2, 3]))",
    ),
    "rank": (PAIR | {f"{Q}.lora_B.weight": UP[:, :1]}, None, "(expected [64, 2], found [64, 1])"),
    "rank 0": ({k: v[:0] for k, v in PAIR.items()}, None, "2 misshapen"),
    "no axes": (PAIR | {f"{Q}.lora_A.weight": np.ones((), np.float32)}, None, "2 misshapen"),
    "window": (
        {
            "unet.conv_in.lora_A.weight": np.ones((2, 4, 1, 1), np.float32),
            "unet.conv_in.lora_B.weight": np.ones((32, 2, 1, 1), np.float32),
        },
        None,
        "conv_in.lora_A.weight (expected [2, 4, 3, 3], found [2, 4, 1, 1])",
    ),
    "alphas": (PAIR | {f"{Q}.alpha": DOWN}, None, "alpha (expected [], found [2, 64])"),
    "alpha 0": (PAIR | {f"{Q}.alpha": np.zeros((), np.float32)}, None, "not an alpha, expected ab"),
    "two alphas": (PAIR | {f"{Q}.alpha": np.ones((), np.float32)}, CONFIG, "and in its metadata"),
    "integers": ({k: v.astype(np.int32) for k, v in PAIR.items()}, None, "dtype is not supported"),
    "NaN": (PAIR | {f"{Q}.lora_A.weight": DOWN * np.nan}, None, "values are not finite"),
    "infinite sum": ({k: v * np.float32(3e38) for k, v in PAIR.items()}, None, "are not finite"),
    "nothing": ({}, None, "holds no LoRA"),
    "base changed": (PAIR, CONFIG | {"unet.init_lora_weights": "pissa"}, "[init_lora_weights]"),
    "pattern": (PAIR, CONFIG | {"unet.alpha_pattern": {"(a+)+": 1}}, "[alpha_pattern]"),
    "pattern's alpha": (PAIR, CONFIG | {"unet.alpha_pattern": {"to_q": "1"}}, "[to_q]"),
    "config's alpha": (PAIR, CONFIG | {"unet.lora_alpha": None}, "[lora_alpha]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_merged(
    fault: str, sd: StableDiffusion, tmp_path: Path
) -> None:
    tensors, config, message = FAULTS[fault]
    metadata = None if config is None else {"lora_adapter_metadata": json.dumps(config)}
    file = tmp_path / "lora.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file, metadata)
    with pytest.raises(InputError) as refused, np.errstate(over="ignore", invalid="ignore"):
        merge_lora_file(_same(sd), file)
    assert message in str(refused.value), str(refused.value)
    assert str(refused.value).startswith(str(file))
    assert "\n" not in str(refused.value)


def test_no_file_and_pickles_are_refused(sd: StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        merge_lora_file(_same(sd), tmp_path / "lora.safetensors")
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04")
    for name in ("", "pytorch_lora_weights.bin"):
        with pytest.raises(InputError, match="pickle files can run any code"):
            merge_lora_file(_same(sd), tmp_path / name)


def test_no_two_layers_of_stable_diffusion_share_a_spelling() -> None:
    """Kohya's underscores lose the dots: on the full-size UNet they still tell layers apart."""
    layers: dict[str, Any] = {}
    for name, layer in lora_files._spell("unet", param_shapes(UNet())):
        assert layers.setdefault(name, layer) == layer, name
    assert len({layer.path for layer in layers.values()}) == 282
