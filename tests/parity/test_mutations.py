"""A model with a mistake in it fails the parity tests: every mistake here is beyond their bound.

Each test applies one mutation to ours (to its parameters, its options or its code) and asserts that
the comparison of test_modules.py then exceeds `BOUND`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.parity.auxiliary_cases import FIRST_EOS, clip_module
from tests.parity.cases import QUIET, Case, compiled, golden, worst_error
from tests.parity.comparison import BOUND, normal, relative_error, to_torch
from tests.parity.model_cases import CASES
from tiue_jax.models import clip, layers, unet, vae

Params = dict[tuple[str, ...], jax.Array]


def assert_caught(what: str, error: float) -> None:
    """Raises AssertionError if a parity test would still pass; prints how far beyond it is."""
    print(f"mutation {what}: {error:.1e} of the largest value")
    assert error > BOUND, f"{what} is not caught: error {error:.1e}, bound {BOUND:.0e}"


def fresh(case: Case) -> Callable[..., Any]:
    """`compiled`, traced anew: what was compiled before the mutation must not be used again."""
    return compiled.__wrapped__(case)


# --- Parameters -----------------------------------------------------------------------------------


# Of these dropping has no effect. A key bias adds q . b to all scores of a query alike, which the
# softmax takes out again; the halves of a VAE or a CLIP do not touch each other.
KEY_BIASES = (("to_k", "bias"), ("k_proj", "bias"))
UNUSED = {
    "encode": ("decoder", "post_quant_conv"),
    "decode": ("encoder", "quant_conv"),
    "encode_text": ("vision_model", "visual_projection"),
    "encode_image": ("text_model", "text_projection"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_counts(name: str):
    """Dropping any one bias (to 0), norm scale (to 1), kernel or embedding (to 0) is caught."""
    case = CASES[name]
    expected = golden(case)
    run = compiled(case)
    flat = flatten_dict(expected.params)
    errors = {}
    for path, value in flat.items():
        dropped = jnp.ones_like(value) if path[-1] == "scale" else jnp.zeros_like(value)
        error = worst_error(run, unflatten_dict({**flat, path: dropped}), expected)
        if path[-2:] in KEY_BIASES or path[0] in UNUSED.get(case.method or "", ()):
            assert error <= BOUND
        else:
            errors["/".join(path)] = error
    if errors:
        least = min(errors, key=errors.__getitem__)
        assert_caught(f"{name}: {least} dropped", errors[least])


def _swap(params: Params, first: str, second: str) -> Params:
    """The same parameters with those of every layer called `first` and its `second` exchanged."""
    names = {first: second, second: first}
    return {tuple(names.get(part, part) for part in path): x for path, x in params.items()}


def _geglu_halves(params: Params) -> Params:
    """Value and gate exchanged."""

    def roll(path: tuple[str, ...], x: jax.Array) -> jax.Array:
        return jnp.roll(x, x.shape[-1] // 2, -1) if path[-2] == "proj" else x

    return {path: roll(path, x) for path, x in params.items()}


def _each_conv(change: Callable[[jax.Array], jax.Array]) -> Callable[[Params], Params]:
    def mutate(params: Params) -> Params:
        return {path: change(x) if x.ndim == 4 else x for path, x in params.items()}

    return mutate


PARAMETER_MUTATIONS: dict[str, tuple[Callable[[Params], Params], tuple[str, ...]]] = {
    "swap k and v": (
        lambda params: _swap(params, "to_k", "to_v"),
        ("attention_self", "attention_cross", "transformer_block", "transformer_linear")
        + ("vae_mid_attention", "vae_encode", "vae_decode", "unet_sd1", "unet_sd2"),
    ),
    "swap k and v in the text encoder": (
        lambda params: _swap(params, "k_proj", "v_proj"),
        ("clip_layer_gelu", "text_quick_gelu", "text_gelu"),
    ),
    "swap q and k in the text encoder": (
        lambda params: _swap(params, "q_proj", "k_proj"),
        ("clip_layer_gelu", "text_quick_gelu"),
    ),
    "swap the norms of a transformer": (
        lambda params: _swap(params, "norm1", "norm2"),
        ("transformer_block", "transformer_conv"),
    ),
    "swap value and gate of GEGLU": (_geglu_halves, ("feed_forward", "unet_sd1")),
    "flip kernels": (
        _each_conv(lambda x: x[::-1, ::-1]),
        ("conv", "resnet", "downsample", "upsample", "unet_sd1", "vae_decode")
        + ("taesd_encode", "taesd_decode", "clip_vision_tower"),
    ),
    "swap height and width of kernels": (
        _each_conv(lambda x: x.transpose(1, 0, 2, 3)),
        ("conv", "resnet", "downsample", "unet_sd2", "vae_encode"),
    ),
}


@pytest.mark.parametrize("what", PARAMETER_MUTATIONS)
def test_mutated_parameters_are_caught(what: str):
    mutate, names = PARAMETER_MUTATIONS[what]
    for name in names:
        case = CASES[name]
        expected = golden(case)
        params = unflatten_dict(mutate(flatten_dict(expected.params)))
        assert_caught(f"{what}: {name}", worst_error(compiled(case), params, expected))


# --- Options --------------------------------------------------------------------------------------

OPTION_MUTATIONS: dict[str, tuple[str, nn.Module]] = {
    "half the heads": ("attention_cross", layers.Attention(1)),
    "twice the heads": ("attention_self", layers.Attention(4)),
    "heads of the text encoder": ("clip_layer_gelu", clip.CLIPLayer(4, 40, "gelu", 1e-5)),
    "gelu for quick_gelu": ("clip_layer_quick_gelu", clip.CLIPLayer(2, 40, "gelu", 1e-5)),
    "quick_gelu for gelu": ("clip_layer_gelu", clip.CLIPLayer(2, 40, "quick_gelu", 1e-5)),
    "a causal vision tower": (
        "clip_vision_layer",
        clip.CLIPLayer(3, 36, "quick_gelu", 1e-5),
    ),
    "a vision tower's other activation": ("clip_image_gelu", clip_module("quick_gelu", FIRST_EOS)),
    "the largest id for the first end": ("clip_text_first_gelu", clip_module("gelu", 2)),
    "the first end for the largest id": ("clip_text_legacy_gelu", clip_module("gelu", FIRST_EOS)),
    "half the groups": ("group_norm", layers.GroupNorm(2, 1e-5)),
    "groups of a resnet": ("resnet_skip_straddling", layers.ResnetBlock(16, 2)),
    "the UNet's padding in the VAE": ("downsample_vae", layers.Downsample(8)),
    "the VAE's padding in the UNet": ("downsample", layers.Downsample(8, vae.RIGHT_AND_BELOW)),
}


@pytest.mark.parametrize("what", OPTION_MUTATIONS)
def test_mutated_options_are_caught(what: str):
    name, mutant = OPTION_MUTATIONS[what]
    expected = golden(CASES[name])
    error = worst_error(compiled(CASES[name], mutant), expected.params, expected)
    assert_caught(f"{what}: {name}", error)


# --- Epsilons -------------------------------------------------------------------------------------

NORMS = {
    "resnet_skip_straddling": ("norm1", "norm2"),
    "resnet_vae": ("norm1", "norm2"),
    "transformer_conv": ("norm", *(f"transformer_blocks_0/norm{i}" for i in (1, 2, 3))),
    "vae_mid_attention": ("group_norm",),
    "vae_encoder": ("conv_norm_out",),
    "vae_decoder": ("conv_norm_out",),
    "unet_one_level": ("conv_norm_out",),
    "clip_layer_gelu": ("layer_norm1", "layer_norm2"),
    "text_gelu": ("text_model/final_layer_norm",),
    "clip_vision_tower": ("pre_layrnorm",),  # it brings what follows to order 1
}


@pytest.mark.parametrize(("name", "path"), [(name, p) for name in NORMS for p in NORMS[name]])
def test_mutated_epsilon_is_caught(name: str, path: str):
    """1e-6 for 1e-5 or the other way round, in one place: seen where the variance is about 1e-4."""
    found = []

    def intercept(call, args, kwargs, context):
        module = context.module
        if "/".join(module.path) == path and context.method_name == "__call__":
            field = "epsilon" if isinstance(module, nn.LayerNorm) else "eps"
            found.append(getattr(module, field))
            object.__setattr__(module, field, {1e-5: 1e-6, 1e-6: 1e-5}[found[-1]])
        return call(*args, **kwargs)

    expected = golden(CASES[name], QUIET)
    with nn.intercept_methods(intercept):
        error = worst_error(fresh(CASES[name]), expected.params, expected)
    assert len(found) == 1
    assert_caught(f"epsilon {found[0]} of {name} {path}", error)


# --- Code -----------------------------------------------------------------------------------------

_attend, _gelu, _moments = jax.nn.dot_product_attention, nn.gelu, layers.channel_moments
_sinusoids = layers.timestep_embedding


def _unbiased(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean, var = _moments(x)
    count = x.shape[1] * x.shape[2]
    return mean, var * count / (count - 1)


CODE_MUTATIONS: dict[str, tuple[Any, str, Callable[..., Any], tuple[str, ...]]] = {
    "no causal mask": (
        jax.nn,
        "dot_product_attention",
        lambda q, k, v, is_causal=False: _attend(q, k, v),
        ("clip_layer_gelu", "text_quick_gelu"),
    ),
    "scores not scaled": (
        jax.nn,
        "dot_product_attention",
        lambda q, k, v, is_causal=False: _attend(q, k, v, scale=1.0, is_causal=is_causal),
        ("attention_cross", "vae_mid_attention", "clip_layer_gelu"),
    ),
    "tanh for the exact gelu": (
        nn,
        "gelu",
        lambda x, approximate: _gelu(x, approximate=True),
        ("feed_forward", "clip_layer_gelu"),
    ),
    "relu for silu": (nn, "silu", nn.relu, ("resnet", "time_embedding", "vae_decoder")),
    "sine before cosine": (
        layers,
        "timestep_embedding",
        lambda t, dim: jnp.roll(_sinusoids(t, dim), dim // 2, -1),
        ("time_sinusoids",),
    ),
    "sine before cosine in the UNet": (
        unet,
        "timestep_embedding",
        lambda t, dim: jnp.roll(_sinusoids(t, dim), dim // 2, -1),
        ("unet_one_level",),
    ),
    "unbiased variance": (
        layers,
        "channel_moments",
        _unbiased,
        ("group_norm", "resnet_skip_straddling", "vae_mid_attention"),
    ),
    "skips in the order of the way down": (
        unet,
        "reversed",
        lambda x: x if isinstance(x, tuple) else reversed(x),
        ("up_block",),
    ),
}


@pytest.mark.parametrize("what", CODE_MUTATIONS)
def test_mutated_code_is_caught(what: str, monkeypatch: pytest.MonkeyPatch):
    module, name, replacement, cases = CODE_MUTATIONS[what]
    monkeypatch.setattr(module, name, replacement, raising=name != "reversed")
    for case in cases:
        expected = golden(CASES[case])
        error = worst_error(fresh(CASES[case]), expected.params, expected)
        assert_caught(f"{what}: {case}", error)


def test_skip_before_input_is_caught():
    case = CASES["resnet_skip_aligned"]
    expected = golden(case)
    x, temb, skip = expected.inputs
    swapped = dataclasses.replace(expected, inputs=(skip, temb, x))
    assert_caught("skip before x", worst_error(compiled(case), expected.params, swapped))


# --- GroupNorm of an input far from zero ----------------------------------------------------------

# Mean / std is 1000: rounding a mean of 100 to fp32 (4e-6) alone moves the output by 4e-5, 1e-5 of
# its largest value. Worst seen against float64: ours 2.7e-5, torch 2.8e-5.
FAR_BOUND = 1e-4


def test_group_norm_far_from_zero():
    """Mean 100, std 0.1: ours is right, and Flax's default variance, E[x^2] - E[x]^2, is wrong."""
    case = CASES["group_norm"]
    params = golden(case).params
    x = normal(*case.inputs[0].shape, mean=100.0, std=0.1)
    with torch.no_grad():
        module = golden(case).module
        theirs = module(to_torch(x)).numpy().transpose(0, 2, 3, 1)
        exact = module.double()(to_torch(x).double()).numpy().transpose(0, 2, 3, 1)
        module.float()
    ours = compiled(case)(params, jnp.asarray(x))
    error, their_error = relative_error(ours, exact), relative_error(theirs, exact)
    print(
        f"parity GroupNorm at mean 100, against float64: ours {error:.1e}, torch {their_error:.1e}"
    )
    assert error <= FAR_BOUND
    assert relative_error(ours, theirs) <= FAR_BOUND
    fast = nn.GroupNorm(case.ours.groups, epsilon=1e-5).apply({"params": params}, jnp.asarray(x))
    assert_caught("fast variance, mean 100", relative_error(fast, exact))
    assert relative_error(fast, exact) > 0.1  # not a matter of tolerances


def test_group_norm_mutated_to_fast_variance_is_caught(monkeypatch: pytest.MonkeyPatch):
    """The mistake put into ours: unseen at mean 0, caught at mean 100, also with a skip."""

    def fast_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = x.mean((1, 2))
        return mean, jnp.square(x).mean((1, 2)) - jnp.square(mean)

    case = CASES["group_norm"]
    expected = golden(case)
    x = normal(*case.inputs[0].shape, mean=100.0, std=0.1)
    right = compiled(case)(expected.params, jnp.asarray(x))
    monkeypatch.setattr(layers, "channel_moments", fast_moments)
    mutant = fresh(case)
    assert worst_error(mutant, expected.params, expected) <= BOUND
    error = relative_error(mutant(expected.params, jnp.asarray(x)), np.asarray(right))
    assert_caught("fast variance in ours, mean 100", error)
