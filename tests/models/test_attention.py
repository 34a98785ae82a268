"""Attention: which implementation where, the kernel's numbers, and that nothing is gathered.

The kernel runs interpreted here, as there is no TPU. What the TPU compiler makes of it is tested
where libtpu is installed.
"""

import importlib.util
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from tests.conftest import in_ci
from tests.diffusion.small import TOKENS, WIDTH, small_unet
from tiue_jax.diffusion.student import student_forward
from tiue_jax.models.attention import (
    batch_axes,
    block_size,
    dot_product_attention,
    selects_splash,
    splash_attention,
)
from tiue_jax.training.hlo import KINDS
from tiue_jax.training.sharding import batch_sharding, make_mesh

KERNEL = "tpu_custom_call"


def draw(tokens: int, heads: int, head_dim: int, batch: int = 1) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (batch, tokens, heads, head_dim)) for key in keys)


def exact(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v, written out."""
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits, axis=-1), v)


def interpreted(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return splash_attention(q, k, v, interpret=True)


def with_gradients(attention: Callable[..., jax.Array], *qkv: jax.Array) -> tuple[jax.Array, ...]:
    """The result, and the gradients of q, k and v for a cotangent that differs everywhere."""

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(jnp.cos(out.astype(jnp.float32)).astype(out.dtype))

    return run(*qkv)


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"),
    [(1024, 2, 40), (1024, 1, 64), (1024, 1, 80), (1024, 1, 160), (2304, 1, 80), (2048, 1, 40)],
)
def test_the_kernel_computes_attention_and_its_gradients(
    tokens: int, heads: int, head_dim: int
) -> None:
    """Head dims of SD 1.5 and 2.1; 2304 tokens: blocks of 384 and 768; 2048: two blocks of keys."""
    assert selects_splash(tokens, tokens, head_dim)
    qkv = draw(tokens, heads, head_dim)
    for found, expected in zip(
        with_gradients(interpreted, *qkv), with_gradients(exact, *qkv), strict=True
    ):
        # fp32, other order of sums, in units of the largest; worst seen 3.2e-6.
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_in_bfloat16_the_kernel_is_as_exact_as_xla() -> None:
    qkv = draw(1024, 1, 40)
    low = tuple(x.astype(jnp.bfloat16) for x in qkv)
    wanted = with_gradients(exact, *(x.astype(jnp.float32) for x in low))

    def errors(attention: Callable[..., jax.Array]) -> list[float]:
        found = with_gradients(attention, *low)
        return [
            float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))
            for x, y in zip(found, wanted, strict=True)
        ]

    # Root-mean-square, relative. Worst seen: q's gradient, 3.8e-3 by the kernel (q / sqrt(d) and
    # its gradient are rounded once more) and 2.6e-3 by XLA.
    for kernel, xla in zip(errors(interpreted), errors(jax.nn.dot_product_attention), strict=True):
        assert kernel < max(1.5 * xla, 4e-3), (kernel, xla)


def test_the_kernel_vmapped_over_examples_and_timesteps_is_a_loop() -> None:
    q, k, v = draw(1024, 1, 40, batch=2)
    scales = jnp.array([1.0, 0.5])

    def decode(q, k, v, scale):
        return interpreted(scale * q[None], k[None], v[None])[0]

    over_timesteps = jax.vmap(decode, in_axes=(None, None, None, 0))
    over_examples = jax.vmap(over_timesteps, in_axes=(0, 0, 0, None))
    found = jax.jit(over_examples)(q, k, v, scales)
    for i in range(2):
        for j in range(2):
            alone = exact(scales[j] * q[i : i + 1], k[i : i + 1], v[i : i + 1])[0]
            np.testing.assert_allclose(found[i, j], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "kernel"),
    [
        (4096, 4096, 40, True),  # SD 1.5, 512 px: levels 1 and 2 of 4
        (1024, 1024, 80, True),
        (256, 256, 160, False),  # levels 3 and 4
        (64, 64, 160, False),
        (9216, 9216, 64, True),  # SD 2.1, 768 px
        (2304, 2304, 64, True),
        (576, 576, 64, False),
        (4096, 77, 40, False),  # the text
        (4096, 4096, 512, False),  # the VAE
        (5184, 5184, 64, False),  # 576 px: no multiple of 128
    ],
)
def test_the_kernel_is_chosen_by_size(queries: int, keys: int, head_dim: int, kernel: bool) -> None:
    assert selects_splash(queries, keys, head_dim) is kernel


def test_blocks_divide_the_tokens() -> None:
    assert [block_size(n, 512) for n in (1024, 2304, 4096, 9216)] == [512, 384, 512, 512]
    assert [block_size(n, 1024) for n in (1024, 2304, 4096, 9216)] == [1024, 768, 1024, 1024]


def test_off_tpus_xla_computes_it() -> None:
    """Where a TPU would take the kernel: forward, gradients, rematerialised, vmapped twice."""
    q, k, v = draw(1024, 1, 40, batch=8)
    mesh = make_mesh()

    def results(attention: Callable[..., jax.Array]) -> Callable[..., tuple]:
        def vmapped(q, k, v):
            def decode(q, k, v, scale):
                return attention(scale * q[None], k[None], v[None])[0]

            inner = jax.vmap(decode, in_axes=(None, None, None, 0))
            outer = jax.vmap(inner, in_axes=(0, 0, 0, None), spmd_axis_name=batch_axes(len(q)))
            return outer(q, k, v, jnp.array([1.0, 0.5]))

        def run(q, k, v):
            with use_abstract_mesh(mesh.abstract_mesh):
                return tuple(
                    with_gradients(f, q, k, v)
                    for f in (attention, jax.checkpoint(attention), vmapped)
                )

        return jax.jit(run, in_shardings=batch_sharding(mesh))

    mine, xla = results(dot_product_attention), results(jax.nn.dot_product_attention)
    for found, expected in zip(
        jax.tree.leaves(mine(q, k, v)), jax.tree.leaves(xla(q, k, v)), strict=True
    ):
        # Two programs, whose sums a CPU may fuse in two ways; bit for bit the same on some.
        np.testing.assert_allclose(found, expected, atol=1e-6 * float(jnp.abs(expected).max()))
    assert "shard_map" in str(jax.make_jaxpr(mine)(q, k, v)), "the kernel was a choice"
    assert KERNEL not in mine.lower(q, k, v).as_text()


def test_the_kernel_needs_a_mesh_in_context_if_only_of_one_device() -> None:
    qkv = draw(1024, 1, 40)
    assert batch_axes(8) is None
    assert "pallas_call" not in str(jax.make_jaxpr(dot_product_attention)(*qkv))
    with use_abstract_mesh(make_mesh(1, 1, jax.devices()[:1]).abstract_mesh):
        alone = str(jax.make_jaxpr(dot_product_attention)(*qkv))
    assert "pallas_call" in alone and "shard_map" not in alone


def test_batch_axes_are_those_of_the_mesh_if_it_divides_the_batch() -> None:
    with use_abstract_mesh(make_mesh(4, 2).abstract_mesh):
        assert batch_axes(16) == ("data", "fsdp")
        assert batch_axes(1) is None and batch_axes(12) is None


def test_a_student_in_the_context_of_a_mesh_gathers_nothing() -> None:
    """On CPUs; 1024 tokens, so that its self-attentions could take the kernel."""
    mesh, unet = make_mesh(), small_unet()
    noise, context = jnp.zeros((8, 32, 32, 4)), jnp.zeros((8, TOKENS, WIDTH))
    t = jnp.zeros((8,), jnp.int32)
    params = jax.eval_shape(lambda: unet.init(jax.random.key(0), noise, t, context)["params"])
    timesteps, E = np.array([501, 1], np.int32), np.array([-0.5, -0.1], np.float32)

    def student(params, noise, context):
        with use_abstract_mesh(mesh.abstract_mesh):
            return student_forward(unet, params, noise, context, timesteps, 501, 1.5, E)

    split, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    run = jax.jit(student, in_shardings=(everywhere, split, split))
    traced = run.trace(params, noise, context)
    assert "pallas_call" in str(traced.jaxpr), "the kernel was a choice"
    text = traced.lower().compile().as_text()
    assert not any(kind in text for kind in KINDS)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not in_ci(), reason="libtpu is not installed"
)
def test_a_tpu_gets_the_kernel_and_gathers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled here for 8 TPUs: encoder-like and student-like attention, with gradients."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = make_mesh(4, 2, list(topology.devices))

    def layer(x):
        q = x.reshape(*x.shape[:2], 1, 40)
        return dot_product_attention(q, 2 * q, q).reshape(x.shape)

    def loss(x):
        def decode(x, scale):
            return jax.checkpoint(layer)(scale * x[None])[0]

        x = layer(x)
        inner = jax.vmap(decode, in_axes=(None, 0))
        outer = jax.vmap(inner, in_axes=(0, None), spmd_axis_name=batch_axes(len(x)))
        return jnp.sum(outer(x, jnp.array([1.0, 0.5], x.dtype)), axis=(1, 2, 3))

    def gradient(x):
        with use_abstract_mesh(mesh.abstract_mesh):
            out, pull = jax.vjp(loss, x)
            return pull(jnp.ones_like(out))

    split = batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((8, 1024, 40), jnp.bfloat16)
    compiled = jax.jit(gradient, in_shardings=split).lower(x).compile()
    text = compiled.as_text()
    assert not any(kind in text for kind in KINDS)
    assert "1024,1024]" not in text, "no logits"
    assert text.count(f'custom_call_target="{KERNEL}"') >= 4
    (spec,) = {s.spec for s in compiled.output_shardings}
    assert spec == PartitionSpec(("data", "fsdp"))
