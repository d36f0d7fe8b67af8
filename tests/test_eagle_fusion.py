"Eagle's fusions and splice: parity, what each fusion reads, gradients, order, devices, bad input."

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mllm_replica.eagle.experts.expert import map_of, tokens_of
from mllm_replica.eagle.experts.towers import build_expert
from mllm_replica.eagle.fusing.adapters import DeformableMining, PatchMining, StageAdapter, align, resize
from mllm_replica.eagle.fusing.fusion import FUSIONS, ExpertShape, build_fusion, build_projector
from mllm_replica.eagle.fusing.mixture import SIGNS, Mixture, check_towers, shapes_of, tower_names
from mllm_replica.eagle.fusing.splice import lay_out, splice, splice_layout
from mllm_replica.eagle.golden import parity_cases
from mllm_replica.models.parity import check, read_golden

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / 'golden/eagle'
FILES = (
    'projector',
    'preprocess',
    'splice_right_pad',
    'splice_truncate',
    'alt_mini_gemini',
    'alt_llava_hr',
    'full_model',
)
SHAPES = [ExpertShape('clip', 16, 4), ExpertShape('convnext', 12, 8), ExpertShape('sam', 8, 5)]
every_fusion = pytest.mark.parametrize('kind', FUSIONS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def maps_of(shapes, batch=2, **kwargs):
    return [torch.randn(batch, e.channels, e.side, e.side, **kwargs) for e in shapes]


def trained(module):
    "The module with no weight at zero."
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


class Patches(nn.Module):
    "A transformer's shape: patches, four layers."

    image_size, channels, grid = 28, 16, 4

    def __init__(self):
        super().__init__()
        self.patch, self.layers = nn.Conv2d(3, 16, 7, 7), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        x = tokens_of(self.patch(x))
        for layer in self.layers:
            x = layer(x)
        return map_of(x)


class Strided(nn.Conv2d):
    image_size, channels, grid = 32, 12, 8

    def __init__(self):
        super().__init__(3, 12, 4, 4)


def mixture_of(kind):
    experts = dict(patches=Patches(), strided=Strided())
    return Mixture(experts, trained(build_fusion(kind, shapes_of(experts), 4, 24)[0]), image_size=32)


# official cases


@pytest.mark.parametrize('name', FILES)
def test_golden(name):
    report = check(read_golden(GOLDEN / f'{name}.safetensors'), parity_cases)
    assert not report.problems and report.compared


# fusions


@every_fusion
@pytest.mark.parametrize('experts', [2, 3])
@pytest.mark.parametrize('grid', [2, 3, 4, 6])
def test_tokens_for_every_word(kind, experts, grid):
    shapes = SHAPES[:experts]
    fusion, project = build_fusion(kind, shapes, grid, output_width=24)
    out = project(fusion(maps_of(shapes)))
    assert out.shape == (2, fusion.num_tokens, 24) and out.isfinite().all()
    assert fusion.num_tokens == grid**2 * (experts if kind == 'sequence' else 1)


@every_fusion
def test_samples_do_not_mix_and_gradients_reach_every_map(kind):
    fusion, maps = trained(build_fusion(kind, SHAPES, 4, 24)[0]), maps_of(SHAPES)
    for x in maps:
        x.requires_grad_()
    torch.testing.assert_close(fusion([x[1:] for x in maps]), fusion(maps)[1:], rtol=1e-5, atol=1e-5)
    fusion(maps)[0].square().sum().backward()
    assert all(x.grad[0].abs().sum() > 0 and not x.grad[1].any() for x in maps)


@every_fusion
def test_layout_in_memory_does_not_matter(kind):
    fusion, maps = trained(build_fusion(kind, SHAPES, 4, 24)[0]), maps_of(SHAPES)
    expected = fusion([x.contiguous() for x in maps])
    torch.testing.assert_close(
        fusion([x.contiguous(memory_format=torch.channels_last) for x in maps]), expected, rtol=1e-5, atol=1e-5
    )


@every_fusion
def test_bfloat16_and_foreign_devices(kind):
    fusion, maps = trained(build_fusion(kind, SHAPES, 4, 24)[0]), maps_of(SHAPES)
    exact, low = fusion(maps), fusion.bfloat16()([x.bfloat16() for x in maps])
    assert low.dtype == torch.bfloat16 and (low.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert fusion.to('meta')([x.bfloat16().to('meta') for x in maps]).device.type == 'meta'


def test_order_of_experts_is_order_of_channels():
    maps = maps_of(SHAPES)
    for order in itertools.permutations(range(3)):
        out = build_fusion('channel', [SHAPES[i] for i in order], 4, 24)[0]([maps[i] for i in order])
        for part, i in zip(out.split([SHAPES[i].channels for i in order], -1), order):
            assert torch.equal(part, tokens_of(resize(maps[i], 4)))


def test_the_first_linear_layer_is_a_sum_over_experts():
    fusion, project = build_fusion('channel', SHAPES, 4, 24)
    maps = maps_of(SHAPES)
    parts = project[0].weight.split([shape.channels for shape in SHAPES], 1)
    expected = sum(tokens_of(resize(x, 4)) @ part.T for x, part in zip(maps, parts)) + project[0].bias
    torch.testing.assert_close(project[0](fusion(maps)), expected, rtol=1e-5, atol=1e-5)


def test_sequence_append_sees_no_other_expert():
    fusion, maps = build_fusion('sequence', SHAPES, 4, 24)[0], maps_of(SHAPES)
    before = fusion(maps)
    after = fusion([maps[0], maps[1] + 1, maps[2]])
    assert (before != after).any(-1).any(0).nonzero().flatten().tolist() == list(range(16, 32))


@pytest.mark.parametrize('side,factor', [(4, 1), (3, 2), (2, 4)])
def test_mining_is_attention_in_a_window(side, factor):
    mining, tokens, source = (
        trained(PatchMining(16, 12)),
        torch.randn(2, side * side, 16),
        torch.randn(2, 12, side * factor, side * factor),
    )
    windows = F.unfold(source, factor, stride=factor).unflatten(1, (12, -1)).permute(0, 3, 2, 1)  # [B,N,p²,C]
    query = mining.vlm_uni_query_projector(tokens)[:, :, None]
    key, value = mining.vlm_uni_aux_projector(windows), mining.vlm_uni_val_projector(windows)
    expected = F.scaled_dot_product_attention(query, key, value)[:, :, 0]
    torch.testing.assert_close(mining(tokens, source), expected, rtol=1e-5, atol=1e-5)


def test_deformable_reads_where_its_offsets_say():
    mining = DeformableMining(16, 12, num_heads=2, num_points=1)
    tokens, source = torch.randn(2, 16, 16), torch.randn(2, 12, 4, 4)
    nn.init.zeros_(mining.attention.sampling_offsets.bias)
    nn.init.eye_(mining.attention.output_proj.weight)
    nn.init.zeros_(mining.attention.output_proj.bias)
    values = mining.value(tokens_of(source))
    torch.testing.assert_close(mining(tokens, source), values, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        mining.attention.sampling_offsets.bias.copy_(
            torch.tensor([1.0, 0, 0, 1])
        )  # head 0 reads to the right, head 1 below
    right, below = (torch.zeros(2, 4, 4, 16) for _ in range(2))
    right[:, :, :-1], below[:, :-1] = values.view(2, 4, 4, 16)[:, :, 1:], values.view(2, 4, 4, 16)[:, 1:]
    expected = torch.cat([right[..., :8], below[..., 8:]], -1).flatten(1, 2)
    torch.testing.assert_close(mining(tokens, source), expected, rtol=1e-4, atol=1e-5)


def test_alignment_of_slow_maps():
    x = torch.randn(2, 6, 6, 5)
    assert align(x, 6) is x
    torch.testing.assert_close(align(x, 3), F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))
    for side in (4, 12):
        torch.testing.assert_close(align(x, side), resize(x.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1))


# the mixture


@every_fusion
def test_a_mixture_is_experts_then_fusion(kind):
    mixture, images = mixture_of(kind), torch.randn(2, 3, 32, 32)
    first, second = mixture.vision_towers
    out = mixture(images)
    assert out.shape == (2, mixture.fusion.num_tokens, mixture.fusion.width)
    separate = [first(F.interpolate(images, (28, 28), mode='bilinear', align_corners=True)), second(images)]
    assert torch.allclose(mixture.fusion(separate), out, atol=1e-5) == (kind != 'llava_hr')
    out.sum().backward()
    assert all(p.grad is not None for p in mixture.vision_towers.parameters())


def test_adapters_go_away_even_after_an_error():
    mixture, images = mixture_of('llava_hr'), torch.randn(2, 3, 32, 32)
    alone = mixture.vision_towers[0](images[..., :28, :28])
    with (
        pytest.raises(ZeroDivisionError),
        mixture.fusion.injected(mixture.vision_towers[0], [torch.randn(2, 12, 8, 8)]),
    ):
        1 / 0
    assert torch.equal(mixture.vision_towers[0](images[..., :28, :28]), alone)


def test_layers_may_be_computed_again():
    config = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=7
    )
    experts = dict(clip=build_expert('clip', config), strided=Strided())
    mixture = Mixture(experts, trained(build_fusion('llava_hr', shapes_of(experts), 4, 24)[0]), 32).train()
    images, found = torch.randn(2, 3, 32, 32), []
    for again in (False, True):
        if again:
            experts['clip'].vision_tower['vision_model'].activation_checkpointing_enable({'use_reentrant': False})
        mixture.zero_grad()
        (out := mixture(images)).square().sum().backward()
        found.append([out, *(p.grad for p in mixture.parameters() if p.grad is not None)])
    assert (
        any(getattr(layer, 'gradient_checkpointing', False) for layer in experts['clip'].layers)
        and len(experts['clip'].layers) == 4
    )
    assert len(found[0]) == len(found[1]) > 30
    for one, two in zip(*found):
        torch.testing.assert_close(one, two)


def test_a_new_adapter_changes_nothing():
    tokens = torch.randn(2, 16, 16)
    assert torch.equal(StageAdapter(16, 12)(tokens, torch.randn(2, 8, 8, 12)), tokens)


def test_every_size_is_made_once(monkeypatch):
    made, plain = [], F.interpolate
    monkeypatch.setattr(F, 'interpolate', lambda x, size, **kwargs: made.append(size) or plain(x, size, **kwargs))
    experts = dict(a=Patches(), b=Patches(), c=Strided())
    Mixture(experts, build_fusion('sequence', shapes_of(experts), 8, 24)[0], 32).pixels(torch.randn(1, 3, 32, 32))
    assert made == [(28, 28)]


# the splice


def looped(table, ids, visual, lengths, mask, labels, max_length, side):
    "The official splice as it is written there: sample by sample."
    features, rows, marks, image = visual.split(lengths), [], [], 0
    for line, real, label in zip(ids, mask.bool(), labels):
        line, label, parts, kept = line[real], label[real], [], []
        for token, mark in zip(line.tolist(), label.tolist()):
            if token == -200:
                parts.append(features[image])
                kept += [-100] * len(features[image])
                image += 1
            else:
                parts.append(table(torch.tensor([token])))
                kept.append(mark)
        image += -200 not in line.tolist()
        rows.append(torch.cat(parts)[:max_length])
        marks.append(torch.tensor(kept)[:max_length])
    longest = max(map(len, rows))

    def pad(x, value):
        return F.pad(
            x,
            [0, 0] * (x.dim() - 1) + ([longest - len(x), 0] if side == 'left' else [0, longest - len(x)]),
            value=value,
        )

    return torch.stack([pad(row, 0.0) for row in rows]), torch.stack([pad(mark, -100) for mark in marks])


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('max_length', [None, 9, 4])
def test_splice_is_the_official_loop(side, max_length):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 20, (5, 8), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.25] = -200
    ids[3] = torch.arange(1, 9)  # no image, and yet it owns one
    mask = torch.arange(8) < torch.tensor([8, 5, 7, 6, 3])[:, None]
    mask[0, 2] = False  # a hole
    counts = ((ids == -200) & mask).sum(1).clamp(min=1)
    lengths = torch.randint(
        1, 6, (int(counts.sum()),), generator=generator
    ).tolist()  # crops: images of different lengths
    labels, visual = ids.where(ids > 10, -100), torch.randn(sum(lengths), 3, requires_grad=True)
    table = nn.Embedding(20, 3)
    wanted, marks = looped(table, ids, visual, lengths, mask, labels, max_length, side)
    weight = torch.randn(wanted.shape)
    expected = torch.autograd.grad((wanted * weight).sum(), [visual, table.weight])
    layout = lay_out(ids, lengths, mask.long(), labels, max_length, side)
    found = splice_layout(table, layout, visual)
    assert torch.equal(found, wanted) and torch.equal(layout.labels, marks)
    for ours, theirs in zip(torch.autograd.grad((found * weight).sum(), [visual, table.weight]), expected):
        torch.testing.assert_close(ours, theirs)
    real = layout.attention_mask.bool()
    assert all(
        p[m].tolist() == list(range(int(m.sum()))) and not p[~m].any() for p, m in zip(layout.position_ids, real)
    )


