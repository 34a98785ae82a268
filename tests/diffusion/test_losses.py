"""The losses: hand numbers, torch, and where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tiue_jax.diffusion import losses


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_guidance() -> None:
    null, cond = jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0])
    np.testing.assert_array_equal(losses.classifier_free_guidance(null, cond, 1.0), cond)
    np.testing.assert_array_equal(losses.classifier_free_guidance(null, cond, 4.5), [10.0, -2.5])


def test_vsd_gradient_is_weighted_and_what_is_not_finite_moves_nothing() -> None:
    eps_teacher = jnp.array([1.0, jnp.nan]).reshape(2, 1, 1, 1)
    eps_lora = jnp.array([0.5, 1.0]).reshape(2, 1, 1, 1)
    sigma = jnp.array([0.5, 1.0]).reshape(2, 1, 1, 1)
    g = losses.vsd_gradient(eps_teacher, eps_lora, sigma)
    np.testing.assert_array_equal(g.reshape(-1), [0.125, jnp.nan])  # so that it is seen
    x0 = jnp.zeros((2, 1, 1, 1))
    np.testing.assert_allclose(
        jax.grad(losses.vsd_loss)(x0, g).reshape(-1), [0.125 / 2, 0.0], rtol=1e-6
    )


def test_vsd_loss_has_the_given_gradient() -> None:
    x0, g = normal((2, 4, 4, 4)), normal((2, 4, 4, 4), 1)
    value, gradient = jax.value_and_grad(losses.vsd_loss)(x0, g)
    assert float(value) == pytest.approx(
        0.5 * float(jnp.mean(g**2)), rel=1e-5
    )  # fp32: x0 - (x0 - g)
    np.testing.assert_allclose(
        gradient, g / g.size, atol=1e-8
    )  # the same rounding; worst seen 1e-9


def test_kl_is_zero_for_standardised_maps_and_sums_over_maps() -> None:
    eps = normal((2, 3, 4, 4, 4))
    mean = eps.mean(axis=(2, 3, 4), keepdims=True)
    std = eps.std(axis=(2, 3, 4), ddof=1, keepdims=True)
    standard = (eps - mean) / std
    assert float(losses.kl_loss(standard)) == pytest.approx(0.0, abs=1e-5)  # fp32; worst seen 7e-7
    # mean 0.5, variance 4: -0.5 (1 + log 4 - 0.25 - 4) = 0.93185..., six maps of it
    expected = 6 * -0.5 * (1 + np.log(4.0) - 0.25 - 4.0)
    assert float(losses.kl_loss(2.0 * standard + 0.5)) == pytest.approx(expected, rel=1e-5)


def test_kl_is_that_of_torch() -> None:
    eps = 1.7 * normal((2, 3, 4, 4, 4)) + 0.2
    maps = torch.tensor(np.asarray(eps)).reshape(6, -1)
    mean, var = maps.mean(dim=1), maps.var(dim=1)
    expected = (-0.5 * (1 + torch.log(var) - mean**2 - var)).sum()
    assert float(losses.kl_loss(eps)) == pytest.approx(float(expected), rel=1e-5)  # fp32 sums


def test_kl_of_bfloat16_maps_is_in_fp32() -> None:
    eps = (normal((1, 1, 64, 64, 4)) * 0.99).astype(jnp.bfloat16)
    value = losses.kl_loss(eps)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(losses.kl_loss(eps.astype(jnp.float32))), rel=1e-6)


def test_lora_loss() -> None:
    eps, noise = normal((2, 2, 2, 4)), normal((2, 2, 2, 4), 1)
    alpha = jnp.array([0.5, 1.0]).reshape(2, 1, 1, 1)
    expected = np.mean((np.asarray(alpha) * (np.asarray(eps) - np.asarray(noise))) ** 2)
    assert float(losses.lora_loss(eps, noise, alpha)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("tau", "scale"), [(0.35, 1.0), (2.0, 1.0), (2.0, 1e-9), (-2.0, 1.0)])
def test_clip_loss_and_its_gradient_are_those_of_torch(tau: float, scale: float) -> None:
    """Ordinary features, features shorter than the epsilon of the norm, and a loss that is 0."""
    text, image = normal((3, 8)), normal((3, 8), 1) * scale
    ours, gradient = jax.value_and_grad(losses.clip_loss, argnums=1)(text, image, tau)
    theirs = torch.tensor(np.asarray(image), requires_grad=True)
    cosine = torch.cosine_similarity(torch.tensor(np.asarray(text)), theirs)
    expected = torch.relu(tau - cosine.mean())
    expected.backward()
    assert theirs.grad is not None
    assert float(ours) == pytest.approx(expected.item(), rel=1e-5)
    if scale == 1.0:  # below its epsilon torch differentiates as if the norm counted
        np.testing.assert_allclose(gradient, theirs.grad, atol=1e-6)  # worst seen 2e-8


def test_clip_loss_by_hand() -> None:
    text, image = jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.array([[4.0, 3.0], [0.0, 2.0]])
    assert float(losses.clip_loss(text, image, 0.5)) == pytest.approx(0.5 - 0.96 / 2, rel=1e-5)
    assert float(losses.clip_loss(text, image, 0.4)) == 0.0
    half = losses.clip_loss(text.astype(jnp.bfloat16), image.astype(jnp.bfloat16), 0.5)
    assert half.dtype == jnp.float32


def test_clip_loss_of_empty_features_has_a_finite_gradient() -> None:
    zeros = jnp.zeros((2, 4))
    value, gradient = jax.value_and_grad(losses.clip_loss, argnums=1)(normal((2, 4)), zeros, 0.35)
    assert float(value) == pytest.approx(0.35)
    assert np.isfinite(gradient).all()
