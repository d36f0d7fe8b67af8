"""At the sizes of the papers, without a clock: each shortcut equals its formula, executes no more FLOPs than it, and
keeps within its bytes. What a processor makes of that is timed by `make bench`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fullsize import MATMUL_FLOPS, close, eagle, flops, honeybee, loss, owl2, owl3
from fullsize.counted import pflop_per_step, tflop_to_first_token
from fullsize.prefill import prefill

from mllm_replica.eagle.fusing.fusion import FUSIONS, build_fusion
from mllm_replica.models.cost import count
from mllm_replica.models.loss import chunked_cross_entropy
from mllm_replica.tables.published import load_table

torch.set_num_threads(1)
both_passes = pytest.mark.parametrize('backward', (False, True), ids=('forward', 'both'))


def program(text, *arguments):
    "What a program of its own prints last: its peak memory is its own."
    environment = os.environ | dict(
        OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path])
    )
    command = [sys.executable, '-c', PEAK + text, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PEAK = """
import sys, psutil, torch
torch.set_num_threads(1)
def peak():
    "MiB, of this program alone."
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) / 1024
def forget():
    "The peak so far is forgotten; returns what is in use."
    open('/proc/self/clear_refs', 'w').write('5')
    return psutil.Process().memory_info().rss / 2**20
"""


# equal to the formula


@torch.no_grad()
def test_owl2_layer():
    layer, (x, angles), route = owl2.adapted(), owl2.inputs(), owl2.route_of()
    expected = owl2.layer_reference(layer, x, angles, route.indices)
    assert close(owl2.run(layer, x, angles, route=route), expected)
    assert close(owl2.run(layer, x, angles), owl2.run(owl2.llama(), x, angles))


@torch.no_grad()
def test_owl2_abstractor():
    module, image = owl2.abstractor()
    assert close(owl2.resample(module, image), owl2.abstractor_reference(module, image))


@torch.no_grad()
@pytest.mark.parametrize('late', (False, True))
def test_owl3_hyper_attention(late):
    given = owl3.inputs(3, late)
    assert close(owl3.run(owl3.attention(), *given), owl3.reference(owl3.attention(), *given))


@torch.no_grad()
def test_eagle_experts():
    whole, x = eagle.five(), eagle.image()
    parts = eagle.five_reference(whole, x)
    assert [part.shape[-1] for part in parts] == [tower.channels for tower in whole.vision_towers]
    for found, expected in zip(whole(x).split([part.shape[-1] for part in parts], -1), parts, strict=True):
        assert close(found, expected)


@torch.no_grad()
def test_eagle_preparation_for_pix2struct():
    x = eagle.image()
    assert close(eagle.five().vision_towers[4].prepare(x), eagle.prepared_reference(x))


@torch.no_grad()
def test_eagle_resize_and_concatenate():
    run = eagle.Concatenation()
    assert run().shape == (1, 1024, 7680) and close(run(), run.reference())


def test_eagle_splice():
    given = eagle.Splice()
    found = given.released()
    assert found.shape == (4, 1536, 4096)
    assert torch.equal(found, given.looped()) and torch.equal(given.ready(), found)


@torch.no_grad()
def test_eagle_experts_return_channels_last():
    "The fusions read them without a copy."
    for tower in eagle.five().vision_towers:
        out = tower(torch.zeros(1, 3, tower.image_size, tower.image_size))
        assert out.is_contiguous(memory_format=torch.channels_last), type(tower).__name__


# FLOPs, counted without data


@both_passes
def test_owl2_visual_ways_cost_no_further_product(backward):
    work = owl2.layer_work(owl2.LENGTH, backward)
    assert owl2.layer_work(owl2.LENGTH, False) == pytest.approx(3.04, abs=0.02)  # as the fact sheet counts it
    layer, (x, angles) = owl2.adapted.__wrapped__('meta'), owl2.inputs()
    x = torch.empty_like(x, device='meta').requires_grad_()
    given = dict(attention_mask=None, position_embeddings=tuple(angle.to('meta') for angle in angles))
    counted = flops(lambda: layer(x, **given, route=owl2.route_of('meta')), backward)
    assert counted == pytest.approx(work, rel=0.02)


COUNTED = {  # forward, both passes; in matrix products of 2048³
    'abstractor': (2.207, 6.620),
    'linear': (0.281, 0.563),
    'MLP': (1.406, 3.938),
    'C-Abstractor': (0.882, 2.645),
    'C-Abstractor 256': (0.646, 1.939),
    'D-Abstractor': (0.954, 2.861),
    'resampler': (2.820, 8.390),
    'experts': (1.113, 3.339),
    'channel': (4.000, 12.000),
    'sequence': (6.000, 18.000),
    'llava_hr': (7.503, 22.508),
    'mini_gemini': (3.375, 10.126),
    'deformable': (3.006, 9.018),
}


@both_passes
def test_owl2_abstractor_flops(backward):
    module, image = owl2.abstractor.__wrapped__('meta')
    assert flops(lambda: module(image), backward) == pytest.approx(COUNTED['abstractor'][backward], rel=0.01)


@both_passes
def test_honeybee_flops(backward):
    found = {name: honeybee.work(name, backward) for name in honeybee.MODULES}
    assert found == pytest.approx({name: COUNTED[name][backward] for name in honeybee.MODULES}, rel=0.01)


@both_passes
def test_eagle_flops(backward):
    "Five experts at 1024 px, and every fusion of two."
    whole = eagle.mixture('meta')
    found = {'experts': flops(lambda: whole(eagle.image('meta')), backward)}
    for kind in FUSIONS:
        with torch.device('meta'):
            fusion, project = build_fusion(kind, eagle.X5[:2], 32, 4096)
            given = eagle.maps(eagle.X5[:2])
        found[kind] = flops(lambda: eagle.fused(fusion, project, given), backward)
    assert found == pytest.approx({name: COUNTED[name][backward] for name in found}, rel=0.01)


@torch.inference_mode()
@pytest.mark.parametrize('late', (False, True))
def test_owl3_computes_no_score_that_is_masked(late):
    "Of eight images; where they come late, the text before them costs nothing."
    x, angles, sight = owl3.inputs(8, late)
    sight.media.embeds.requires_grad_(False)
    seen = int(sight.counts.sum()) * owl3.PATCHES
    counted = count(lambda: owl3.attention()(x.detach(), angles, sight=sight)[0]).forward / MATMUL_FLOPS
    assert counted == pytest.approx(owl3.work(8, seen), rel=0.03)


def test_owl3_an_image_costs_a_quarter_of_interleaving():
    flops_of = {row: [prefill(row, images).flops() for images in (8, 32)] for row in ('owl3', 'llava_interleave')}
    slopes = {row: (many - few) / 24 for row, (few, many) in flops_of.items()}
    assert slopes['owl3'] < slopes['llava_interleave'] / 4


# bytes

EXPERTS = """
from fullsize.eagle import five, image, passes
whole, x = five(), image().requires_grad_()
passes(lambda: whole(x), [x], True, whole.parameters())
print(peak())
"""
HYPER = """
from fullsize import owl3
extra = []
with torch.no_grad():
    owl3.run(owl3.attention(), *owl3.inputs(1))
    for images in (8, 50):
        given = owl3.inputs(images)
        before = forget()
        owl3.run(owl3.attention(), *given)
        extra.append(peak() - before)
