"""The Frechet distance between two sets of features (FID, where the features are Inception's)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Moments(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of features, float64."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """Mean and covariance (divided by n - 1) of n >= 2 features, in float64.

    Raises:
        ValueError: fewer than two features, or one that is not finite.
    """
    features = np.asarray(features, np.float64)
    if features.shape[0] < 2:
        raise ValueError(f"a covariance needs at least 2 features, got {features.shape[0]}")
    if not np.isfinite(features).all():
        raise ValueError("features must be finite")
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (features.shape[0] - 1))


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)).

    C_a C_b has the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric and positive
    semidefinite: its trace norm is the sum of the singular values of C_a^(1/2) C_b^(1/2). No
    general matrix square root is taken, so singular covariances (fewer features than dimensions)
    need no offset and give no imaginary part.

    Returns:
        The squared distance, in squared units of the features; at least 0.

    Source: Dowson and Landau 1982, eq. 4; Heusel et al. 2017 (FID), eq. 6.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features differ in size: {a.mean.shape[0]} and {b.mean.shape[0]}")
    difference = a.mean - b.mean
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(difference @ difference + spread, 0.0))


def frechet_distance(
    features_a: Float[np.ndarray, "n d"], features_b: Float[np.ndarray, "m d"]
) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features.

    It is biased upwards by a term of order 1 / number of features: compare only distances of
    equal n and m.

    Raises:
        ValueError: see `moments`; or the sizes d differ.
    """
    return frechet_distance_of_moments(moments(features_a), moments(features_b))


def _root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """Symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
