"Hyper attention at the sizes of the 7B model, and what an image costs a small model."

import pytest
import torch
from fullsize import MATMUL_FLOPS
from fullsize.owl3 import CONFIG, D, GROUPS, HEAD, HEADS, PATCHES, TEXT, attention, inputs, rotary, run, work
from fullsize.prefill import prefill
from timing import SLACK, seconds_of
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from mllm_replica.owl3.media import Sight

OFFICIAL = {1: (2.64, 6.0), 8: (7.75, 21.0), 50: (33.9, 106.0)}  # images: forward, forward + backward
OFFICIAL_DECODE = {1: 0.67, 8: 3.8, 50: 21.1}
OFFICIAL_CONCAT = {1: (4.6, 14.6), 8: (40.0, 130.0)}
both_passes = pytest.mark.parametrize('backward', (False, True), ids=('forward', 'both'))


@both_passes
@pytest.mark.parametrize('images', (1, 8, 50))
def test_hyper_attention(images, backward, ratio, judge):
    given, official, flops = inputs(images), OFFICIAL[images][backward], work(images, images * PATCHES * TEXT, backward)
    aim = min(official, 1.15 * flops) if images == 50 else official
    judge(
        f'hyper {images}',
        lambda: ratio(lambda: run(attention(), *given, backward), 2 if images == 50 else 3),
        aim * SLACK,
        '',
        backward,
        official,
        flops,
    )


def test_images_that_come_late_cost_less(ratio, judge):
    given = inputs(50, late=True)
    flops = work(50, int(given[2].counts.sum()) * PATCHES)
    judge(
        'hyper 50 late',
        lambda: ratio(lambda: run(attention(), *given), 2),
        1.15 * flops * SLACK,
        '',
        False,
        OFFICIAL[50][0],
        flops,
    )


@pytest.mark.parametrize('images', (1, 8, 50))
@torch.no_grad()
def test_decode_step(images, ratio, judge):
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

    flops = (2 * D * (2 * D + 2 * GROUPS * HEAD) + 4 * (TEXT + images * PATCHES) * HEADS * HEAD) / MATMUL_FLOPS
    judge(f'decode {images} images', lambda: ratio(decode), 0.5, '', False, OFFICIAL_DECODE[images], flops)


@both_passes
@pytest.mark.parametrize('images', (1, 8))
def test_concatenation(images, backward, ratio, judge):
    "transformers' own layer: shown, hardly ours to speed up."
    module, length = Qwen2Attention(CONFIG, 0).eval(), TEXT + images * PATCHES
    x = torch.randn(1, length, D, requires_grad=True)
    angles = rotary()(x, torch.arange(length)[None])

    def step():
        with torch.set_grad_enabled(backward):
            out = module(x, angles, None)[0]
        if backward:
            out.backward(torch.ones_like(out))

    once = 2 * length * D * (2 * D + 2 * GROUPS * HEAD) + 2 * length * length * HEADS * HEAD
    official = OFFICIAL_CONCAT[images][backward]
    judge(
        f'concat {images}',
        lambda: ratio(step, 1 if images == 8 else 2),
        official * 2,
        '',
        backward,
        official,
        once * (3 if backward else 1) / MATMUL_FLOPS,
    )


class Prompts:
    "Prompts of one row with 8 and 32 images; a few milliseconds each, so the aims alone decide."

    def __init__(self, row):
        self.steps = {images: prefill(row, images) for images in (8, 32)}
        few, many = (step.flops() for step in self.steps.values())
        self.work = many / few

    def seconds(self):
        "Of 8 and of 32 images: least of three."
        return [min(seconds_of(step) for _ in range(3)) for step in self.steps.values()]

    def growth(self):
        few, many = self.seconds()
        return many / few

    def slope(self):
        few, many = self.seconds()
        return many - few


def test_time_per_image_follows_the_flops(judge):
    ours, interleaved = Prompts('owl3'), Prompts('llava_interleave')
    for row, prompts in dict(owl3=ours, llava_interleave=interleaved).items():
        aim = 1.5 * prompts.work
        judge(f'32 ÷ 8 images, {row}', prompts.growth, aim, work=prompts.work, least=aim / SLACK)
    judge('an image, owl3 ÷ interleave', lambda: ours.slope() / interleaved.slope(), 1 / 4, least=1 / 4 / SLACK)
