"""CLIP: Stable Diffusion's text encoder (1.x OpenAI's, 2.x OpenCLIP's), and both towers together.

Submodules have transformers' names, `pre_layrnorm` too, so that conversion is renaming.
"""

from collections.abc import Callable
from typing import NamedTuple

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
    """Multi-head self-attention with biases. `causal`: no token sees those behind it (text)."""

    num_heads: int
    causal: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        def dense(name: str) -> nn.Dense:
            return nn.Dense(x.shape[-1], dtype=self.dtype, name=name)

        heads = (*x.shape[:2], self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (dense(name)(x).reshape(heads) for name in ("q_proj", "k_proj", "v_proj"))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
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
    causal: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.layer_norm1, self.layer_norm2 = (layer_norm(self.dtype, self.eps) for _ in range(2))
        self.self_attn = SelfAttention(self.num_heads, self.causal, self.dtype)
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


class Tower(NamedTuple):
    """The shape of one transformer. `activation`: one of ACTIVATIONS."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str = "quick_gelu"
    eps: float = 1e-5


class LayerStack(nn.Module):
    """The CLIPLayers of a tower, one after the other."""

    tower: Tower
    causal: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        _, intermediate_size, num_layers, num_heads, activation, eps = self.tower
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: choose from {sorted(ACTIVATIONS)}")
        shape = (num_heads, intermediate_size, activation, eps, self.causal, self.dtype)
        self.layers = [CLIPLayer(*shape) for _ in range(num_layers)]

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


def text_transformer(
    tower: Tower, vocab_size: int, max_length: int, dtype: DTypeLike
) -> TextTransformer:
    """The text tower."""
    return TextTransformer(
        Embeddings(vocab_size, tower.hidden_size, max_length, dtype),
        LayerStack(tower, True, dtype),
        layer_norm(dtype, tower.eps),
    )


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
        tower = Tower(
            self.hidden_size,
            self.intermediate_size,
            self.num_layers,
            self.num_heads,
            self.activation,
            self.eps,
        )
        self.text_model = text_transformer(tower, self.vocab_size, self.max_length, self.dtype)

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """The last hidden state behind the final LayerNorm: what Stable Diffusion uses."""
        return self.text_model(input_ids)


# --- Both towers ----------------------------------------------------------------------------------

LEGACY_EOS = 2  # what OpenAI's config.json calls the end of a text, which its tokenizer does not


def end_positions(input_ids: Int[Array, "b n"], eos_token_id: int) -> Int[Array, " b"]:
    """Where every text ends: at its first `eos_token_id`, or, for `LEGACY_EOS`, its largest id.

    A text without its end counts as ending at 0. Source: transformers 5.23 CLIPTextModel.
    """
    ends = input_ids if eos_token_id == LEGACY_EOS else input_ids == eos_token_id
    return jnp.argmax(ends, axis=-1)


class VisionEmbeddings(nn.Module):
    """Patches behind a class token, plus position embedding."""

    hidden_size: int
    image_size: int
    patch_size: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        window, side = (self.patch_size,) * 2, self.image_size // self.patch_size
        self.class_embedding = self.param(
            "class_embedding", nn.initializers.normal(0.02), (self.hidden_size,), jnp.float32
        )
        self.patch_embedding = nn.Conv(
            self.hidden_size, window, window, "VALID", use_bias=False, dtype=self.dtype
        )
        self.position_embedding = nn.Embed(side**2 + 1, self.hidden_size, dtype=self.dtype)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b n d"]:
        batch, height, width, _ = pixels.shape
        if (height, width) != (self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"pixels are {height} x {width}, and CLIP takes {size} x {size}")
        patches = self.patch_embedding(pixels).reshape(batch, -1, self.hidden_size)
        first = jnp.broadcast_to(
            self.class_embedding.astype(self.dtype), (batch, 1, self.hidden_size)
        )
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1], dtype=jnp.int32))[None]


class VisionTransformer(nn.Module):
    """Embeddings, LayerNorm, layers in which all see all, LayerNorm of the class token."""

    embeddings: VisionEmbeddings
    pre_layrnorm: nn.LayerNorm
    encoder: LayerStack
    post_layernorm: nn.LayerNorm

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b d"]:
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    """Texts and images to features whose cosine says how well they fit. Defaults: ViT-B/32.

    Differs from transformers' CLIPModel: no `logit_scale`, which features do not depend on.

    Args:
        vocab_size, max_length: of the text tower.
        image_size, patch_size: sides of the vision tower's images and patches, in pixels.
        projection_dim: width of the features.
        eos_token_id: marks the token whose state stands for the text; see `end_positions`.
        dtype: compute dtype; the features are in it too.
    """

    text: Tower = Tower(512, 2048, 12, 8)
    vision: Tower = Tower(768, 3072, 12, 12)
    vocab_size: int = 49408
    max_length: int = 77
    image_size: int = 224
    patch_size: int = 32
    projection_dim: int = 512
    eos_token_id: int = 49407
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.text_model = text_transformer(self.text, self.vocab_size, self.max_length, self.dtype)
        self.vision_model = VisionTransformer(
            VisionEmbeddings(self.vision.hidden_size, self.image_size, self.patch_size, self.dtype),
            layer_norm(self.dtype, self.vision.eps),
            LayerStack(self.vision, False, self.dtype),
            layer_norm(self.dtype, self.vision.eps),
        )
        self.text_projection, self.visual_projection = (
            nn.Dense(self.projection_dim, use_bias=False, dtype=self.dtype) for _ in range(2)
        )

    def encode_text(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b f"]:
        """Features of texts, not normalised."""
        ends = end_positions(input_ids, self.eos_token_id)
        states = self.text_model(input_ids)
        return self.text_projection(jnp.take_along_axis(states, ends[:, None, None], axis=1)[:, 0])

    def encode_image(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b f"]:
        """Features, not normalised, of `image_size` pixels normalised by the caller."""
        return self.visual_projection(self.vision_model(pixels))

    def __call__(
        self, input_ids: Int[Array, "b n"], pixels: Float[Array, "c H W 3"]
    ) -> tuple[Float[Array, "b f"], Float[Array, "c f"]]:
        """Features of texts and of images."""
        return self.encode_text(input_ids), self.encode_image(pixels)
