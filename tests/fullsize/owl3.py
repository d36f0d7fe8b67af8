"Hyper attention at the sizes of the 7B model: hidden 3584, 28 / 4 heads, 729 patches, 256 text tokens."

from functools import lru_cache

import torch
from torch.nn import functional as F
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from fullsize import MATMUL_FLOPS
from mllm_replica.owl3.components import HyperAttention
from mllm_replica.owl3.media import Media, Sight, rotate

CONFIG = Qwen2Config(
    hidden_size=3584,
    num_attention_heads=28,
    num_key_value_heads=4,
    attn_implementation='sdpa',
    max_position_embeddings=65536,
    rope_theta=1e6,
)
D, HEADS, GROUPS, HEAD, TEXT, PATCHES = 3584, 28, 4, 128, 256, 729


@lru_cache(1)
def attention():
    torch.manual_seed(0)
    module = HyperAttention(CONFIG, 0).eval()
    module.initialise()
    return module


@lru_cache(1)
def rotary():
    return Qwen2RotaryEmbedding(CONFIG)


def inputs(images, late=False, keep=False):
    "Text, its angles, and what it sees: all images from the first token on, or evenly spread over the text."
    torch.manual_seed(1)
    starts = [i * TEXT // images for i in range(images)] if late else [-1] * images
    media = Media(torch.randn(images, PATCHES, D, requires_grad=True), [starts])  # both come from layers that train
    media.rotary(rotary())
    x = torch.randn(1, TEXT, D, requires_grad=True)
    return x, rotary()(x, torch.arange(TEXT)[None]), Sight.of(media, torch.arange(TEXT)[None], keep)


def work(images, seen, backward=False):
    "FLOPs, in products: of text, of the images' keys and values, and of attention to `seen` image tokens in all."
    text = 2 * TEXT * D * (2 * D + 2 * GROUPS * HEAD) + 2 * TEXT * TEXT * HEADS * HEAD + 2 * TEXT * HEADS * HEAD * HEAD
    pictures = 2 * images * PATCHES * D * 2 * GROUPS * HEAD + 4 * seen * HEADS * HEAD
    return (3 if backward else 1) * (text + pictures) / MATMUL_FLOPS


def reference(module, x, angles, sight):
    "The formula with repeated heads and a dense mask."

    def split(y, n):
        return y.unflatten(-1, (n, HEAD)).transpose(1, 2)

    def heads(y):
        return y.flatten(0, 1).transpose(0, 1)[None].repeat_interleave(7, 1)

    q, k = apply_rotary_pos_emb(split(module.q_proj(x), HEADS), split(module.k_proj(x), GROUPS), *angles)
    v = split(module.v_proj(x), GROUPS).repeat_interleave(7, 1)
    c = F.scaled_dot_product_attention(q, k.repeat_interleave(7, 1), v, is_causal=True)
    u = F.linear(sight.media.embeds, module.v_kv_proj.weight, module.v_kv_proj.bias).unflatten(-1, (GROUPS, 2, HEAD))
    visible = torch.arange(len(sight.media.embeds)) < sight.counts[..., None]
    mask = visible.repeat_interleave(PATCHES, -1)[:, None]
    turned = heads(rotate(u[..., 0, :], sight.media.angles))
    y = F.scaled_dot_product_attention(q, turned, heads(u[..., 1, :]), attn_mask=mask)
    g = module.gate_proj(c)
    mixed = torch.where(sight.sees[:, None, :, None], c * (1 - g) + y * g, c)
    return module.o_proj(mixed.transpose(1, 2).flatten(2))


def run(module, x, angles, sight, backward=False):
    with torch.set_grad_enabled(backward):
        out = module(x, angles, sight=sight)[0]
    if not backward:
        return out
    module.zero_grad()
    x.grad = sight.media.embeds.grad = None
    out.backward(torch.ones_like(out))
