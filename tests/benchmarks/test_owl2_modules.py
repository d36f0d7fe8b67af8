"""mPLUG-Owl2's decoder layer and abstractor at the sizes of the 7B model, beside the same matrix product and beside Llama's own layer."""
import statistics
import time
from functools import lru_cache

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb

from mllm_replica import layers
from mllm_replica.owl2.components import ADAPTIVE, Route, adapt_layers
from mllm_replica.owl2.encoder import VisualAbstractor, abstractor_fields, sine_grid, sine_positions

CONFIG = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, rms_norm_eps=1e-6, max_position_embeddings=2048,
                     attn_implementation='sdpa')
D, HEADS, TEXT, VISUAL, PAST = 4096, 32, 64, 65, 200
LENGTH = TEXT + VISUAL
STRETCHES = [TEXT // 2, VISUAL, TEXT // 2]   # text, an image, text
MATMUL_FLOPS = 2 * 2048 ** 3
SLACK = 1.2   # other processes share the machine
OFFICIAL = {'mixed': (3.97, 14.4), 'text': (4.3, 13.2), 'decode': (0.24,), 'abstractor': (3.2, 7.7)}   # forward, forward + backward
AIM = {'mixed': (3.3, 10.5), 'abstractor': (2.2, 6.0)}   # where oneDNN is twice as fast as the BLAS; else the official figures are to be held
# A decode step reads 810 MB of weights, and costs what its seven bare products cost (measured beside it): 0.19 to 0.27; the aim of 0.20 is met where
# memory is quick enough. Adding the weights up, which is the least that reading them can cost, takes 0.13 on the same machine.
NO_DEARER = 1.03   # than Llama's layer, where there is no image
BARELY = 1.2       # than the bare products of a decode step
both_passes = pytest.mark.parametrize('backward', (False, True), ids=('forward', 'both'))
both_kernels = pytest.mark.parametrize('kernel', ('oneDNN', 'BLAS'))


@pytest.fixture
def use(monkeypatch):
    "Choose the kernel of the products."
    def choose(kernel):
        if kernel == 'oneDNN' and not layers._ONEDNN_PAYS: pytest.skip('no faster product than the BLAS on this processor')
        monkeypatch.setattr(layers, '_ONEDNN_PAYS', kernel == 'oneDNN')
    return choose


def beside(function, other, rounds=9):
    "Median ratio of the process CPU times of two functions, run in turn, the first of a pair alternating; a pair scatters by 5 %."
    seconds = time.process_time

    def pair(turn):
        spent = {}
        for this in (function, other)[::1 if turn % 2 else -1]:
            start = seconds()
            this()
            spent[this] = seconds() - start
        return spent[function] / spent[other]

    pair(0)   # warms up
    return statistics.median(pair(i) for i in range(rounds))


@pytest.fixture
def dearest(twice_as_fast):
    "Bound beside Llama's layer. Where oneDNN gains little, training on text was up to 9 % dearer through it, and decoding up to 6 %."
    return NO_DEARER if twice_as_fast else SLACK


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
        if '.multiway.1.' in name and device == 'cpu': parameter.data += 0.01 * torch.randn_like(parameter)
    return layer


@lru_cache(1)
def llama():
    "Llama's layer with the text ways of the other: the same memory."
    with torch.device('meta'): layer = LlamaDecoderLayer(CONFIG, 0)
    state = adapted().state_dict(keep_vars=True)
    layer.load_state_dict({name.replace('.multiway.0', ''): t for name, t in state.items() if '.multiway.1.' not in name}, assign=True)
    return layer.eval()


def route_of(text_only=False, device='cpu'):
    if text_only: return None
    visual = torch.cat([torch.full((n,), bool(i % 2), device=device) for i, n in enumerate(STRETCHES)])[None]
    return Route(visual, STRETCHES)


def inputs(length=LENGTH, first=0):
    torch.manual_seed(1)
    x = torch.randn(1, length, D, requires_grad=True)
    return x, LlamaRotaryEmbedding(CONFIG)(x, torch.arange(first, first + length)[None])


def run(layer, x, angles, backward=False, **given):
    with torch.set_grad_enabled(backward): out = layer(x, attention_mask=None, position_embeddings=angles, **given)
    if not backward: return out
    layer.zero_grad()
    x.grad = None
    out.backward(torch.ones_like(out))


def flops(module, *given, backward=False, **more):
    "FLOPs in units of the product's, counted without memory."
    with FlopCounterMode(display=False) as counter:
        out = module(*given, **more)
        if backward: out.backward(torch.empty_like(out))
    return counter.get_total_flops() / MATMUL_FLOPS


def layer_bound(length, backward, past=0):
    "FLOPs of a layer: products with every weight once, and attention without leaving the future out."
    work = 2 * length * (4 * D * D + 3 * D * CONFIG.intermediate_size) + 4 * length * (past + length) * D
    return work * (3 if backward else 1) / MATMUL_FLOPS


def reference(layer, x, angles, visual):
    "The formula, both ways computed for every token."
    def ways(part, y): return torch.where(visual[..., None], part.multiway[1](y), part.multiway[0](y))
    heads = lambda y: y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    attention, n = layer.self_attn, ways(layer.input_layernorm, x)
    query, key = apply_rotary_pos_emb(heads(F.linear(n, attention.q_proj.weight)), heads(ways(attention.k_proj, n)), *angles)
    scores = (query @ key.mT * 128 ** -0.5).masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), float('-inf'))
    h = x + attention.o_proj((scores.softmax(-1) @ heads(ways(attention.v_proj, n))).transpose(1, 2).flatten(2))
    return h + layer.mlp(ways(layer.post_attention_layernorm, h))


