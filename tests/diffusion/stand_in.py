"""A UNet of one parameter, for samplers: smooth, bounded, and of every input that it is given."""

import jax.numpy as jnp
import numpy as np

from tiue_jax.models.unet import UNet

PARAMS = {"w": jnp.asarray(2.0)}


class StandIn(UNet):
    """tanh of w times the mean of the context and of the guidance, a little of latents and t."""

    def setup(self) -> None:
        """One parameter."""
        self.w = self.param("w", lambda key: jnp.ones(()))

    def __call__(self, x, t, context, guidance=None):
        """Refuse guidance as a UNet does."""
        assert (guidance is None) == (self.time_cond_dim is None)
        told = jnp.zeros(x.shape[:1]) if guidance is None else 0.1 * guidance
        mean = self.w * context.mean(axis=(1, 2)) + told + 1e-3 * t
        return 0.3 * jnp.tanh(mean.reshape(-1, 1, 1, 1) + x) + 0.4 * x


def draws(batch: int = 2) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    """Noise [b 2 3 4], context [b 5 6] and another context, to be the null one."""
    rng = np.random.default_rng(0)
    shapes = ((batch, 2, 3, 4), (batch, 5, 6), (batch, 5, 6))
    noise, context, null = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return noise, context, null
