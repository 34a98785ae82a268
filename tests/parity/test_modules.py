"""Every block and every whole model against torch, fp32, at ordinary and at small activations.

Worst seen: layers 5e-7, blocks 1.1e-6 (cross_up_block), parts of the VAE 9e-7 (vae_decoder), whole
models 3.2e-6 (vae_decode; UNets 2.4e-6), the halves at two timesteps 3.0e-6.

Where it comes from: fp32 keeps 6e-8, sums of tens to hundreds of terms are taken in another order,
and a UNet is some thirty layers deep.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.parity.cases import QUIET, assert_parity, compiled, golden, worst_error
from tests.parity.comparison import relative_error, to_torch
from tests.parity.model_cases import CASES, LATENTS, MODEL_CASES, TEXT, UNET_TIMES
from tiue_jax.models.unet import UNet


@pytest.mark.parametrize("name", CASES)
def test_parity_with_torch(name: str):
    case = CASES[name]
    for gain in (1.0, QUIET):
        expected = golden(case, gain)
        error = worst_error(compiled(case), expected.params, expected)
        assert_parity(f"{name} (gain {gain})", error)


def test_log_variance_is_clipped_as_torch_clips_it():
    case = MODEL_CASES["vae_encode"]
    expected = golden(case, 8.0)
    assert expected.outputs[1].min() == -30.0 and expected.outputs[1].max() == 20.0
    assert_parity("clipped", worst_error(compiled(case), expected.params, expected))


def _torch_split(module: torch.nn.Module, x, t_enc, t, text) -> torch.Tensor:
    """diffusers' encoder half at t_enc and decoder half at t, put together from its blocks."""

    def embed(t: torch.Tensor) -> torch.Tensor:
        return module.time_embedding(module.time_proj(t).to(x.dtype))

    def run(block: torch.nn.Module, *args):
        cross = getattr(block, "has_cross_attention", False)
        return block(*args, encoder_hidden_states=text) if cross else block(*args)

    temb, x = embed(t_enc), module.conv_in(x)
    skips = (x,)
    for block in module.down_blocks:
        x, more = run(block, x, temb)
        skips += more
    x, temb = run(module.mid_block, x, temb), embed(t)
    for block in module.up_blocks:
        count = len(block.resnets)
        x, skips = run(block, x, skips[-count:], temb), skips[:-count]
    return module.conv_out(module.conv_act(module.conv_norm_out(x)))


def test_halves_at_two_timesteps():
    """The student's arithmetic; and at one timestep the two halves are the call."""
    case = MODEL_CASES["unet_sd2"]
    expected = golden(case)
    t_enc = np.asarray([751, 999], np.int32)
    with torch.no_grad():
        inputs = map(to_torch, (LATENTS, t_enc, UNET_TIMES, TEXT))
        theirs = _torch_split(expected.module, *inputs).numpy().transpose(0, 2, 3, 1)

    @jax.jit
    def halves(params, x, t_enc, t, text):
        features = case.ours.apply({"params": params}, x, t_enc, text, method=UNet.encode)
        return case.ours.apply({"params": params}, features, t, text, method=UNet.decode)

    arrays = [jnp.asarray(x) for x in (LATENTS, t_enc, UNET_TIMES, TEXT)]
    ours = halves(expected.params, *arrays)
    assert_parity("halves at two timesteps", relative_error(ours, theirs))
    arrays[1] = arrays[2]
    same = halves(expected.params, *arrays)
    call = compiled(case)(expected.params, arrays[0], arrays[2], arrays[3])
    # Both are ours, compiled apart: worst seen 0.0.
    assert relative_error(same, np.asarray(call)) <= 1e-6
