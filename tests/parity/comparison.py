"""Random weights, layouts, and the measure of an error: what every parity test uses.

Bound of all fp32 comparisons: 1e-5 of the largest absolute value of torch's output. Both sides
compute in fp32 and differ in the order of their sums alone.
"""

from typing import Any

import numpy as np
import torch

BOUND = 1e-5
NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every parameter anew, zero-initialised ones and norm scales too, so that none hides.

    Kernels: normal with std 1/sqrt(fan_in), which keeps activations of order 1; norm scales
    U(0.5, 1.5), biases N(0, 0.3^2), embeddings N(0, 1).
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                if name == "bias":
                    value.normal_(0.0, 0.3, generator=draw)
                elif isinstance(part, NORMS):
                    value.uniform_(0.5, 1.5, generator=draw)
                elif isinstance(part, torch.nn.Embedding):
                    value.normal_(0.0, 1.0, generator=draw)
                else:
                    value.normal_(0.0, value[0].numel() ** -0.5, generator=draw)
    return module.eval()


def normal(*shape: int, seed: int = 1, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """fp32 normal draws."""
    return np.random.default_rng(seed).normal(mean, std, shape).astype(np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    """As a tensor; images [b, h, w, c] become [b, c, h, w].

    Contiguous: on a channels-last tensor torch's CPU GroupNorm computes E[x^2] - E[x]^2, which is
    5 % wrong at mean 100, std 0.1.
    """
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x))


def from_torch(x: torch.Tensor) -> np.ndarray:
    """As an array; images [b, c, h, w] become [b, h, w, c]."""
    value = x.detach().numpy()
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value


def relative_error(ours: Any, theirs: np.ndarray) -> float:
    """Largest absolute difference, as a fraction of torch's largest absolute value."""
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape, f"shapes {ours.shape} and {theirs.shape}"
    assert np.isfinite(theirs).all(), "torch's own output is not finite"
    error = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
    return error if np.isfinite(error) else float("inf")
