"""Counting arithmetic, by hand numbers and by the published UNet."""

import jax
import jax.numpy as jnp
import pytest

from tiue_jax.models.variants import variant
from tiue_jax.training.flops import traced_flops

A, B = jnp.ones((3, 4)), jnp.ones((4, 5))
X, K = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 6))
PRODUCT, STRIDED = 2 * 3 * 4 * 5, 2 * (2 * 4 * 4 * 6) * 27


def conv(x, k):
    return jax.lax.conv_general_dilated(
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_products() -> None:
    assert traced_flops(lambda a, b: a @ b, A, B) == PRODUCT
    batched = jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))
    assert traced_flops(lambda a, b: jnp.einsum("xij,xjk->xik", a, b), *batched) == 7 * PRODUCT
    assert traced_flops(lambda a, b: a[..., :1] + b[:3, :1], A, B) == 0


def test_convolutions_and_their_gradients() -> None:
    assert traced_flops(conv, X, K) == STRIDED
    gradient = jax.grad(lambda x, k: jnp.sum(conv(x, k)), (0, 1))
    assert traced_flops(gradient, X, K) == 3 * STRIDED  # forward, of the input, of the kernel


def test_loops_and_branches_and_what_is_computed_again() -> None:
    def loop(a, b):
        return jax.lax.scan(lambda c, _: (c + jnp.sum(a @ b), None), 0.0, None, length=9)[0]

    assert traced_flops(loop, A, B) == 9 * PRODUCT
    assert traced_flops(jax.jit(loop), A, B) == 9 * PRODUCT
    choice = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b @ b.T @ b)  # noqa: E731
    assert traced_flops(choice, A, B) == 3 * PRODUCT

    def loss(a, b):
        return jnp.sum(jnp.tanh(a @ b))

    plain = traced_flops(jax.grad(loss), A, B)
    again = traced_flops(jax.grad(jax.checkpoint(loss)), A, B)
    assert (plain, again) == (2 * PRODUCT, 3 * PRODUCT)


def test_the_unet_of_stable_diffusion() -> None:
    """402 G multiply-adds at 64 x 64 latents (the count published for SD 1.5)."""
    unet = variant("sd15").unet
    z, t, c = jnp.zeros((1, 64, 64, 4)), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 77, 768))
    params = jax.eval_shape(lambda key: unet.init(key, z, t, c)["params"], jax.random.key(0))
    flops = traced_flops(lambda p: unet.apply({"params": p}, z, t, c), params)
    assert flops / 2 == pytest.approx(402e9, rel=2e-3)
