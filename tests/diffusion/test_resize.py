"""Bicubic resizing beside torch's, forward and backward.

Bound: 1e-5 for values and gradients of order 1, both rounded in fp32. Worst seen: 7.6e-7 in values,
3.0e-6 in gradients. From 512 pixels 5e-5 for gradients (worst seen 1.5e-5): torch rounds positions
of about 500 one way in its forward pass, which ours follows, and another in its backward pass.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tiue_jax.diffusion.resize import bicubic_matrix, resize_bicubic

SIZES = [(5, 3, 11), (16, 24, 37), (64, 37, 9), (32, 32, 32), (128, 128, 224), (512, 384, 224)]


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_images_and_gradients_are_those_of_torch(height: int, width: int, size: int) -> None:
    draw = np.random.default_rng(0)
    images = draw.uniform(0.0, 1.0, (2, height, width, 3)).astype(np.float32)
    direction = draw.normal(0.0, 1.0, (2, size, size, 3)).astype(np.float32)
    theirs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    resized = torch.nn.functional.interpolate(
        theirs, size=(size, size), mode="bicubic", align_corners=False, antialias=False
    )
    resized.backward(torch.from_numpy(direction.transpose(0, 3, 1, 2).copy()))

    @jax.jit
    def ours(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda x: resize_bicubic(x, size), images)
        return value, pull(jnp.asarray(direction))[0]

    assert theirs.grad is not None
    for name, found, tensor in zip(
        ("images", "gradients"), ours(jnp.asarray(images)), (resized, theirs.grad), strict=True
    ):
        expected = tensor.detach().numpy().transpose(0, 2, 3, 1)
        worst = float(np.abs(np.asarray(found) - expected).max() / max(1.0, np.abs(expected).max()))
        print(f"resize {height}x{width} -> {size}, {name}: {worst:.1e}")
        assert worst <= (5e-5 if name == "gradients" and height >= 512 else 1e-5)


def test_the_same_size_changes_nothing() -> None:
    np.testing.assert_array_equal(bicubic_matrix(7, 7), np.eye(7, dtype=np.float32))


def test_rows_sum_to_one_also_at_the_border() -> None:
    for sizes in ((3, 50), (50, 3), (1, 4)):
        np.testing.assert_allclose(bicubic_matrix(*sizes).sum(axis=1), 1.0, atol=1e-6)  # fp32


def test_weights_by_hand() -> None:
    """From 4 to 2 pixels, the first lies at 1/2, in the middle of pixels 0 and 1.

    k(1/2) = 1.25/8 - 2.25/4 + 1 = 0.59375, k(3/2) = -0.75 (27/8 - 45/4 + 8) = -0.09375; what
    would fall on pixel -1 falls on pixel 0.
    """
    expected = [[0.5, 0.59375, -0.09375, 0.0], [0.0, -0.09375, 0.59375, 0.5]]
    np.testing.assert_allclose(bicubic_matrix(4, 2), expected, atol=1e-7)


def test_bfloat16_images_are_resized_in_fp32() -> None:
    assert resize_bicubic(jnp.ones((1, 4, 4, 3), jnp.bfloat16), 3).dtype == jnp.float32