print(extra)
"""
MANY = """
from fullsize.prefill import prefill
prefill('owl3', 400)()
print(peak())
"""


def test_eagle_memory_of_five_experts():
    "MiB of a whole program that makes both passes; the official one took 1060."
    assert program(EXPERTS) <= 0.8 * 1060


def test_owl3_extra_memory_of_a_forward():
    "Officially 312 MiB for 8 images, 1536 MiB for 50."
    eight, fifty = program(HYPER)
    assert eight <= 312 and fifty <= 410


def test_owl3_four_hundred_images_fit_in_two_gigabytes():
    assert program(MANY) < 2000


@pytest.mark.parametrize('vocabulary, share', [(16384, 1 / 6), pytest.param(49152, 1 / 10, marks=pytest.mark.nightly)])
def test_chunked_loss_takes_a_share_of_the_memory(vocabulary, share):
    "4,096 tokens of width 256: the logits of all of them take three times 268 MB or 805 MB. Gradients are equal."
    usual, ours = (loss.Step(kind, vocabulary=vocabulary) for kind in (loss.full, chunked_cross_entropy))
    for found, expected in zip(ours(), usual()):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    memory = usual.peak_mb()
    assert memory > 2 * 4096 * vocabulary * 4 / 2**20
    assert ours.peak_mb() <= share * memory


# counted, in place of what a toy's width would decide


def counted(paper, table):
    "(row, name) -> value beside a table's claims."
    scopes = [scope for claim in load_table(paper, table).claims for scope in claim.scales.values()]
    return {(row, c): value for s in scopes for row, values in s.counted.items() for c, value in values.items()}


CELLS = [
    (p, t, *cell)
    for p, t in (('honeybee', '3'), ('honeybee', '7'), ('honeybee', '8'), ('owl3', 'fig1a'))
    for cell in counted(p, t)
]
QUICK = [('honeybee', '3', 'linear_256', 'pflop_step'), ('owl3', 'fig1a', 'llava_interleave', 'tflop_10')]


@pytest.mark.parametrize('cell', [pytest.param(c, marks=[pytest.mark.nightly] * (c not in QUICK)) for c in CELLS])
def test_counts_beside_claims(cell):
    paper, table, row, name = cell
    if paper == 'honeybee':
        found = pflop_per_step(paper, table, row)
    else:  # LLaVA-Next-Interleave: the concatenation of Table 8
        unit = ('fig1a', row) if row == 'owl3' else ('8', 'concat')
        found = tflop_to_first_token(*unit, int(name.removeprefix('tflop_')))
    assert float(f'{found:.4g}') == counted(paper, table)[row, name]
