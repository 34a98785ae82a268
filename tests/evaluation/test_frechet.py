"""Frechet distance: analytic cases, scipy's matrix square root, degenerate covariances."""

import jaxtyping
import numpy as np
import pytest
import scipy.linalg

from tiue_jax.evaluation.frechet import (
    Moments,
    frechet_distance,
    frechet_distance_of_moments,
    moments,
)


def _random_moments(rng, d):
    root = rng.normal(size=(d, d))
    return Moments(rng.normal(size=d), root @ root.T / d + 0.01 * np.eye(d))


def test_moments_are_numpys():
    features = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    got = moments(features)
    np.testing.assert_allclose(got.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    # float64 sums in another order; worst seen 2e-16
    np.testing.assert_allclose(
        got.covariance, np.cov(features.astype(np.float64), rowvar=False), atol=1e-14
    )


def test_one_dimension_by_hand():
    """(m1 - m2)^2 + (s1 - s2)^2 for standard deviations s."""
    a = Moments(np.array([1.0]), np.array([[4.0]]))
    b = Moments(np.array([4.0]), np.array([[25.0]]))
    assert frechet_distance_of_moments(a, b) == pytest.approx(9 + 9, rel=1e-14)


def test_commuting_covariances_by_hand():
    """Diagonal covariances: the sum over dimensions of (s1 - s2)^2."""
    a = Moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = Moments(np.array([0.0, 0.0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance_of_moments(a, b) == pytest.approx(4 + 1 + 0 + 4, rel=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_equals_scipys_matrix_square_root(seed):
    rng = np.random.default_rng(seed)
    a, b = _random_moments(rng, 20), _random_moments(rng, 20)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    gap = a.mean - b.mean
    expected = gap @ gap + np.trace(a.covariance + b.covariance) - 2 * np.trace(root.real)
    # the root of a non-normal product loses digits in scipy; worst seen 4e-14
    assert frechet_distance_of_moments(a, b) == pytest.approx(expected, rel=1e-10)


def test_symmetric_and_zero_for_equal_sets():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(200, 16)), 1.5 * rng.normal(size=(300, 16)) + 0.2
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    # sums of 16 eigenvalues of order 1 cancel; worst seen 1e-14
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_moving_a_set_adds_the_squared_shift():
    features = np.random.default_rng(2).normal(size=(100, 8))
    shift = np.arange(8.0)
    got = frechet_distance(features, features + shift)
    assert got == pytest.approx(shift @ shift, rel=1e-12)


def test_fewer_features_than_dimensions():
    """Singular covariances: scaling a set by 2 costs |mean|^2 + tr C, exactly."""
    features = np.random.default_rng(3).normal(size=(10, 64))
    mean, covariance = moments(features)
    got = frechet_distance(features, 2 * features)
    # roots of eigenvalues that are 0 up to rounding: sqrt(1e-16); worst seen 2e-8
    assert got == pytest.approx(mean @ mean + np.trace(covariance), rel=1e-6)


@pytest.fixture
def unchecked():
    """Without the suite's shape checks, as users run it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "finite"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "differ in size: 3 and 4"),
    ],
)
def test_refuses_what_has_no_distance(unchecked, a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)