def close(found, expected): return (found - expected).abs().max() <= 2e-5 * expected.abs().max().clamp(min=1)


@torch.no_grad()
def test_layer_is_the_formula():
    layer, (x, angles), route = adapted(), inputs(), route_of()
    assert close(run(layer, x, angles, route=route), reference(layer, x, angles, route.visual))
    assert close(run(layer, x, angles), run(llama(), x, angles))
    work = layer_bound(LENGTH, False)
    assert work == pytest.approx(3.04, abs=0.02)   # as the fact sheet counts it
    meta = adapted.__wrapped__('meta')
    x, angles = torch.empty(1, LENGTH, D, device='meta', requires_grad=True), tuple(a.to('meta') for a in angles)
    counted = flops(meta, x, attention_mask=None, position_embeddings=angles, route=route_of(device='meta'))
    assert counted == pytest.approx(work, rel=0.02)   # the visual ways cost no further product


@both_kernels
@both_passes
@pytest.mark.benchmark(timer=time.process_time)
def test_layer_with_an_image(kernel, backward, use, ratio, table, twice_as_fast):
    use(kernel)
    (x, angles), layer, route = inputs(), adapted(), route_of()
    measured, official = ratio(lambda: run(layer, x, angles, backward, route=route)), OFFICIAL['mixed'][backward]
    layer.zero_grad()
    table.append(('layer, image', kernel, 'both' if backward else 'forward', measured, official, layer_bound(LENGTH, backward)))
    assert measured <= (AIM['mixed'][backward] if kernel == 'oneDNN' and twice_as_fast else official) * SLACK


@pytest.mark.parametrize('kernel, backward', [('oneDNN', False), ('BLAS', False), ('oneDNN', True),
                                              pytest.param('BLAS', True, marks=pytest.mark.slow)])
@pytest.mark.benchmark(timer=time.process_time)
def test_layer_without_image(kernel, backward, use, ratio, table, dearest):
    use(kernel)
    (x, angles), layer, plain = inputs(), adapted(), llama()
    measured = ratio(lambda: run(layer, x, angles, backward))
    relative = beside(lambda: run(layer, x, angles, backward), lambda: run(plain, x, angles, backward))
    plain.zero_grad()
    name, official = f'layer, text {relative:.3f}', OFFICIAL['text'][backward]   # beside Llama's layer
    table.append((name, kernel, 'both' if backward else 'forward', measured, official, layer_bound(LENGTH, backward)))
    assert relative <= dearest


