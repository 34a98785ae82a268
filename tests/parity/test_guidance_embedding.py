"""LCM's UNet, which takes the guidance scale as an input, beside diffusers'; and its config.

Worst seen: embedding 6e-8 (width 32), UNet 1.4e-6.
"""

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.unets import unet_2d_condition
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.parity.cases import Case, assert_parity, compiled, golden, worst_error
from tests.parity.comparison import BOUND
from tests.parity.model_cases import LATENTS, TEXT, UNET2, UNET_ONE_LEVEL, UNET_TIMES
from tiue_jax.io.errors import InputError
from tiue_jax.models.layers import guidance_embedding
from tiue_jax.pretrained import configs
from tiue_jax.pretrained.jsonfile import Fields
from tiue_jax.pretrained.names import torch_name
from tiue_jax.pretrained.parameters import param_shapes

DIM = 32
SCALES = np.asarray([8.0, 1.5], np.float32)
# At one level: the way of the time embedding is the same in all.
UNET = UNET_ONE_LEVEL.clone(time_cond_dim=DIM)
FILE = Path("model/unet/config.json")
COND_PROJ = ("time_embedding", "cond_proj", "kernel")


def their_embedding() -> Callable[..., torch.Tensor]:
    """LatentConsistencyModelPipeline's method, out of its file: to import it takes accelerate."""
    folder = Path(diffusers.__file__).parent / "pipelines" / "latent_consistency_models"
    file = folder / "pipeline_latent_consistency_text2img.py"
    name = "get_guidance_scale_embedding"
    (method,) = (
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    names = {"torch": torch}
    exec(compile(ast.Module([method], []), str(file), "exec"), names)
    return lambda w, dim: names[name](None, w, dim)


def _their_unet() -> torch.nn.Module:
    config = configs.unet_config(UNET, 8)
    del config["_class_name"]
    return unet_2d_condition.UNet2DConditionModel(**config)


def _call(module: torch.nn.Module, x, t, text, w) -> torch.Tensor:
    condition = their_embedding()(w - 1, DIM)
    return module(x, t, encoder_hidden_states=text, timestep_cond=condition).sample


CASE = Case(_their_unet, UNET, (LATENTS, UNET_TIMES, TEXT, SCALES), _call)


@pytest.mark.parametrize("dim", [4, 32, 256])
def test_embedding(dim: int) -> None:
    """Equal but for the last bit of a frequency (6e-8), which turns its angle, 1000 (w - 1)."""
    w = np.asarray([1.0, 1.5, 2.0, 4.5, 7.5, 8.0, 14.0], np.float32)
    theirs = their_embedding()(torch.from_numpy(w) - 1, dim).numpy()
    ours = np.asarray(guidance_embedding(jnp.asarray(w), dim))
    assert ours.shape == theirs.shape == (7, dim)
    error = np.abs(ours - theirs).max(axis=1)
    print(f"parity guidance embedding {dim}: {error.max():.1e}, w = 8: {error[5]:.1e}")
    # Worst seen: width 4 and 32 6e-8; width 256 9.6e-4 at w = 14, of angles up to 13000.
    assert (error <= 1e-6 + (8e-8 if dim == 256 else 0.0) * 1000 * (w - 1)).all(), error
    np.testing.assert_array_equal(ours[0], np.repeat([0.0, 1.0], dim // 2))  # w = 1: no guidance


def test_unet_and_that_the_projection_and_the_scale_count() -> None:
    expected, run = golden(CASE), compiled(CASE)
    assert_parity("UNet with guidance", worst_error(run, expected.params, expected))
    flat = flatten_dict(expected.params)
    dropped = unflatten_dict({**flat, COND_PROJ: jnp.zeros_like(flat[COND_PROJ])})
    assert worst_error(run, dropped, expected) > BOUND
    for scales in (SCALES[::-1], SCALES - 1):  # of the other image; w - 1 taken twice
        told = dataclasses.replace(expected, inputs=(*expected.inputs[:3], scales.copy()))
        assert worst_error(run, expected.params, told) > BOUND


def test_names_and_shapes_are_those_of_diffusers() -> None:
    shapes, state = param_shapes(UNET), golden(CASE).module.state_dict()
    assert {torch_name(path) for path in shapes} == state.keys()
    assert torch_name(COND_PROJ) == "time_embedding.cond_proj.weight"
    assert shapes[COND_PROJ] == state[torch_name(COND_PROJ)].shape[::-1] == (DIM, 12)
    assert shapes.keys() - param_shapes(UNET_ONE_LEVEL).keys() == {COND_PROJ}


def test_guidance_is_there_if_and_only_if_the_unet_takes_it() -> None:
    x, t, text, w = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in CASE.inputs)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"guidance: None, but this UNet \(time_cond_dim 32\)"):
        jax.eval_shape(UNET.init, key, x, t, text)
    with pytest.raises(ValueError, match=r"no input for it \(time_cond_dim is None\)"):
        jax.eval_shape(UNET_ONE_LEVEL.init, key, x, t, text, w)


@pytest.mark.parametrize("dim", [None, 4, 256])
def test_configs_survive(dim: int | None) -> None:
    unet = UNET2.clone(time_cond_dim=dim)
    config = configs.unet_config(unet, 64)
    assert config["time_cond_proj_dim"] == dim
    assert configs.unet_from_config(Fields(config, FILE)) == unet
    del config["time_cond_proj_dim"]
    assert configs.unet_from_config(Fields(config, FILE)) == UNET2


@pytest.mark.parametrize("dim", [0, 2, 255, True, 256.0, "256", [256], 1 << 40])
def test_widths_that_we_do_not_implement_are_refused(dim: object) -> None:
    config = configs.unet_config(UNET2, 64) | {"time_cond_proj_dim": dim}
    with pytest.raises(InputError, match=r"\[time_cond_proj_dim\]"):
        configs.unet_from_config(Fields(config, FILE))
