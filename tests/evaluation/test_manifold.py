"""Precision, recall, density, coverage: by hand, against brute force, in chunks."""

import jaxtyping
import numpy as np
import pytest

from tiue_jax.evaluation import manifold
from tiue_jax.evaluation.manifold import density_coverage, precision_recall


def _brute_force(real, fake, k_pr, k_dc):
    """All four numbers by the definitions, one distance at a time."""

    def radius(points, i, k):
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

    def inside_any(point, centres, k):
        return any(
            np.linalg.norm(point - c) <= radius(centres, i, k) for i, c in enumerate(centres)
        )

    precision = np.mean([inside_any(f, real, k_pr) for f in fake])
    recall = np.mean([inside_any(r, fake, k_pr) for r in real])
    hits = np.array(
        [[np.linalg.norm(f - r) <= radius(real, i, k_dc) for f in fake] for i, r in enumerate(real)]
    )
    return precision, recall, hits.sum() / (k_dc * len(fake)), hits.any(axis=1).mean()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("k_pr", "k_dc"), [(3, 5), (1, 1)])
def test_equals_brute_force(seed, k_pr, k_dc):
    rng = np.random.default_rng(seed)
    real, fake = rng.normal(size=(40, 4)), 0.7 * rng.normal(size=(30, 4)) + 0.8
    precision, recall, density, coverage = _brute_force(real, fake, k_pr, k_dc)
    # counts: equal but for the rounding of a division
    assert precision_recall(real, fake, k=k_pr) == pytest.approx((precision, recall), rel=1e-15)
    assert density_coverage(real, fake, k=k_dc) == pytest.approx((density, coverage), rel=1e-15)


def test_on_a_line_by_hand():
    """Reals at 0, 1, 3, 7 have radii 1, 1, 2, 4 (k = 1); fakes at .5, 2.5, 20 have 2, 2, 17.5."""
    real = np.array([[0.0], [1.0], [3.0], [7.0]])
    fake = np.array([[0.5], [2.5], [20.0]])
    # .5 lies in the balls of 0 and 1, 2.5 in that of 3, 20 in none;
    # 0, 1 and 3 lie in the balls of .5 and 2.5, and 7 in that of 20
    assert precision_recall(real, fake, k=1) == (2 / 3, 1.0)
    # .5 lies in two reals' balls, 2.5 in one (7's ball begins at 3), 20 in none
    assert density_coverage(real, fake, k=1) == (3 / 3, 3 / 4)


def test_equal_sets_are_covered():
    features = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    assert precision_recall(features, features) == (1.0, 1.0)
    density, coverage = density_coverage(features, features)
    assert coverage == 1.0
    # every ball holds its centre and its 5 neighbours: (1 + 5) / 5
    assert density == pytest.approx(6 / 5, rel=1e-15)


def test_sets_far_apart_share_nothing():
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(50, 3)), rng.normal(size=(50, 3)) + 1000
    assert precision_recall(real, fake) == (0.0, 0.0)
    assert density_coverage(real, fake) == (0.0, 0.0)


def test_collapsed_fakes_are_precise_without_recall():
    """Copies of one real: inside of its ball, and with balls of radius 0 themselves."""
    real = np.random.default_rng(2).normal(size=(50, 3)) + 100
    fake = np.repeat(real[:1], 20, axis=0)
    assert precision_recall(real, fake) == (1.0, 1 / 50)


def test_chunks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(3)
    real, fake = rng.normal(size=(70, 5)), rng.normal(size=(45, 5))
    whole = precision_recall(real, fake), density_coverage(real, fake)
    monkeypatch.setattr(manifold, "CHUNK_BYTES", 8 * 70 * 7)
    assert (precision_recall(real, fake), density_coverage(real, fake)) == whole


def test_a_large_common_offset_does_not_matter():
    rng = np.random.default_rng(4)
    real, fake = rng.normal(size=(40, 4)), rng.normal(size=(40, 4))
    assert density_coverage(real + 2.0**20, fake + 2.0**20) == density_coverage(real, fake)


@pytest.fixture
def unchecked():
    """Without the suite's shape checks, as users run it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("statistic", [precision_recall, density_coverage])
def test_refuses_sets_that_are_too_small_or_not_finite(unchecked, statistic):
    good = np.zeros((10, 2))
    with pytest.raises(ValueError, match="too few for k = 3"):
        statistic(good, good[:3], k=3)
    with pytest.raises(ValueError, match="fake: features must be finite"):
        statistic(good, np.full((10, 2), np.inf))
    with pytest.raises(ValueError, match="differ in size: 2 and 3"):
        statistic(good, np.zeros((10, 3)))
    with pytest.raises(ValueError, match="at least 1"):
        statistic(good, good, k=0)