@both_kernels
@pytest.mark.benchmark(timer=time.process_time)
@torch.no_grad()
def test_decode_step(kernel, use, ratio, table, dearest):
    use(kernel)
    layer, plain, cache = adapted(), llama(), DynamicCache(config=CONFIG)
    run(layer, *inputs(PAST), past_key_values=cache)
    one, angles = inputs(1, PAST)

    def step(module):
        out = run(module, one, angles, past_key_values=cache)
        cache.crop(-1)   # takes the token back
        return out
    assert close(step(layer), step(plain))
    measured, relative = ratio(lambda: step(layer), rounds=15), beside(lambda: step(layer), lambda: step(plain), rounds=25)
    weights = [(torch.randn(1, 1, w.shape[1]), w) for w in plain.parameters() if w.ndim == 2]
    bare = beside(lambda: step(layer), lambda: [layers.affine(x, w, None) for x, w in weights], rounds=25)
    name = f'decode {relative:.3f} {bare:.2f}'   # beside Llama's layer, and the bare products
    table.append((name, kernel, 'forward', measured, OFFICIAL['decode'][0], layer_bound(1, False, PAST)))
    assert measured <= OFFICIAL['decode'][0] * SLACK and relative <= dearest and bare <= BARELY


@lru_cache(1)
def abstractor(device='cpu'):
    torch.manual_seed(0)
    adapted.cache_clear(), llama.cache_clear()
    with torch.device(device): return VisualAbstractor(abstractor_fields({}), D).eval(), torch.randn(1, 1025, 1024, requires_grad=True)


def resample(module, image, backward=False):
    with torch.set_grad_enabled(backward): out = module(image)
    if not backward: return out
    module.zero_grad()
    image.grad = None
    out.backward(torch.ones_like(out))


def abstractor_reference(module, image):
    "The formula, with positions added to queries and keys and scores in the open."
    queries, asked, kept = module.query_embeds, sine_positions(torch.arange(64), 1024), sine_grid(32, 1024, True)
    heads = lambda y: y.unflatten(-1, (16, -1)).transpose(1, 2)
    for layer in module.encoder['layers']:
        layer = layer['crossattention']
        normed = F.layer_norm(queries, (1024,), layer.norm1.weight, layer.norm1.bias)
        seen = torch.cat([normed, F.layer_norm(image, (1024,), layer.normk.weight, layer.normk.bias)], 1)
        project = lambda name, y: heads(F.linear(y, layer.attention[name].weight, layer.attention[name].bias))
        scores = project('query', normed + asked) @ project('key', seen + torch.cat([asked, kept])).mT / 8
        context = (scores.softmax(-1) @ project('value', seen)).transpose(1, 2).flatten(2)
        attended = normed + layer.output['out_proj'](context)
        mlp, m = layer.output['mlp'], layer.output['norm2'](attended)
        queries = attended + mlp.w2(mlp.ffn_ln(F.silu(mlp.w1(m)) * mlp.w3(m)))
    return torch.cat([module.visual_fc(queries), module.vit_eos], 1)


@torch.no_grad()
def test_abstractor_is_the_formula():
    module, image = abstractor()
    assert close(resample(module, image), abstractor_reference(module, image))


@both_kernels
@both_passes
@pytest.mark.benchmark(timer=time.process_time)
def test_abstractor(kernel, backward, use, ratio, table, twice_as_fast):
    use(kernel)
    (module, image), official = abstractor(), OFFICIAL['abstractor'][backward]
    measured = ratio(lambda: resample(module, image, backward))
    meta, empty = abstractor.__wrapped__('meta')
    table.append(('abstractor', kernel, 'both' if backward else 'forward', measured, official, flops(meta, empty, backward=backward)))
    assert measured <= (AIM['abstractor'][backward] if kernel == 'oneDNN' and twice_as_fast else official) * SLACK
