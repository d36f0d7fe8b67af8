"""Hyper attention at the sizes of the 7B model (hidden 3584, 28 / 4 heads, 729 patches, 256 text tokens), and what an image costs a small model."""
import json
import os
import subprocess
import sys
import time
from functools import lru_cache

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding, apply_rotary_pos_emb

from mllm_replica.owl3.components import HyperAttention
from mllm_replica.owl3.media import Media, Sight, rotate

CONFIG = Qwen2Config(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, attn_implementation='sdpa',
                     max_position_embeddings=65536, rope_theta=1e6)
D, HEADS, GROUPS, HEAD, TEXT, PATCHES = 3584, 28, 4, 128, 256, 729
MATMUL_FLOPS = 2 * 2048 ** 3
SLACK = 1.2   # other processes share the machine
OFFICIAL = {1: (2.64, 6.0), 8: (7.75, 21.0), 50: (33.9, 106.0)}   # images: forward, forward + backward
OFFICIAL_DECODE = {1: 0.67, 8: 3.8, 50: 21.1}
OFFICIAL_CONCAT = {1: (4.6, 14.6), 8: (40.0, 130.0)}


@lru_cache(1)
def attention():
    torch.manual_seed(0)
    module = HyperAttention(CONFIG, 0).eval()
    module.initialise()
    return module


@lru_cache(1)
def rotary(): return Qwen2RotaryEmbedding(CONFIG)