def test_splice_follows_the_embedding():
    table, ids = nn.Embedding(20, 4).bfloat16(), torch.tensor([[1, -1, -1, 2]])
    table.weight.requires_grad_(False)
    visual = torch.randn(2, 4, requires_grad=True)
    out = splice(table, ids, visual)
    out.float().sum().backward()
    assert (
        out.dtype == torch.bfloat16
        and torch.equal(out[0, 1:3], visual.bfloat16())
        and torch.equal(visual.grad, torch.ones(2, 4))
    )
    assert torch.equal(splice(table, torch.tensor([[1, 2]]), visual[:0]), table(torch.tensor([[1, 2]])))


def test_samples_without_images_may_own_none():
    ids = torch.tensor([[1, 2, 3], [1, -200, 4], [1, 5, 6]])
    with_zero, without = lay_out(ids, [2, 2, 2]), lay_out(ids, [2])
    assert with_zero.input_ids.tolist() == without.input_ids.tolist()
    assert (with_zero.rows.tolist(), without.rows.tolist()) == ([2, 3], [0, 1])


# bad input


def test_names_of_experts():
    assert tower_names('clip-448;convnext-1024') == ['clip-448', 'convnext-1024']
    for towers, message in (
        (';', 'there is no expert'),
        ('clip-448;clip-448', 'clip-448 are given twice'),
        ('clip-448;vit', 'vit are unknown'),
    ):
        with pytest.raises(ValueError, match=message):
            tower_names(towers)
    with pytest.raises(ValueError, match='there is no expert'):
        build_fusion('channel', [], 4, 24)
    with pytest.raises(ValueError, match='sam are given twice'):
        build_fusion('sequence', [*SHAPES, SHAPES[2]], 4, 24)
    with pytest.raises(ValueError, match="fusion 'mean' is unknown: channel, sequence"):
        build_fusion('mean', SHAPES, 4, 24)


