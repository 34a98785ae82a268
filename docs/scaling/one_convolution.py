"""What the TPU compiler makes of one 3x3 convolution of a UNet, by the batch on a chip.

    export PYTHONPATH=.:.venv/tpu JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
    python docs/scaling/one_convolution.py

Prints batch, side and channels, the compiler's estimate of its time in microseconds, and the time
to compile it. No TPU is needed; nothing is run.
"""

import time

import jax
import jax.numpy as jnp

from tiue_jax.training.chips import tpu_slice
from tiue_jax.training.sharding import REPLICATED, make_mesh

SHAPES = ((64, 320, 320), (32, 1320, 640))  # side, channels in, channels out
BATCHES = (1, 2, 4, 8)


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """SAME, stride 1."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def main() -> None:
    """Compile each for one v5e chip."""
    mesh = make_mesh(1, 1, tpu_slice("v5e:1x1").devices)
    place = jax.sharding.NamedSharding(mesh, REPLICATED)
    jitted = jax.jit(convolution, in_shardings=(place, place), out_shardings=place)
    for side, features_in, features in SHAPES:
        kernel = jax.ShapeDtypeStruct((3, 3, features_in, features), jnp.bfloat16)
        for batch in BATCHES:
            x = jax.ShapeDtypeStruct((batch, side, side, features_in), jnp.bfloat16)
            began = time.monotonic()
            cost = jitted.lower(x, kernel).compile().cost_analysis()
            seconds = time.monotonic() - began
            estimate = 1e6 * cost["optimal_seconds"]
            print(f"{batch} x {side}x{side}, {features_in} -> {features}: ", end="")
            print(f"{estimate:.0f} us, compiled in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
