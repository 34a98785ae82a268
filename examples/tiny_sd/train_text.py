"""Stage 2: the text encoder of the embedded teacher, taught to understand captions.

Stable Diffusion takes a text encoder that has learnt what captions mean before (CLIP's) and never
trains it further. Here the end of a caption has to tell what its picture shows: every attribute of
the scene, the order of two objects included. What a caption leaves open stays open.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from examples.tiny_sd.captions import caption
from examples.tiny_sd.fit import fit, muon
from examples.tiny_sd.reader import HEADS, true_labels
from examples.tiny_sd.scenes import Scene
from tiue_jax.models.clip import CLIPTextEncoder
from tiue_jax.pretrained.tokenizer import Tokenizer

NUM_CAPTIONS = 200_000
ITERATIONS, BATCH_SIZE, LEARNING_RATE = 2000, 64, 3e-3
SHORT = 32  # tokens: no caption of ours is longer, so most batches are cut to this
FULL_LENGTH_PROB = 0.1  # of the batches have every position


def text_loss(
    text_encoder: CLIPTextEncoder,
    params: Any,
    batch: tuple[Int[Array, "b t"], Int[Array, "b heads"], Float[Array, "b heads"]],
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Sum over HEADS of the mean cross-entropy, read linearly from every state behind a caption.

    A caption is followed by the end token up to the full length, and each of these states is read:
    a UNet attends to all of them.

    Args:
        params: {"text_encoder", "heads": {"kernel" [c, classes], "bias" [classes]}}.
        batch: token ids; labels in the order of HEADS; 0 where a label does not count.
    """
    del key
    ids, labels, mask = batch
    states = text_encoder.apply({"params": params["text_encoder"]}, ids)
    behind = (ids == ids[:, -1:]).astype(states.dtype)
    logits = states @ params["heads"]["kernel"] + params["heads"]["bias"][None, None]
    total, right, start = jnp.zeros(()), {}, 0
    for i, (name, classes) in enumerate(HEADS.items()):
        part = logits[..., start : start + len(classes)]
        start += len(classes)
        label = jnp.broadcast_to(labels[:, i, None], part.shape[:-1])
        each = optax.softmax_cross_entropy_with_integer_labels(part, label)
        weight = behind * mask[:, i, None]
        total += (each * weight).sum() / behind.sum()
        right[name] = ((part.argmax(-1) == label) * weight).sum() / weight.sum()
    return total, {"loss": total} | {
        name: right[name] for name in ("layout", "shape_0", "colour_1")
    }


def train_text_encoder(
    text_encoder: CLIPTextEncoder,
    tokenizer: Tokenizer,
    scenes: Sequence[Scene],
    folder: Path,
    seed: int = 0,
) -> Any:
    """Train it from nothing, on NUM_CAPTIONS captions of these scenes; returns its parameters."""
    rng = np.random.default_rng(seed + 4)
    scenes = [scenes[i % len(scenes)] for i in range(NUM_CAPTIONS)]
    ids = tokenizer([caption(scene, rng) for scene in scenes]).astype(np.uint16)
    labels, masks = true_labels(scenes)
    label_array = np.stack([labels[name] for name in HEADS], axis=1).astype(np.int32)
    mask_array = np.stack([masks[name] for name in HEADS], axis=1).astype(np.float32)
    key_text, key_heads = jax.random.split(jax.random.key(seed + 4))
    size = (text_encoder.hidden_size, sum(len(classes) for classes in HEADS.values()))
    start = {
        "text_encoder": text_encoder.init(key_text, jnp.asarray(ids[:1], jnp.int32))["params"],
        "heads": {
            "kernel": 0.02 * jax.random.normal(key_heads, size),
            "bias": jnp.zeros(size[1]),
        },
    }

    def batch_of(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = rng.integers(len(ids), size=BATCH_SIZE)
        length = ids.shape[1] if rng.random() < FULL_LENGTH_PROB else SHORT
        return ids[rows, :length].astype(np.int32), label_array[rows], mask_array[rows]

    trained = fit(
        "text_encoder",
        lambda params, batch, key: text_loss(text_encoder, params, batch, key),
        start,
        batch_of,
        iterations=ITERATIONS,
        learning_rate=LEARNING_RATE,
        optimizer=muon,
        folder=folder,
        seed=seed,
        ema_max_decay=0.995,
    )
    return trained["text_encoder"]
