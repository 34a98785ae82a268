"""LoRA as peft computes it in torch: base(x) + alpha / rank * B(A(x)) in place of base(x)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.parity.cases import assert_parity, compiled, golden
from tests.parity.comparison import from_torch, normal, relative_error, to_torch
from tests.parity.model_cases import MODEL_CASES
from tiue_jax.models.lora import init_lora, merge_lora
from tiue_jax.pretrained.names import torch_name

RANK, ALPHA = 3, 5.0


def _attach(module: torch.nn.Module, lora) -> None:
    """Adds scale * B(A(x)) to the output of every linear layer that `lora` names."""
    pairs = flatten_dict(lora)
    for path in {path[:-1] for path in pairs}:
        name = torch_name((*path, "kernel")).removesuffix(".weight")
        a, b = (torch.from_numpy(np.array(pairs[(*path, part)])).T for part in ("a", "b"))

        def add(layer, inputs, output, a=a, b=b):
            down = torch.nn.functional.linear(inputs[0], a)
            return output + ALPHA / RANK * torch.nn.functional.linear(down, b)

        module.get_submodule(name).register_forward_hook(add)


@pytest.mark.parametrize("targets", [("to_q", "to_v"), ("to_q", "to_k", "to_v", "to_out_0")])
def test_merged_lora_is_torch_lora(targets: tuple[str, ...]):
    """Worst seen: 2.5e-6 (the merged kernel rounds once more than two products do)."""
    case = MODEL_CASES["unet_sd2"]
    expected = golden(case)
    flat = flatten_dict(init_lora(jax.random.key(0), expected.params, RANK, targets))
    for i, (path, x) in enumerate(flat.items()):
        if path[-1] == "b":
            flat[path] = jnp.asarray(normal(*x.shape, seed=i, std=0.1))
    lora = unflatten_dict(flat)
    module = case.theirs()
    module.load_state_dict(expected.module.state_dict())
    _attach(module.eval(), lora)
    with torch.no_grad():
        theirs = from_torch(case.call(module, *map(to_torch, expected.inputs)))
    assert relative_error(theirs, expected.outputs[0]) > 0.03  # the LoRA says something
    merged = merge_lora(expected.params, lora, ALPHA / RANK)
    ours = compiled(case)(merged, *map(jnp.asarray, expected.inputs))
    assert_parity(f"LoRA on {', '.join(targets)}", relative_error(ours, theirs))