@pytest.mark.parametrize(
    'order,message',
    [
        (('clip', 'convnext'), r'holds the experts clip, convnext; expected clip, convnext, sam \(sam missing\)'),
        (('clip', 'sam', 'convnext'), r'expected clip, convnext, sam \(another order'),
        (('clip', 'convnext', 'sam', 'det'), r'\(det not asked for\)'),
        ((), r'holds the experts none'),
    ],
)
def test_checkpoints_with_other_experts(order, message):
    keys = [f'model.vision_tower.vision_towers.{k}.{SIGNS[kind]}' for k, kind in enumerate(order)]
    with pytest.raises(ValueError, match=message):
        check_towers(tower_names('clip-448;convnext-1024;sam-1024'), keys)


@every_fusion
def test_maps_that_do_not_reach_the_grid(kind):
    fusion, maps = build_fusion(kind, SHAPES, 4, 24)[0], maps_of(SHAPES)
    with pytest.raises(
        ValueError, match="'convnext': its map 2 x 12 x 8 x 6 is not square and does not reach the grid of 4 x 4"
    ):
        fusion([maps[0], maps[1][..., :6], maps[2]])
    with pytest.raises(ValueError, match="'sam': its map is 2 x 8 x 4 x 4; expected 2 x 8 x 5 x 5"):
        fusion([*maps[:2], maps[2][..., :4, :4]])
    with pytest.raises(ValueError, match="'sam': its map is 1 x 8 x 5 x 5; expected 2 x"):
        fusion([*maps[:2], maps[2][:1]])
    with pytest.raises(ValueError, match='2 maps for 3 experts'):
        fusion(maps[:2])


