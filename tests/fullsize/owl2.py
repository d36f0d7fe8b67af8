"mPLUG-Owl2's decoder layer and abstractor at the sizes of the 7B model."

from functools import lru_cache

import torch
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb

from fullsize import MATMUL_FLOPS
from mllm_replica.owl2.abstractor import VisualAbstractor, abstractor_fields, sine_grid, sine_positions
from mllm_replica.owl2.components import ADAPTIVE, Route, adapt_layers

CONFIG = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    attn_implementation='sdpa',
)
D, HEADS, TEXT, VISUAL = 4096, 32, 64, 65
LENGTH = TEXT + VISUAL
STRETCHES = [TEXT // 2, VISUAL, TEXT // 2]  # text, an image, text


@lru_cache(1)
def adapted(device='cpu'):
    "A layer with two ways that differ."
    torch.manual_seed(0)
    with torch.device(device):
        holder = torch.nn.Module()
        holder.model = torch.nn.Module()
        holder.model.layers = torch.nn.ModuleList([LlamaDecoderLayer(CONFIG, 0)])
    adapt_layers(holder, ADAPTIVE['llama'])
    layer = holder.model.layers[0].eval()
    for name, parameter in layer.named_parameters():
        if '.multiway.1.' in name and device == 'cpu':
            parameter.data += 0.01 * torch.randn_like(parameter)
    return layer


@lru_cache(1)
def llama():
    "Llama's layer with the text ways of the other: the same memory."
    with torch.device('meta'):
        layer = LlamaDecoderLayer(CONFIG, 0)
    state = adapted().state_dict(keep_vars=True)
    text = {name.replace('.multiway.0', ''): t for name, t in state.items() if '.multiway.1.' not in name}
    layer.load_state_dict(text, assign=True)
    return layer.eval()


def route_of(device='cpu'):
    visual = torch.cat([torch.full((n,), bool(i % 2), device=device) for i, n in enumerate(STRETCHES)])[None]
    return Route(visual, STRETCHES)


def inputs(length=LENGTH, first=0):
    torch.manual_seed(1)
    x = torch.randn(1, length, D, requires_grad=True)
    return x, LlamaRotaryEmbedding(CONFIG)(x, torch.arange(first, first + length)[None])


def run(layer, x, angles, backward=False, **given):
    with torch.set_grad_enabled(backward):
        out = layer(x, attention_mask=None, position_embeddings=angles, **given)
    if not backward:
        return out
    layer.zero_grad()
    x.grad = None
    out.backward(torch.ones_like(out))


def layer_work(length, backward, past=0):
    "FLOPs of a layer: products with every weight once, and attention without leaving the future out."
    work = 2 * length * (4 * D * D + 3 * D * CONFIG.intermediate_size) + 4 * length * (past + length) * D
    return work * (3 if backward else 1) / MATMUL_FLOPS


def layer_reference(layer, x, angles, visual):
    "The formula, both ways computed for every token."
    attention = layer.self_attn

    def ways(part, y):
        return torch.where(visual[..., None], part.multiway[1](y), part.multiway[0](y))

    def heads(y):
        return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    n = ways(layer.input_layernorm, x)
    query, key = apply_rotary_pos_emb(
        heads(F.linear(n, attention.q_proj.weight)), heads(ways(attention.k_proj, n)), *angles
    )
    future = ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    scores = (query @ key.mT * 128**-0.5).masked_fill(future, float('-inf'))
    h = x + attention.o_proj((scores.softmax(-1) @ heads(ways(attention.v_proj, n))).transpose(1, 2).flatten(2))
    return h + layer.mlp(ways(layer.post_attention_layernorm, h))


@lru_cache(1)
def abstractor(device='cpu'):
    torch.manual_seed(0)
    adapted.cache_clear()
    llama.cache_clear()
    with torch.device(device):
        image = torch.randn(1, 1025, 1024, requires_grad=True)
        return VisualAbstractor(abstractor_fields({}), D).eval(), image


def resample(module, image, backward=False):
    with torch.set_grad_enabled(backward):
        out = module(image)
    if not backward:
        return out
    module.zero_grad()
    image.grad = None
    out.backward(torch.ones_like(out))


def abstractor_reference(module, image):
    "The formula, with positions added to queries and keys and scores in the open."
    queries, asked, kept = module.query_embeds, sine_positions(torch.arange(64), 1024), sine_grid(32, 1024, True)

    def heads(y):
        return y.unflatten(-1, (16, -1)).transpose(1, 2)

    def project(layer, name, y):
        return heads(F.linear(y, layer.attention[name].weight, layer.attention[name].bias))

    for layer in module.encoder['layers']:
        layer = layer['crossattention']
        normed = F.layer_norm(queries, (1024,), layer.norm1.weight, layer.norm1.bias)
        seen = torch.cat([normed, F.layer_norm(image, (1024,), layer.normk.weight, layer.normk.bias)], 1)
        keys = project(layer, 'key', seen + torch.cat([asked, kept]))
        scores = project(layer, 'query', normed + asked) @ keys.mT / 8
        context = (scores.softmax(-1) @ project(layer, 'value', seen)).transpose(1, 2).flatten(2)
        attended = normed + layer.output['out_proj'](context)
        mlp, m = layer.output['mlp'], layer.output['norm2'](attended)
        queries = attended + mlp.w2(mlp.ffn_ln(F.silu(mlp.w1(m)) * mlp.w3(m)))
    return torch.cat([module.visual_fc(queries), module.vit_eos], 1)
