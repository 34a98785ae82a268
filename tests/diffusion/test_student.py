"""The student: one encoder pass, K decoders, one image."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.diffusion.small import inputs, small_params, small_unet
from tiue_jax.diffusion.ddim import closed_form, ddim_step, step_coefficients
from tiue_jax.diffusion.schedule import make_schedule
from tiue_jax.diffusion.student import (
    decode_timesteps,
    encode_once,
    student_forward,
    student_timesteps,
)
from tiue_jax.training.hlo import collectives
from tiue_jax.training.sharding import batch_sharding, make_mesh

SCHEDULE = make_schedule()
CASES = {1: "trailing", 2: "leading", 4: "leading", 8: "trailing"}


def timesteps_of(num_steps: int) -> np.ndarray:
    return student_timesteps(SCHEDULE, num_steps, CASES[num_steps])


def forward(params: dict, noise: jax.Array, context: jax.Array, timesteps: np.ndarray):
    S, E = closed_form(SCHEDULE, timesteps)
    return student_forward(small_unet(), params, noise, context, timesteps, timesteps[0], S, E)


@pytest.mark.parametrize("num_steps", CASES)
def test_parallel_decoders_are_a_loop_and_the_closed_form_is_stepping(num_steps: int) -> None:
    unet, params, (noise, context) = small_unet(), small_params(), inputs(3)
    timesteps = timesteps_of(num_steps)
    run = jax.jit(lambda p: forward(p, noise, context, timesteps))
    x0, eps = run(params)
    assert eps.shape == (3, num_steps, 8, 8, 4)

    t_enc = jnp.full((3,), timesteps[0])
    features = jax.jit(partial(unet.apply, method="encode"))(
        {"params": params}, noise, t_enc, context
    )
    decode = jax.jit(
        lambda t: unet.apply({"params": params}, features, t, context, method="decode")
    )
    x = noise
    for i, (t, c, d) in enumerate(
        zip(timesteps, *step_coefficients(SCHEDULE, timesteps), strict=True)
    ):
        alone = decode(jnp.full((3,), t))
        # fp32, other order of sums; worst seen 1.4e-6 of the largest.
        np.testing.assert_allclose(eps[:, i], alone, atol=1e-5)
        x = ddim_step(x, alone, c, d)
    # In units of the largest; worst seen 1.4e-6.
    np.testing.assert_allclose(x0, x, atol=1e-5 * float(jnp.abs(x).max()))


def test_decoders_differ_by_their_timestep_only() -> None:
    unet, params, (noise, context) = small_unet(), small_params(), inputs(2)

    @jax.jit
    def run(timesteps):
        features = encode_once(unet, params, noise, context, 751)
        return decode_timesteps(unet, params, features, context, timesteps)

    eps = run(jnp.array([501, 501, 1]))
    np.testing.assert_array_equal(eps[:, 0], eps[:, 1])
    assert float(jnp.abs(eps[:, 0] - eps[:, 2]).max()) > 1e-2


def test_an_example_does_not_depend_on_the_others() -> None:
    params, (noise, context) = small_params(), inputs(3)
    run = jax.jit(lambda z, y: forward(params, z, y, timesteps_of(2))[0])
    other = run(noise.at[1:].set(0.0), context.at[1:].set(0.0))
    np.testing.assert_array_equal(run(noise, context)[0], other[0])


def test_every_parameter_gets_a_gradient() -> None:
    params, (noise, context) = small_params(), inputs(2)

    @jax.jit
    def gradient(params):
        def loss(params):
            x0, eps = forward(params, noise, context, timesteps_of(2))
            return jnp.mean(x0**2) + jnp.mean(eps**3)

        return jax.grad(loss)(params)

    sizes = jax.tree.map(lambda g: float(jnp.abs(g).max()), gradient(params))
    assert all(np.isfinite(size) and size > 0 for size in jax.tree.leaves(sizes)), sizes


def test_one_leading_step_is_refused_and_says_what_to_do() -> None:
    for spacing in ("leading", "linspace"):
        with pytest.raises(ValueError, match=r"input noise itself: .*trailing"):
            student_timesteps(SCHEDULE, 1, spacing)
    assert student_timesteps(SCHEDULE, 1, "trailing").tolist() == [999]


def test_a_batch_sharded_over_eight_devices_is_gathered_nowhere() -> None:
    """Timesteps outside of examples would gather; then this test fails, as it should."""
    mesh = make_mesh()
    assert mesh.size == 8
    params, (noise, context) = small_params(), inputs(8)
    everywhere, split = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    timesteps = timesteps_of(4)
    S, E = closed_form(SCHEDULE, timesteps)
    unet = small_unet()

    def example_major(params, noise, context):
        return student_forward(unet, params, noise, context, timesteps, 751, S, E)

    def timestep_major(params, noise, context):
        features = encode_once(unet, params, noise, context, 751)

        def decode(t):
            t = jnp.full((8,), t)
            return unet.apply({"params": params}, features, t, context, method="decode")

        eps = jax.vmap(decode)(jnp.asarray(timesteps))
        return S * noise + jnp.tensordot(jnp.asarray(E, jnp.float32), eps, 1)

    def compiled(run):
        jitted = jax.jit(run, in_shardings=(everywhere, split, split))
        return jitted.lower(params, noise, context).compile()

    program = compiled(example_major)
    assert not collectives(program.as_text())
    x0, eps = program.output_shardings
    assert x0.is_equivalent_to(split, 4) and eps.is_equivalent_to(split, 5)
    assert collectives(compiled(timestep_major).as_text())
