"""Fidelity and diversity from nearest neighbours: precision, recall, density, coverage.

Each set of features stands for its manifold: a ball around every feature, as wide as the distance
to its k-th nearest neighbour in the same set (itself left out).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

CHUNK_BYTES = 64 * 2**20  # of a block of the distance matrix
ROUNDING = 1e-13  # of |a|^2 + |b|^2: float64's error in a squared distance, with a margin


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density is at least 0 and may exceed 1; coverage is in [0, 1]."""

    density: float
    coverage: float


def precision_recall(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, k: int = 3
) -> PrecisionRecall:
    """Precision: fakes inside of some real ball; recall: reals inside of some fake ball.

    Args:
        real: reference features.
        fake: features of generated pictures.
        k: neighbour that sets a ball's radius.

    Raises:
        ValueError: a set has k features or fewer, a value is not finite, or the sizes d differ.

    Source: Kynkaanniemi et al. 2019, eq. 1 and 2.
    """
    real, fake = _checked(real, fake, k)
    return PrecisionRecall(
        float(_inside(fake, real, _squared_radii(real, k)).mean()),
        float(_inside(real, fake, _squared_radii(fake, k)).mean()),
    )


def density_coverage(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, k: int = 5
) -> DensityCoverage:
    """Density: real balls that hold a fake, over k, on average; coverage: real balls with a fake.

    Args, Raises: as `precision_recall`.

    Source: Naeem et al. 2020, eq. 4 and 6. Differs: a fake exactly on a ball's surface counts as
        inside, as in precision and recall.
    """
    real, fake = _checked(real, fake, k)
    radii = _squared_radii(real, k)
    holding = 0
    covered = np.zeros(len(real), bool)
    for _, squared in _distance_blocks(fake, real):
        inside = squared <= radii
        holding += int(inside.sum())
        covered |= inside.any(axis=0)
    return DensityCoverage(holding / (k * len(fake)), float(covered.mean()))


def _checked(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], k: int
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    """Both sets in float64, moved so that the middle of the real ones is 0 (rounding)."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features differ in size: {real.shape[1]} and {fake.shape[1]}")
    for name, features in (("real", real), ("fake", fake)):
        if len(features) <= k:
            raise ValueError(f"{name}: {len(features)} features are too few for k = {k}")
        if not np.isfinite(features).all():
            raise ValueError(f"{name}: features must be finite")
    middle = real.mean(axis=0)
    return real - middle, fake - middle


def _distance_blocks(
    rows: Float[np.ndarray, "n d"], columns: Float[np.ndarray, "m d"]
) -> Iterator[tuple[int, Float[np.ndarray, "b m"]]]:
    """Squared distances of a block of rows to all columns, with the index of its first row.

    |a|^2 + |b|^2 - 2 a.b; what is within its rounding error of 0 is 0, so that equal features are.
    """
    norms_rows, norms_columns = (np.einsum("nd,nd->n", x, x) for x in (rows, columns))
    step = max(1, CHUNK_BYTES // (8 * max(len(columns), 1)))
    for start in range(0, len(rows), step):
        sums = norms_rows[start : start + step, None] + norms_columns
        squared = sums - 2 * (rows[start : start + step] @ columns.T)
        yield start, np.where(squared <= ROUNDING * sums, 0.0, squared)


def _squared_radii(features: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, "n"]:
    """Squared distance of each feature to its k-th nearest neighbour other than itself."""
    radii = np.empty(len(features))
    for start, squared in _distance_blocks(features, features):
        own = np.arange(len(squared))
        squared[own, start + own] = np.inf
        radii[start : start + len(squared)] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _inside(
    points: Float[np.ndarray, "n d"],
    centres: Float[np.ndarray, "m d"],
    squared_radii: Float[np.ndarray, "m"],
) -> Bool[np.ndarray, "n"]:
    """Whether each point lies in the ball of at least one centre."""
    return np.concatenate(
        [(sq <= squared_radii).any(axis=1) for _, sq in _distance_blocks(points, centres)]
    )