def test_settings_that_cannot_be():
    for kind in ('llava_hr', 'mini_gemini', 'deformable'):
        with pytest.raises(ValueError, match="'clip' is the only expert"):
            build_fusion(kind, SHAPES[:1], 4, 24)
    for projector in ('mlp', 'mlp0x_gelu', 'mlpx_gelu', 'MLP2x_gelu', 'mlp2x_gelu_'):
        with pytest.raises(ValueError, match='is unknown'):
            build_projector(projector, 8, 4)
    with pytest.raises(ValueError, match='the tokens keep 36 channels; the language model has 24'):
        build_fusion('channel', SHAPES, 4, 24, 'identity')
    with pytest.raises(ValueError, match='no multiple of 5 heads'):
        build_fusion('deformable', SHAPES, 4, 24, num_heads=5)
    with pytest.raises(ValueError, match='the common grid has side 0'):
        build_fusion('channel', SHAPES, 0, 24)
    mixture = mixture_of('llava_hr')
    mixture.vision_towers[0].layers.append(nn.Linear(16, 16))
    with pytest.raises(ValueError, match='has 5 layers; adapters after each quarter need a multiple of 4'):
        mixture(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r'expected \[B, 3, 32, 32\]'):
        mixture(torch.zeros(1, 3, 32, 30))


@pytest.mark.parametrize('lengths', [[2], [2, 2, 2, 2, 2]])
def test_images_that_are_no_placeholders(lengths):
    ids = torch.tensor([[1, -200, 3], [1, -200, -200], [1, 5, 6]])
    with pytest.raises(ValueError, match=rf'^{len(lengths)} images .* for 3 placeholders.*per sample: \[1, 2, 0\]'):
        lay_out(ids, lengths)


def test_crops_that_do_not_fit():
    table, layout = nn.Embedding(9, 2), lay_out(torch.tensor([[1, -200, 3]]), [3 * 2])  # three crops of two tokens
    with pytest.raises(ValueError, match='4 visual tokens; the layout was made for 6'):
        splice_layout(table, layout, torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r'4 visual tokens for 6 places; per sample .* \[6\]'):
        splice(table, layout.input_ids, torch.zeros(4, 2))
