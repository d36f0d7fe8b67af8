"""Eagle's experts at 1024 px, its fusions at the sizes of the paper and its splice.

The official figures are those of the five tiny backbones of the golden case `fusion_x5_full_grid`, of the fusion path
alone and of the splice alone."""

import pytest
import torch
from fullsize import flops
from fullsize.eagle import BACKBONES, X5, Concatenation, Splice, five, fused, image, maps, mixture, passes
from timing import SLACK

from mllm_replica.eagle.experts.towers import build_expert
from mllm_replica.eagle.fusing.fusion import FUSIONS, build_fusion

OFFICIAL = {
    'clip': (0.03, 0.07),
    'convnext': (0.13, 0.4),
    'sam': (2.4, 5.8),
    'eva': (0.9, 2.3),
    'pix2struct': (2.3, 4.4),
    'five experts': (6.2, 13.8),
    'resize, concat': (0.42, 0.78),
    'splice': (1.16, 3.3),
    'preparation': (0.18,),
}  # forward, both passes
FASTER = 1.3  # of the five experts
SPLICE = 0.3  # forward; with the backward pass the official share of it
both_passes = pytest.mark.parametrize('backward', (False, True), ids=('forward', 'both'))


@both_passes
@pytest.mark.parametrize('kind', BACKBONES)
def test_expert(kind, backward, ratio, judge):
    k, settings = list(BACKBONES).index(kind), BACKBONES[kind]
    tower, official = five().vision_towers[k], OFFICIAL[kind][backward]
    x = torch.randn(1, 3, tower.image_size, tower.image_size).requires_grad_()
    with torch.device('meta'):
        meta, empty = build_expert(kind, *settings), torch.empty_like(x, device='meta')
    judge(
        kind,
        lambda: ratio(lambda: passes(lambda: tower(x), [x], backward, tower.parameters()), 5 if official > 1 else 15),
        max(official, 0.1) * SLACK,
        'BLAS',
        backward,
        official,
        flops(lambda: meta(empty), backward),
    )


@both_passes
def test_five_experts(backward, ratio, judge):
    whole, x, official, meta = five(), image().requires_grad_(), OFFICIAL['five experts'][backward], mixture('meta')
    judge(
        'five experts',
        lambda: ratio(lambda: passes(lambda: whole(x), [x], backward, whole.parameters())),
        official / FASTER * SLACK,
        'BLAS',
        backward,
        official,
        flops(lambda: meta(image('meta')), backward),
    )


@torch.no_grad()
def test_preparation_for_pix2struct(ratio, judge):
    tower, x, official = five().vision_towers[4], image(), OFFICIAL['preparation'][0]
    judge('preparation', lambda: ratio(lambda: tower.prepare(x)), official * SLACK, official=official)


@both_passes
def test_resize_and_concatenate(backward, ratio, judge):
    run, official = Concatenation(), OFFICIAL['resize, concat'][backward]
    judge(
        'resize, concat',
        lambda: ratio(lambda: passes(run, [*run.given, run.sam], backward)),
        official * SLACK,
        backward=backward,
        official=official,
        least=official,  # memory that is asked for anew is most of it
    )


@both_passes
@pytest.mark.parametrize('kind', FUSIONS)
def test_every_fusion_side_by_side(kind, backward, ratio, judge):
    "The official ones were not timed."
    torch.manual_seed(0)
    fusion, project = build_fusion(kind, X5[:2], 32, 4096)
    given, parts = maps(X5[:2]), [*fusion.parameters(), *project.parameters()]
    with torch.device('meta'):
        meta, empty = build_fusion(kind, X5[:2], 32, 4096), maps(X5[:2])
    work = flops(lambda: fused(*meta, empty), backward)
    judge(
        f'{kind} {fusion.num_tokens}',
        lambda: ratio(lambda: passes(lambda: fused(fusion, project, given), given, backward, parts), 3),
        kernel='oneDNN?',
        backward=backward,
        work=work,
    )


@both_passes
@pytest.mark.parametrize('rows', ['released', 'ready'])
def test_splice(rows, backward, ratio, judge):
    given, official = Splice(), OFFICIAL['splice'][backward]
    call, inputs = getattr(given, rows), [given.visual, given.words.weight]
    aim = SPLICE * (official / OFFICIAL['splice'][0]) * SLACK
    judge(
        f'splice, {rows}',
        lambda: ratio(lambda: passes(call, inputs, backward)),
        aim,
        backward=backward,
        official=official,
        least=aim / SLACK,  # memory that is asked for anew is most of it
    )