def inputs(images, late=False, keep=False):
    "Text, its angles, and what it sees: all images from the first token on, or evenly spread over the text."
    torch.manual_seed(1)
    starts = [i * TEXT // images for i in range(images)] if late else [-1] * images
    media = Media(torch.randn(images, PATCHES, D, requires_grad=True), [starts])   # both come from layers that train
    media.rotary(rotary())
    x = torch.randn(1, TEXT, D, requires_grad=True)
    return x, rotary()(x, torch.arange(TEXT)[None]), Sight.of(media, torch.arange(TEXT)[None], keep)


def flops(seen):
    "Multiply-adds times two of text, projection of the images, and attention to `seen` image tokens in all."
    text = 2 * TEXT * D * (2 * D + 2 * GROUPS * HEAD) + 2 * TEXT * TEXT * HEADS * HEAD + 2 * TEXT * HEADS * HEAD * HEAD
    return text, 4 * seen * HEADS * HEAD


def bound(images, seen, backward=False):
    text, cross = flops(seen)
    return (3 if backward else 1) * (text + 2 * images * PATCHES * D * 2 * GROUPS * HEAD + cross) / MATMUL_FLOPS


def reference(module, x, angles, sight):
    "The formula with repeated heads and a dense mask."
    split = lambda y, n: y.unflatten(-1, (n, HEAD)).transpose(1, 2)
    q, k = apply_rotary_pos_emb(split(module.q_proj(x), HEADS), split(module.k_proj(x), GROUPS), *angles)
    c = F.scaled_dot_product_attention(q, k.repeat_interleave(7, 1), split(module.v_proj(x), GROUPS).repeat_interleave(7, 1), is_causal=True)
    u = F.linear(sight.media.embeds, module.v_kv_proj.weight, module.v_kv_proj.bias).unflatten(-1, (GROUPS, 2, HEAD))
    heads = lambda y: y.flatten(0, 1).transpose(0, 1)[None].repeat_interleave(7, 1)
    mask = (torch.arange(len(sight.media.embeds)) < sight.counts[..., None]).repeat_interleave(PATCHES, -1)[:, None]
    y = F.scaled_dot_product_attention(q, heads(rotate(u[..., 0, :], sight.media.angles)), heads(u[..., 1, :]), attn_mask=mask)
    g = module.gate_proj(c)
    mixed = torch.where(sight.sees[:, None, :, None], c * (1 - g) + y * g, c)
    return module.o_proj(mixed.transpose(1, 2).flatten(2))


def run(module, x, angles, sight, backward=False):
    with torch.set_grad_enabled(backward): out = module(x, angles, sight=sight)[0]
    if not backward: return out
    module.zero_grad()
    x.grad = sight.media.embeds.grad = None
    out.backward(torch.ones_like(out))


@torch.no_grad()
@pytest.mark.parametrize('late', (False, True))
def test_equal_to_the_formula(late):
    given = inputs(3, late)
    expected = reference(attention(), *given)
    assert (run(attention(), *given) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize('backward', (False, True), ids=('forward', 'both'))
@pytest.mark.parametrize('images', (1, 8, 50))
def test_hyper_attention(images, backward, ratio, table):
    given = inputs(images)
    measured = ratio(lambda: run(attention(), *given, backward), rounds=2 if images == 50 else 3)
    official, work = OFFICIAL[images][backward], bound(images, images * PATCHES * TEXT, backward)
    table.append((f'hyper {images}', '', 'both' if backward else 'forward', measured, official, work))
    assert measured <= min(official, 1.15 * work if images == 50 else official) * SLACK


@pytest.mark.benchmark(timer=time.process_time)
def test_images_that_come_late_cost_less(ratio, table):
    given = inputs(50, late=True)
    seen = int(given[2].counts.sum()) * PATCHES
    measured = ratio(lambda: run(attention(), *given), rounds=2)
    table.append(('hyper 50 late', '', 'forward', measured, OFFICIAL[50][0], bound(50, seen)))
    assert measured <= 1.15 * bound(50, seen) * SLACK


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize('images', (1, 8, 50))
@torch.no_grad()
def test_decode_step(images, ratio, table):
    x, angles, sight = inputs(images, keep=True)
    cache = DynamicCache(config=CONFIG)
    attention()(x, angles, past_key_values=cache, sight=sight)
    one = torch.randn(1, 1, D)
    position = torch.tensor([[TEXT]])
    step = Sight.of(sight.media, position, keep=True)
    turn = rotary()(one, position)

    def decode():
        attention()(one, turn, past_key_values=cache, sight=step)
        cache.crop(-1)  # takes the token back
    measured = ratio(decode, rounds=5)
    flop = (2 * D * (2 * D + 2 * GROUPS * HEAD) + 4 * (TEXT + images * PATCHES) * HEADS * HEAD) / MATMUL_FLOPS
    table.append((f'decode {images}', '', 'forward', measured, OFFICIAL_DECODE[images], flop))
    assert measured <= 0.5


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize('backward', (False, True), ids=('forward', 'both'))
@pytest.mark.parametrize('images', (1, 8))
def test_concatenation(images, backward, ratio, table):
    module, length = Qwen2Attention(CONFIG, 0).eval(), TEXT + images * PATCHES
    x = torch.randn(1, length, D, requires_grad=True)
    angles = rotary()(x, torch.arange(length)[None])

    def step():
        with torch.set_grad_enabled(backward): out = module(x, angles, None)[0]
        if backward: out.backward(torch.ones_like(out))
    measured = ratio(step, rounds=1 if images == 8 else 2)
    flop = (2 * length * D * (2 * D + 2 * GROUPS * HEAD) + 2 * length * length * HEADS * HEAD) * (3 if backward else 1) / MATMUL_FLOPS
    table.append((f'concat {images}', '', 'both' if backward else 'forward', measured, OFFICIAL_CONCAT[images][backward], flop))
    assert measured <= OFFICIAL_CONCAT[images][backward] * 2   # transformers' own layer: shown, hardly ours to speed up


MEMORY = '''
import json, psutil, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import test_owl3_attention as t
peak = lambda: int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) / 1024   # of this program alone
module = t.attention()
with torch.no_grad():
    t.run(module, *t.inputs(1))
    given = t.inputs(int(sys.argv[2]))
    open('/proc/self/clear_refs', 'w').write('5')   # the peak so far is forgotten
    before = psutil.Process().memory_info().rss / 2**20
    t.run(module, *given)
print(json.dumps(peak() - before))
'''


def program(text, *arguments):
    done = subprocess.run([sys.executable, '-c', text, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('images,official', ((8, 312), (50, 1536)))
def test_extra_memory_of_a_forward(images, official, record_property):
    extra = program(MEMORY, os.path.dirname(__file__), images)
    print(f'\nextra memory of a forward, {images} images: {extra:.0f} MiB, official {official} MiB, aim 410 MiB at 50')
    record_property('extra_mib', extra)
    assert extra <= min(official, 410)


PREFILL = '''
import json, sys, time, torch
torch.set_num_threads(1)
from mllm_replica.owl3.recipes import _IMAGES, build, recipe
from mllm_replica.cost import count
row, counts = sys.argv[1], [int(n) for n in sys.argv[2].split(',')]
torch.manual_seed(0)
model, processor = build(recipe('fig1a', row, 'tiny', 0))
ids = torch.tensor([processor.placeholder_ids if row == 'owl3' else [processor.image_token_id] * 64])
text = torch.randint(4, 90, (1, 16))
found = {}
for n in counts:
    given = dict(input_ids=torch.cat([ids.repeat(1, n), text], 1), image_features=torch.randn(n, 64, 48), use_cache=True, logits_to_keep=1)
    times = []
    with torch.inference_mode():
        for _ in range(3 if n < 100 else 1):
            start = time.process_time()
            model(**given)
            times.append(time.process_time() - start)
        flops = count(lambda: model(**given).logits).forward if n < 100 else 0
    found[n] = [min(times), flops]
peak = lambda: int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) / 1024   # of this program alone
found['peak_mb'] = peak()
print(json.dumps(found))
'''


@pytest.mark.slow
def test_slope_per_image_follows_the_flops(record_property):
    counts, slopes = (1, 2, 4, 8, 16, 32), {}
    for row in ('owl3', 'llava_interleave'):
        found = program(PREFILL, row, ','.join(map(str, counts)))
        slopes[row] = [(found['32'][part] - found['8'][part]) / 24 for part in (0, 1)]
        print(f'\n{row}: {slopes[row][0] * 1e3:.2f} ms and {slopes[row][1] / 1e6:.1f} MFLOP per image from 8 to 32 images')
        for n in counts: print(f'  {n:3} images {found[str(n)][0] * 1e3:8.2f} ms {found[str(n)][1] / 1e6:10.1f} MFLOP')
        assert found['32'][0] / found['8'][0] <= 1.5 * found['32'][1] / found['8'][1]   # time grows no faster than the work does
    record_property('slopes', slopes)
    assert slopes['owl3'][0] < slopes['llava_interleave'][0] / 4


@pytest.mark.slow
def test_four_hundred_images_fit_in_two_gigabytes():
    found = program(PREFILL, 'owl3', '400')
    print(f"\n400 images of 64 tokens: {found['400'][0]:.2f} s, peak {found['peak_mb']:.0f} MiB")
    assert found['peak_mb'] < 2000
