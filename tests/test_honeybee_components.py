"""Honeybee's projectors against numbers of the official code, and what must hold at any size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mllm_replica.honeybee import blocks
from mllm_replica.honeybee.attention import attention_maps, influence_maps, locality
from mllm_replica.honeybee.blocks import initialise, uniform_points
from mllm_replica.honeybee.components import (
    CAbstractor,
    DAbstractor,
    MLPProjector,
    Resampler,
    build_projector,
    projector_fields,
)
from mllm_replica.models import layers

GOLDEN = Path(__file__).parent / 'golden' / 'honeybee'
CASES = [
    'linear',
    'mlp2_prenorm_pos_eos',
    'resampler',
    'cabs_n16_m4',
    'cabs_n16_m9_uneven_pool',
    'dabs_n16_m4_query',
    'dabs_n25_m9_none_inputproj',
]
SHAPES = json.loads((GOLDEN / 'state_dict_shapes.json').read_text())
SMALL = {
    'mlp': dict(num_query_tokens=16),
    'resampler': dict(
        num_query_tokens=5, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
    ),
    'c-abs': dict(num_query_tokens=4, depth=1, hidden_size=16),
    'd-abs': dict(num_query_tokens=4, d_model=16, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=24),
}


def load(case):
    with safe_open(GOLDEN / f'{case}.safetensors', 'pt') as file:
        return json.loads(file.metadata()['config']), {name: file.get_tensor(name) for name in file.keys()}


def small(kind, **more):
    torch.manual_seed(0)
    return initialise(build_projector(dict(projector_type=kind) | SMALL[kind] | more, 12, 20, 16), 'scaled').eval()


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(case, limits=(1e-5, 1e-4)):
    "Builds the case's projector, runs it forwards and backwards, compares every output and gradient of the file; returns how many."
    config, tensors = load(case)
    sizes = (config[name] for name in ('encoder_hidden_size', 'output_hidden_size', 'num_input_tokens'))
    projector = build_projector(config['projector_config'], *sizes).eval()
    weights = {name[2:]: t for name, t in tensors.items() if name.startswith('w.')}
    projector.load_state_dict(weights, strict=True)
    features, trace = tensors['in.visual_features'].clone().requires_grad_(), {}
    output = projector(features, trace)
    loss = (output * tensors['in.grad_output']).sum()
    loss.backward()
    assert torch.equal(projector(features), output) and torch.equal(features, tensors['in.visual_features'])
    found = {f'out.{name}': t for name, t in trace.items()} | {
        'out.last_hidden_state': output,
        'out.scalar_loss': loss[None],
    }
    found |= {'grad.in.visual_features': features.grad} | {
        f'grad.w.{name}': p.grad for name, p in projector.named_parameters()
    }
    expected = {name: t for name, t in tensors.items() if name.startswith(('out.', 'grad.'))}
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        if name.startswith('grad.') and name.endswith(
            ('key.bias', 'k_proj.bias')
        ):  # zero in theory: it shifts all scores of a query alike
            assert max(found[name].abs().max(), tensor.abs().max()) < 1e-5, name
            continue
        assert relative(found[name], tensor) <= limits[name.startswith('grad.')], (name, relative(found[name], tensor))
    assert set(weights) == {name.removeprefix('grad.w.') for name in expected if name.startswith('grad.w.')}
    return len(expected)


@pytest.mark.parametrize('case', CASES)
def test_golden(case):
    assert compare(case) >= 5


@pytest.mark.parametrize('case', CASES)
def test_golden_with_the_fast_matrix_product(case, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip('no oneDNN in this torch')
    plain, used = torch.Tensor.to_mkldnn, []
    monkeypatch.setattr(layers, '_ONEDNN_PAYS', True)
    monkeypatch.setattr(layers, '_ONEDNN_FROM', 0)
    monkeypatch.setattr(torch.Tensor, 'to_mkldnn', lambda t: used.append(1) or plain(t))
    assert compare(case) >= 5 and used


@pytest.mark.parametrize('case', ['dabs_n16_m4_query', 'dabs_n25_m9_none_inputproj'])
@pytest.mark.parametrize('first', [False, True])
def test_golden_in_both_orders_of_sampling(case, first, monkeypatch):
    monkeypatch.setattr(blocks, '_READ_COST', 0 if first else 1e9)
    calls = []
    plain = blocks.sample_then_project
    monkeypatch.setattr(blocks, 'sample_then_project', lambda *a: calls.append(1) or plain(*a))
    compare(case)
    assert bool(calls) == first


def test_an_altered_number_is_noticed(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    config, tensors = load('dabs_n16_m4_query')
    tensors['w.layers.1.encoder_attn.sampling_offsets.bias'][3] += 1e-2
    save_file(tensors, tmp_path / 'altered.safetensors', metadata={'config': json.dumps(config)})
    monkeypatch.setitem(globals(), 'GOLDEN', tmp_path)
    with pytest.raises(AssertionError):
        compare('altered')


def test_reference_points():
    _, tensors = load('dabs_reference_points')
    for name, expected in tensors.items():
        n, m = (int(part[1:]) for part in name.split('_')[1:])
        torch.testing.assert_close(uniform_points(m, int(n**0.5)), expected, rtol=0, atol=1e-7)
    centred = DAbstractor(8, 8, 16, num_query_tokens=4, d_model=8, decoder_ffn_dim=8, reference_points='centre')
    assert torch.equal(centred.reference_points, torch.full((1, 4, 2), 0.5)) and centred.reference_points.requires_grad


@pytest.mark.parametrize('name', SHAPES)
def test_official_names_and_shapes_at_paper_scale(name):
    case = SHAPES[name]
    with torch.device('meta'):
        projector = build_projector(
            case['projector_config'], case['encoder_hidden_size'], case['output_hidden_size'], case['num_input_tokens']
        )
        tokens = projector(torch.empty(2, case['num_input_tokens'], case['encoder_hidden_size']))
    assert {f'abstractor.{key}': list(t.shape) for key, t in projector.state_dict().items()} == case['state_dict']
    assert sum(p.numel() for p in projector.parameters()) == case['parameters']
    assert tokens.shape == (2, projector.num_visual_tokens, case['output_hidden_size'])


@pytest.mark.parametrize(
    'kind,more,shape',
    [
        ('mlp', dict(depth=6, prenorm=True, pos_emb=True, num_eos_tokens=3), 19),
        ('resampler', dict(num_query_tokens=7, pos_emb=True, num_eos_tokens=1), 8),
        ('resampler', dict(num_query_tokens=30), 30),
        ('c-abs', dict(num_query_tokens=25, prenorm=True), 25),
        ('c-abs', dict(num_query_tokens=16, pos_emb=False, num_eos_tokens=2, mlp_depth=1), 18),
        ('c-abs', dict(depth=0), 4),
        ('c-abs', dict(block='convnext', depth=2), 4),
        ('c-abs', dict(block='conv3x3', depth=2), 4),
        ('c-abs', dict(num_query_tokens=1), 1),
        ('d-abs', dict(num_query_tokens=36, pos_emb=False), 36),
        ('d-abs', dict(num_query_tokens=1), 1),
        ('d-abs', dict(pooled_v_target='tgt', reference_points='centre', num_eos_tokens=1), 5),
        ('d-abs', dict(pooled_v_target='none', d_model=12), 4),
    ],
)
def test_every_option_runs_and_trains(kind, more, shape):
    projector = small(kind, **more).train()
    before = torch.randn(3, 16, 12)
    features = before.clone()
    tokens = projector(features)
    assert tokens.shape == (3, shape, 20) == (3, projector.num_visual_tokens, 20)
    tokens.square().sum().backward()
    missing = [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing and torch.equal(features, before)


@pytest.mark.parametrize('kind', SMALL)
def test_images_do_not_see_each_other(kind):
    projector, features = small(kind), torch.randn(3, 16, 12)
    together = projector(features)
    torch.testing.assert_close(
        torch.cat([projector(image[None]) for image in features]), together, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize('kind', SMALL)
def test_bf16(kind):
    projector, features = small(kind), torch.randn(2, 16, 12)
    exact = projector(features)
    low = projector.to(torch.bfloat16)(features.bfloat16())
    assert low.dtype == torch.bfloat16 and relative(low.float(), exact) < 0.05
    low.float().sum().backward()


def test_the_d_abstractor_computes_in_fp32():
    projector, features = small('d-abs'), torch.randn(2, 16, 12)
    plain, mixed, rounded = {}, {}, {}
    projector(features, plain)
    with torch.autocast('cpu', torch.bfloat16):
        projector(features, mixed)
    assert all(torch.equal(plain[name], mixed[name]) for name in plain)
    projector.to(torch.bfloat16)(features.bfloat16(), rounded)
    assert {t.dtype for t in rounded.values()} == {torch.float32}


@pytest.mark.parametrize('kind', SMALL)
def test_double_precision_gradients_agree_with_differences(kind):
    projector, features = small(kind).double(), torch.randn(1, 16, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: projector(x).square().sum(), features, fast_mode=True)


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('kind', SMALL)
def test_gradient_checkpointing_changes_nothing(kind, fast, monkeypatch):
    if fast and not torch.backends.mkldnn.is_available():
        pytest.skip('no oneDNN in this torch')
    monkeypatch.setattr(layers, '_ONEDNN_PAYS', fast)
    monkeypatch.setattr(layers, '_ONEDNN_FROM', 0)
    projector, gradients = small(kind), []
    features = torch.randn(2, 16, 12)
    for run in (projector, lambda x: checkpoint(projector, x, use_reentrant=False)):
        x = features.clone().requires_grad_()
        projector.zero_grad()
        run(x).square().sum().backward()
        gradients.append([x.grad] + [p.grad.clone() for p in projector.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize('kind', ['resampler', 'd-abs'])
def test_dropout_only_in_training(kind):
    projector, features = small(kind), torch.randn(2, 16, 12)
    assert torch.equal(projector(features), projector(features))
    assert not torch.equal(projector.train()(features), projector(features))


def test_official_initial_values():
    more = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    projector = Resampler(64, 64, 16, num_query_tokens=4, pos_emb=True, **more)
    assert not projector.query_tokens.any() and not projector.visual_input_fc.bias.any()
    assert 0.018 < projector.visual_input_fc.weight.std() < 0.022 and 0.015 < projector.pos_emb.std() < 0.025
    deformable = DAbstractor(64, 64, 16, num_query_tokens=4, d_model=64, decoder_ffn_dim=64)
    offsets = deformable.layers[0].encoder_attn.sampling_offsets
    assert offsets.weight.std() > 0.015 and not offsets.bias.any()
    points = deformable.reference_points.clone()
    assert torch.equal(initialise(deformable, 'scaled').reference_points, points)


@pytest.mark.parametrize(
    'config,message',
    [
        (dict(projector_type='c-abs', num_query_tokens=5), 'not the square'),
        (dict(projector_type='d-abs', num_query_tokens=0), 'not the square'),
        (dict(projector_type='mlp', num_query_tokens=9), 'keeps all 16 features'),
        (dict(projector_type='honeycomb'), 'mlp, resampler, c-abs, d-abs'),
        (dict(projector_type='d-abs', hidden_size=3), "'hidden_size' is unknown for 'd-abs'"),
        (dict(), 'no projector_type'),
        (dict(projector_type='d-abs', num_query_tokens=4, num_queries=9), 'only 4 is possible'),
        (dict(projector_type='c-abs', encoder_hidden_size=13), 'only 12 is possible'),
        (dict(projector_type='mlp', depth=0), 'at least 1'),
        (dict(projector_type='c-abs', block='vgg'), 'resnet, convnext, conv3x3'),
        (dict(projector_type='d-abs', pooled_v_target='q'), "'query', 'tgt' or 'none'"),
    ],
)
def test_wrong_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        build_projector(config, 12, 20, 16)


def test_other_official_fields():
    "Fields that checkpoints carry: another name for the number of queries, what changes nothing here, and the spread of the end tokens."
    found = build_projector(
        dict(
            projector_type='d-abs',
            num_queries=4,
            use_cls=False,
            attention_dropout=0.0,
            initializer_range=0.5,
            num_eos_tokens=64,
            d_model=16,
            decoder_ffn_dim=16,
            decoder_layers=1,
        ),
        12,
        20,
        16,
    )
    assert found.num_query_tokens == 4 and 0.4 < found.eos_tokens.std() < 0.6 and found.output_proj.weight.std() < 0.03
    with pytest.raises(ValueError, match="'prenorm' is True, only False is possible"):
        build_projector(dict(projector_type='resampler', prenorm=True), 12, 20, 16)


@pytest.mark.parametrize('kind', SMALL)
@pytest.mark.parametrize('shape', [(2, 17, 12), (2, 16, 11), (16, 12)])
def test_wrong_features(kind, shape):
    with pytest.raises(ValueError, match=r'expects \[B, 16, 12\]'):
        small(kind)(torch.randn(shape))


def test_number_of_features_must_be_a_square():
    for kind in (CAbstractor, DAbstractor):
        with pytest.raises(ValueError, match='num_input_tokens is 15'):
            kind(12, 20, 15, num_query_tokens=4)
    assert 'block' in projector_fields('c-abs') and 'decoder_n_points' in projector_fields('d-abs')


def test_operations_are_counted_and_fake_tensors_run():
    wide = MLPProjector(512, 512, 64, depth=1)
    with FlopCounterMode(display=False) as counter:
        wide(torch.randn(8, 64, 512))
    assert counter.get_total_flops() == 2 * 8 * 64 * 512 * 512
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert MLPProjector(512, 512, 64, depth=1)(torch.randn(8, 64, 512)).shape == (8, 64, 512)


def test_maps_are_distributions_and_locality_orders_them():
    features = torch.randn(2, 16, 12)
    for kind in SMALL:
        projector = small(kind)
        for maps in (attention_maps(projector, features), influence_maps(projector, features)):
            assert maps.shape == (2, projector.num_query_tokens, 16) and not maps.requires_grad and (maps >= 0).all()
            torch.testing.assert_close(maps.sum(-1), torch.ones(2, projector.num_query_tokens))
    sharp, flat = torch.eye(16)[None], torch.full((1, 16, 16), 1 / 16)
    assert locality(sharp) == dict(mean_distance=0.0, entropy=0.0)
    assert locality(flat)['entropy'] == pytest.approx(1) and locality(flat)['mean_distance'] == pytest.approx(
        0.3745, abs=1e-3
    )


def test_a_d_abstractor_map_is_the_reading_of_a_marked_cell():
    projector, features = small('d-abs', decoder_layers=1), torch.randn(1, 16, 12)
    trace, maps = {}, attention_maps(projector, features)
    projector(features, trace)
    weights, offsets = trace['layer0.cross_weights'].squeeze(3), trace['layer0.sampling_offsets'].view(1, 4, 4, 4, 2)
    locations = projector.reference_points[:, :, None, None] + offsets / 4
    cells = torch.eye(16)[None]  # 16 channels, 4 per head: cell c is marked in channel c
    read = torch.stack([blocks.sample_values(cells.roll(shift, -1), locations, weights) for shift in (0, 4, 8, 12)])
    by_cell = torch.stack([read[s].roll(-4 * s, -1) for s in range(4)]).sum(0)
    torch.testing.assert_close(by_cell / by_cell.sum(-1, keepdim=True), maps, rtol=1e-4, atol=1e-6)
