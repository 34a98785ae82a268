"""CLIP's causal transformer: Stable Diffusion's text encoder (1.x OpenAI's, 2.x OpenCLIP's)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tiue_jax.models.layers import layer_norm


def quick_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x sigmoid(1.702 x): OpenAI's approximation of gelu."""
    return x * nn.sigmoid(1.702 * x)


def exact_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x Phi(x), by erf."""
    return nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable] = {"quick_gelu": quick_gelu, "gelu": exact_gelu}


class SelfAttention(nn.Module):
    """Causal multi-head self-attention with biases."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        def dense(name: str) -> nn.Dense:
            return nn.Dense(x.shape[-1], dtype=self.dtype, name=name)

        heads = (*x.shape[:2], self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (dense(name)(x).reshape(heads) for name in ("q_proj", "k_proj", "v_proj"))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return dense("out_proj")(out.reshape(x.shape))


class MLP(nn.Module):
    """Dense, activation, dense."""

    features: int
    activation: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        h = nn.Dense(self.features, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(ACTIVATIONS[self.activation](h))


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer."""

    num_heads: int
    intermediate_size: int
    activation: str
    eps: float
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.layer_norm1, self.layer_norm2 = (layer_norm(self.dtype, self.eps) for _ in range(2))
        self.self_attn = SelfAttention(self.num_heads, self.dtype)
        self.mlp = MLP(self.intermediate_size, self.activation, self.dtype)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Token embedding plus position embedding."""

    vocab_size: int
    hidden_size: int
    max_length: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.token_embedding = nn.Embed(self.vocab_size, self.hidden_size, dtype=self.dtype)
        self.position_embedding = nn.Embed(self.max_length, self.hidden_size, dtype=self.dtype)

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        positions = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        return self.token_embedding(input_ids) + self.position_embedding(positions)[None]


class LayerStack(nn.Module):
    """`num_layers` CLIPLayers, one after the other."""

    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    eps: float
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        shape = (self.num_heads, self.intermediate_size, self.activation, self.eps, self.dtype)
        self.layers = [CLIPLayer(*shape) for _ in range(self.num_layers)]

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nn.Module):
    """Embeddings, layers, final LayerNorm."""

    embeddings: Embeddings
    encoder: LayerStack
    final_layer_norm: nn.LayerNorm

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class CLIPTextEncoder(nn.Module):
    """Token ids to the context that the UNet attends to.

    The defaults are those of SD 1.5; `variants.VARIANTS` has the others.

    Args:
        max_length: number of position embeddings: the longest prompt in tokens.
        activation: "quick_gelu" (SD 1.x) or "gelu" (SD 2.x).
        dtype: compute dtype; the output is in it too.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_length: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}: choose from {sorted(ACTIVATIONS)}")
        self.text_model = TextTransformer(
            Embeddings(self.vocab_size, self.hidden_size, self.max_length, self.dtype),
            LayerStack(
                self.num_layers,
                self.num_heads,
                self.intermediate_size,
                self.activation,
                self.eps,
                self.dtype,
            ),
            layer_norm(self.dtype, self.eps),
        )

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """The last hidden state behind the final LayerNorm: what Stable Diffusion uses."""
        return self.text_model(input_ids)
