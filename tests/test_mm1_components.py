"""MM1's connectors, position tables, sub-images and encoder objectives against the worked numbers, and what must hold at any size."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F

from mllm_replica.mm1 import golden
from mllm_replica.mm1.components import (
    CONNECTORS,
    AttentionPooling,
    SubImages,
    build_connector,
    letterbox,
    letterboxed,
    resize_positions,
)
from mllm_replica.mm1.objectives import (
    LOG_SCALE,
    contrastive_loss,
    normalised_patches,
    prefix_mask,
    reconstruction_loss,
)
from mllm_replica.mm1.shots import resolutions
from mllm_replica.models import parity

GOLDEN = Path(__file__).parent / 'golden' / 'mm1'


def read(name):
    return yaml.safe_load((GOLDEN / f'{name}.yaml').read_text())


SHAPES, HIGH = read('connector_shapes'), read('high_resolution')
COLUMNS = {'avg': 'average_pooling', 'att': 'attention_pooling', 'c-abs': 'c_abstractor'}  # of the yaml file
SMALL = {
    'avg': {},
    'att': dict(num_attention_heads=2),
    'c-abs': dict(depth=1, hidden_size=8),
    'resampler': dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
}
kinds = pytest.mark.parametrize('kind', CONNECTORS)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def count(module):
    return sum(p.numel() for p in module.parameters())


def small(kind, num_input_tokens=36, num_query_tokens=16, **more):
    return build_connector(
        dict(connector_type=kind, num_query_tokens=num_query_tokens) | SMALL[kind] | more, 16, 12, num_input_tokens
    ).eval()


def recorded(name='connectors_moe'):
    "The golden file, its names with the sort of tensor first."
    with safe_open(GOLDEN / f'{name}.safetensors', 'pt') as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}

    def order(key):
        return '.'.join([key.split('.')[1], key.split('.')[0], *key.split('.')[2:]])

    tensors = {order(key): tensor for key, tensor in tensors.items()}
    return parity.Golden(
        GOLDEN / f'{name}.safetensors', 'parts', json.loads(metadata['config']), ' '.join(metadata.values()), tensors
    )


def test_every_recorded_tensor_is_found_again():
    file = recorded()
    report = parity.check(file, golden.parity_cases)
    assert not report.problems and len(report.compared) == 13 and golden.ORIGIN in file.metadata
    assert golden.kind_of(set(file.tensors)) == 'parts'
    assert max(c.error for c in report.compared) < 1e-6


@pytest.mark.parametrize('name', sorted(recorded().tensors))
def test_one_altered_number_is_noticed(name):
    file = recorded()
    if name == 'w.att.k.bias':
        pytest.skip('softmax does not see what all keys share')
    tensor = file.tensors[name].clone()
    tensor.view(-1)[tensor.abs().argmax()] += 1 if not tensor.is_floating_point() else 0.02 * tensor.abs().max()
    assert parity.check(file._replace(tensors=file.tensors | {name: tensor}), golden.parity_cases).problems


@pytest.mark.parametrize('shape', SHAPES['shapes'], ids=lambda s: f'{s["resolution"]}-{s["tokens"]}')
def test_cells_and_shapes(shape):
    side, token_side = shape['grid'][0], shape['token_grid'][0]
    assert side == shape['resolution'] // shape['patch'] and side**2 == shape['patches']
    cells = [tuple(edge) for edge in shape['bin_edges']]
    assert sorted({b - a for a, b in cells}) == shape['bin_widths']
    assert (
        any(a < b for (_, b), (a, _) in zip(cells, cells[1:])) == shape['bins_overlap']
        and (side % token_side == 0) == shape['divisible']
    )
    x = torch.randn(2, side**2, 16)
    for kind in CONNECTORS:
        connector = small(kind, side**2, shape['tokens'])
        assert connector(x).shape == (2, shape['tokens'], 12) and connector.num_visual_tokens == shape['tokens']
    trace, grid = {}, x.unflatten(1, (side, side))
    small('avg', side**2, shape['tokens'])(x, trace)
    by_hand = torch.stack([grid[:, a:b, c:d].mean((1, 2)) for a, b in cells for c, d in cells], 1)
    assert torch.allclose(trace['pooled'], by_hand, atol=1e-6)


@pytest.mark.parametrize(
    'row', SHAPES['params'], ids=lambda r: f'{r["encoder"]}-{r["d_llm"]}-{r["resolution"]}-{r["tokens"]}'
)
def test_parameter_counts(row):
    sizes = row['d_vision'], row['d_llm'], (row['resolution'] // 14) ** 2
    for kind, column in COLUMNS.items():
        with torch.device('meta'):
            connector = build_connector(dict(connector_type=kind, num_query_tokens=row['tokens']), *sizes)
        assert count(connector) == row[column], column


def test_breakdown_of_the_counts():
    for name, sizes in (('ViT-L 336, d_llm 2048', (1024, 2048, 576)), ('ViT-H 378, d_llm 4096', (1280, 4096, 729))):
        with torch.device('meta'):
            connector = build_connector(dict(connector_type='c-abs', num_query_tokens=144), *sizes)
        stages = {
            'stage1': count(connector.net['0']),
            'stage2': count(connector.net['2']),
            'readout': count(connector.readout),
        }
        assert (
            stages | {'pos_emb': connector.pos_emb.numel(), 'total': count(connector)}
            == SHAPES['c_abstractor_breakdown'][name]
        )
        assert count(connector.net['0']['b1']) == SHAPES['block_params'][f'reg({sizes[0]},1024)']
    with torch.device('meta'):
        connector = build_connector(dict(connector_type='att', num_query_tokens=144), 1280, 4096, 729)
    parts = {
        'queries': connector.query.numel(),
        'qkvo': sum(count(part) for part in (connector.q, connector.k, connector.v, connector.o)),
        'norms': count(connector.norm_kv) + count(connector.norm_out),
        'proj': count(connector.proj),
    }
    assert (
        parts | {'total': count(connector)} == SHAPES['attention_pooling_breakdown']['ViT-H, 144 queries, d_llm 4096']
    )


@kinds
def test_everything_learns_and_images_do_not_meet(kind):
    connector, x = (
        small(kind, **({'start': 'local'} if kind == 'att' else {})),
        torch.randn(3, 36, 16, requires_grad=True),
    )
    tokens = connector(x)
    tokens.square().sum().backward()
    assert x.grad.abs().amax(-1).min() > 0
    silent = [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    assert silent in ([], ['k.bias'])  # softmax does not see what all keys share
    assert torch.allclose(connector(x[1:2]), tokens[1:2], atol=1e-5)
    assert set(connector.state_dict()) == {
        name for name, _ in connector.named_parameters()
    }  # nothing is made in forward, no hidden state


def test_average_pooling_is_local():
    x = torch.randn(1, 36, 16)
    far = x.clone()
    far[:, 18:] += 1  # the lower half
    connector = small('avg')
    assert torch.equal(connector(x)[:, :4], connector(far)[:, :4]) and not torch.equal(
        connector(x)[:, 12:], connector(far)[:, 12:]
    )


@pytest.mark.parametrize(
    'side, token_side, width, heads',
    [(8, 2, 64, 4), (8, 4, 64, 4), (12, 2, 64, 4), (12, 4, 96, 4), (24, 12, 256, 4), (27, 8, 160, 2)],
)
def test_local_start_of_queries(side, token_side, width, heads):
    shares, cell = {}, side / token_side

    def centre(n):
        return torch.cartesian_prod(*[(torch.arange(n) + 0.5) * side / n] * 2)

    own = (centre(token_side)[:, None] - centre(side)).abs().amax(-1) <= cell / 2
    for start in ('random', 'local'):
        connector, trace = AttentionPooling(width, 8, side**2, token_side**2, heads, start), {}
        connector(torch.randn(4, side**2, width), trace)
        shares[start] = (trace['attn'].mean((0, 1)) * own).sum(-1)
        assert torch.allclose(trace['attn'].sum(-1), torch.ones(()), atol=1e-5)
    uniform = own.float().mean(-1)
    assert (shares['random'] < 1.3 * uniform).all()
    assert (shares['local'] > 2.5 * uniform).all() and shares['local'].mean() > 0.3
    names = [
        set(AttentionPooling(width, 8, side**2, token_side**2, heads, start).state_dict())
        for start in ('random', 'local')
    ]
    assert names[0] == names[1]


def test_wrong_connectors():
    for config, said in (
        (dict(), 'connector_type is None'),
        (dict(connector_type='att', heads=2), "['heads'] are unknown"),
        (dict(connector_type='avg', num_query_tokens=15), 'not the square'),
        (dict(connector_type='c-abs', width=3), "'width' is unknown"),
        (dict(connector_type='att', num_query_tokens=4, num_attention_heads=3), '3 heads'),
        (dict(connector_type='att', num_query_tokens=4, num_attention_heads=4, start='centre'), "'random' or 'local'"),
    ):
        with pytest.raises(ValueError) as error:
            build_connector(config, 16, 12, 36)
        assert said in str(error.value)
    with pytest.raises(ValueError, match='expects'):
        small('att')(torch.randn(1, 36, 12))


@pytest.mark.parametrize('case', read('pos_interp')['cases'], ids=lambda c: f'{c["mode"]}-{c["dst_side"]}')
def test_position_tables(case):
    table, expected = torch.tensor(case['src'], dtype=torch.float64), torch.tensor(case['dst'])
    found = resize_positions(table.reshape(-1, 1), case['dst_side'] ** 2, case['mode'])
    assert torch.allclose(found.view(case['dst_side'], -1).float(), expected, atol=1e-5, rtol=1e-6)
    with_class = torch.cat([torch.full((1, 2), 7.0), table.float().reshape(-1, 1).expand(-1, 2)])
    two = resize_positions(with_class, case['dst_side'] ** 2, case['mode'], leading=1)
    assert (
        two.shape == (1 + case['dst_side'] ** 2, 2)
        and two[0].tolist() == [7, 7]
        and torch.allclose(two[1:, 1], found[:, 0].float(), atol=1e-5)
    )


def test_grids_of_the_resolutions():
    for name, side in HIGH['pos_interp_sides'].items():
        pixels, patch = map(int, name.split('/'))
        assert pixels // patch == side and resize_positions(torch.randn(27**2, 2), side**2).shape == (side**2, 2)


@pytest.mark.parametrize('case', HIGH['decomposition'], ids=lambda c: f'{c["resolution"]}-{c["tile"]}')
def test_sub_images(case):
    parts, side = SubImages(case['resolution'], case['tile']), case['resolution'] // case['tile']
    assert side == case['n_side'] and parts.boxes == [tuple(box) for box in case['crop_boxes_xyxy']]
    assert (
        parts.num_images == case['num_sub_images'] == len(case['images']) and parts.num_tokens == case['tokens_total']
    )
    assert parts.patches_per_image == case['patches_per_tile'] == case['patch_grid_per_tile'][0] ** 2
    assert parts.num_images * parts.patches_per_image == case['vit_tokens_total']
    assert SubImages(case['resolution'], case['resolution']).patches_per_image == case['vit_tokens_if_single_image']


def test_crops_are_the_image():
    image = Image.effect_noise((60, 40), 80).convert('RGB')
    overview, *crops = SubImages(48, 24, patch=4).cut(image)
    square, whole = Image.new('RGB', (48, 48)), letterboxed(image, 48)
    for crop, box in zip(crops, SubImages(48, 24, patch=4).boxes, strict=True):
        square.paste(crop, box[:2])
    assert square.tobytes() == whole.tobytes()
    assert overview.tobytes() == letterboxed(image, 24).tobytes()  # of the image itself, not of its enlargement
    [single] = SubImages(48, 48, patch=4).cut(image)
    assert single.tobytes() == whole.tobytes() and SubImages(48, 48, patch=4).num_tokens == 144
    assert whole.getpixel((0, 0)) == (122, 116, 104) == whole.getpixel((47, 47))  # CLIP's mean colour
    exact = Image.effect_noise((48, 48), 80).convert('RGB')
    assert letterboxed(exact, 48).tobytes() == exact.tobytes()
    for size in ((1, 1), (4000, 3), (3, 4000)):
        assert letterboxed(Image.new('RGB', size), 48).size == (48, 48)


@pytest.mark.parametrize('case', HIGH['letterbox'], ids=lambda c: str(c['image_wh']))
def test_letterbox(case):
    size, padding = letterbox(tuple(case['image_wh']), case['target'])
    assert list(size) == case['resized_wh'] and padding == tuple(
        case[f'pad_{edge}'] for edge in ('left', 'top', 'right', 'bottom')
    )
    assert case['target'] / max(case['image_wh']) == pytest.approx(case['scale'])


def test_mixed_resolution_budgets():
    budgets = HIGH['mixed_resolution_few_shot']
    high = SubImages(1344, 672)
    assert (high.num_tokens, high.tokens_per_image) == (budgets['k_high'], budgets['k_low'])
    low = SubImages(672, 672)
    for case in budgets['cases']:
        assert case['high_res_demos'] + case['low_res_demos'] == case['shots']
        crops = resolutions(case['shots'], case['high_res_demos'])
        assert sum(high.num_tokens if crop else low.num_tokens for crop in crops) == case['visual_tokens']
        assert (len(crops) * high.num_tokens, len(crops) * low.num_tokens) == (case['all_high'], case['all_low'])


def test_contrastive_loss():
    image, text, scale = torch.randn(5, 8), torch.randn(5, 8), torch.tensor(LOG_SCALE, requires_grad=True)
    captions = torch.tensor([3, 1, 3, 0, 2])
    similar = F.cosine_similarity(image[:, None], text[None], dim=-1) / 0.07
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or captions[j] != captions[i]]
        total += similar[i, others].logsumexp(0) + similar[others, i].logsumexp(0) - 2 * similar[i, i]
    loss = contrastive_loss(image, text, scale, captions)
    assert torch.allclose(loss, total / 10, rtol=1e-5)
    loss.backward()
    assert scale.grad.abs() > 0
    assert torch.allclose(
        contrastive_loss(3 * image, 0.1 * text, scale), contrastive_loss(text, image, scale)
    )  # neither lengths nor sides matter
    assert contrastive_loss(image, text, torch.tensor(99.0)).isfinite()  # the temperature is bounded
    with pytest.raises(ValueError, match='nothing to contrast'):
        contrastive_loss(image[:1], text[:1], scale)


def test_no_position_sees_the_patch_it_predicts():
    x, prefix, S = torch.randn(3, 6, 8), torch.tensor([1, 3, 0]), 6

    def attend(x):
        return F.scaled_dot_product_attention(*[x[:, None]] * 3, attn_mask=prefix_mask(prefix, S))[:, 0]

    base = attend(x)
    for later in range(1, S):
        other = x.clone()
        other[:, later] += 1
        for b, first in enumerate(prefix.tolist()):
            moved = (attend(other)[b] - base[b]).abs().amax(-1) > 1e-6
            assert moved.tolist() == [later < first or i >= later for i in range(S)]


def test_reconstruction_counts_what_comes_after_the_prefix():
    pixels, patch, prefix = torch.rand(2, 3, 8, 12), 4, torch.tensor([0, 4])
    targets = normalised_patches(pixels, patch)
    assert targets.shape == (2, 6, 48)
    part = pixels[1, :, 4:, 4:8]  # of patch 4
    assert torch.allclose(targets[1, 4].view(3, 4, 4) * part.std() + part.mean(), part, atol=1e-4)
    predictions = torch.randn(2, 6, 48, requires_grad=True)
    loss = reconstruction_loss(predictions, pixels, patch, prefix)
    errors = [
        (predictions[b, i - 1] - targets[b, i]).square().mean()
        for b, i in [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 4), (1, 5)]
    ]
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-5)
    loss.backward()
    heard = predictions.grad.abs().amax(-1) > 0
    assert heard.tolist() == [[True] * 5 + [False], [False] * 3 + [True, True, False]]
