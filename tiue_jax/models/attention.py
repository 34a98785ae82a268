"""softmax(q k^T / sqrt(d)) v by XLA, or on TPUs by a kernel, where the size makes one pay.

XLA writes the [heads, n, n] logits of a self-attention to memory: 512 MiB an image at the 4096
tokens of Stable Diffusion's first level, and more in the backward pass. JAX's splash attention
keeps them on chip. One attention of 4 images, recomputed and differentiated, bf16, v5e, in MiB, XLA
-> splash; the compiler's figures and, for what the kernel reads again, a count by hand; no run:

    tokens x heads x head dim    temporaries    bytes moved
    4096 x 8 x 40                3072 -> 160    13622 -> 840
    1024 x 8 x 80                 128 -> 0        954 -> 233
     256 x 8 x 160                  0 -> 0        137 -> 112

At 256 tokens XLA's logits are on chip already, and so are those of one image against a text's 77:
what a kernel would gain there only a run can tell, so there is none. More in docs/attention.md.
"""

import math

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float

MIN_TOKENS = 1024
MAX_HEAD_DIM = 160  # 512, the VAE's: the backward pass does not fit on chip
# Forward and backward compile with these at 40 and 80 (bf16) for v4, v5e, v6e; at 160 (fp32) for v4
# and v5e; at 64 (both) for v5e. 1024 x 4096 and 512 x 9216 do not fit on chip.
BLOCK_Q, BLOCK_KV = 512, 1024
LANES = 128  # a block is a multiple of this


def dot_product_attention(
    q: Float[Array, "b n heads d"], k: Float[Array, "b m heads d"], v: Float[Array, "b m heads d"]
) -> Float[Array, "b n heads d"]:
    """softmax(q k^T / sqrt(d)) v, the softmax in fp32; `jax.nn.dot_product_attention` but on TPUs.

    The platform is the one that is lowered for, which need not be the one that runs this.
    """
    if not (selects_splash(q.shape[1], k.shape[1], q.shape[-1]) and can_split()):
        return jax.nn.dot_product_attention(q, k, v)
    return jax.lax.platform_dependent(
        q, k, v, tpu=split_splash_attention, default=jax.nn.dot_product_attention
    )


def selects_splash(queries: int, keys: int, head_dim: int) -> bool:
    """Whether a TPU computes an attention of this size by the kernel."""
    return (
        min(queries, keys) >= MIN_TOKENS
        and queries % LANES == 0
        and keys % LANES == 0
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
    )


def can_split() -> bool:
    """Whether it is known how devices share the batch: by the mesh in context, if only of one.

    The compiler does not split a kernel, and refuses a program for several devices that has one.
    How many those are is not known here: jax.device_count() is of the machine that lowers.
    """
    return not get_abstract_mesh().empty


def batch_axes(batch_size: int) -> tuple[str, ...] | None:
    """The axes of the mesh in context, if a batch of this size is split over them."""
    mesh = get_abstract_mesh()
    return mesh.axis_names if mesh.size > 1 and batch_size % mesh.size == 0 else None


def split_splash_attention(
    q: Float[Array, "b n heads d"], k: Float[Array, "b m heads d"], v: Float[Array, "b m heads d"]
) -> Float[Array, "b n heads d"]:
    """`splash_attention` of every device's part of the batch."""
    if get_abstract_mesh().size <= 1:
        return splash_attention(q, k, v)
    batch = PartitionSpec(batch_axes(len(q)))
    # check_vma: a pallas_call says not over which axes its result varies.
    part = jax.shard_map(splash_attention, in_specs=batch, out_specs=batch, check_vma=False)
    return part(q, k, v)


def splash_attention(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    interpret: bool = False,
) -> Float[Array, "b n heads d"]:
    """The same by the kernel; differs by one more rounding: of q / sqrt(d), to the dtype of q.

    Args:
        interpret: compute it without a TPU, slowly.
    """
    heads = q.shape[2]
    queries, keys = q.shape[1], k.shape[1]
    block_q, block_kv = block_size(queries, BLOCK_Q), block_size(keys, BLOCK_KV)
    tokens_last = splash.QKVLayout.SEQ_MINOR  # a head dim of 40 would be padded to 128 as the last
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True,
            q_layout=tokens_last,
            k_layout=tokens_last,
            v_layout=tokens_last,
        ),
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q * (1 / math.sqrt(q.shape[-1])), k, v))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)


def block_size(tokens: int, limit: int) -> int:
    """The largest multiple of LANES up to `limit` that divides `tokens`."""
    return max(size for size in range(LANES, limit + 1, LANES) if tokens % size == 0)
