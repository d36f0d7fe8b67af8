"mPLUG-Owl2's model: parity, batches, cache, ways, text left alone, checkpoints, what costs nothing, and wrong input."

import copy, json, re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM, Qwen2ForCausalLM

from mllm_replica.core.recipe import Stage
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.data.packing import collate, truncate
from mllm_replica.models import parity
from mllm_replica.models.official import OfficialWeightsError
from mllm_replica.owl2.abstractor import sine_grid, sine_positions
from mllm_replica.owl2.components import ADAPTIVE, Route, WayLinear, WayNorm
from mllm_replica.models.vision import resize_positions
from mllm_replica.owl2.encoder import Owl2VisionConfig, Owl2VisionModel
from mllm_replica.owl2.model import Owl2Config, Owl2Model, paper_config
from mllm_replica.owl2.processor import Owl2ImageProcessor, Owl2Processor
from mllm_replica.owl2.released import both_ways, convert_official, encoder_from_clip, load_official, official_config
from mllm_replica.owl2.stages import _ALL, _VISUAL, layerwise_decay, mixture_of, published_stages
from mllm_replica.training.loop import train
from mllm_replica.training.optimiser import freeze_all_but, make_optimizer, trainable_names

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / 'golden/owl2'
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)
ABSTRACTOR = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, num_learnable_queries=4
)
TEXT = dict(
    model_type='llama',
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    initializer_range=0.2,
    tie_word_embeddings=False,
)
QWEN = dict(
    text=dict(model_type='qwen2', num_key_value_heads=4), vision=dict(use_cls_token=False, use_post_layernorm=False)
)
KINDS = dict(
    llama={},
    shared=dict(adaptive=[]),
    grouped=dict(text=dict(num_key_value_heads=2)),
    biased=dict(text=dict(attention_bias=True)),
    qwen2=QWEN,
    qwen2_shared=QWEN | dict(adaptive=[]),
    qwen2_grouped=QWEN | dict(text=dict(model_type='qwen2', num_key_value_heads=2)),
)
IMAGE = [-1] * 5
ROWS = [[1, 10, *IMAGE, 11, *IMAGE, 12], [1, 20, *IMAGE, 21, 22], [1, 30, 31, 32, 33]]
COUNTS = [2, 1, 0]
SIDES = ('left', 'right', 'inside', 'none')
GREEDY = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
of_kind = pytest.mark.parametrize('kind', KINDS)


def build(kind='llama', equal=False, **changes):
    "A small model whose two ways differ unless they are to be `equal`."
    made = KINDS[kind] | changes
    torch.manual_seed(0)
    config = Owl2Config(
        vision_config=VISION | made.get('vision', {}),
        connector_config=ABSTRACTOR | made.get('connector', {}),
        text_config=TEXT | made.get('text', {}),
        adaptive=made.get('adaptive'),
        image_token_id=made.get('image_token_id', -1),
    )
    model = Owl2Model(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not equal:
            torch.nn.init.normal_(parameter, float('norm' in name and name.endswith('weight')), 0.2)
        if '.multiway.1.' in name and not equal:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def pixels(number=3):
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))[:number]


def padded(rows, side):
    width = max(map(len, rows))
    if side == 'none':
        rows = [row + list(range(60, 60 + width - len(row))) for row in rows]

    def fill(row, value):
        return [value] * (width - len(row))

    cut = {'left': 0, 'inside': 2}.get(side)

    def place(row, value):
        return row[:cut] + fill(row, value) + (row[cut:] if cut is not None else [])

    mask = torch.tensor([place([1] * len(row), 0) for row in rows])
    return torch.tensor([place(row, 0) for row in rows]), mask


def alone(row, ids=None, mask=None):
    "Input of one sample: ids and its pixels."
    first = sum(COUNTS[:row])
    ids = torch.tensor([ROWS[row]]) if ids is None else ids[row, mask[row].bool()][None]
    return ids, (pixels()[first : first + COUNTS[row]] if COUNTS[row] else None)


def supervised(ids, mask=None):
    "Labels of everything but images, padding and the first token, which nothing predicts."
    return ids.masked_fill((ids < 2) if mask is None else (ids < 2) | (mask == 0), -100)


def plain(model):
    "transformers' own language model with the text ways."
    kind = {'llama': LlamaForCausalLM, 'qwen2': Qwen2ForCausalLM}[model.config.text_config.model_type]
    own = kind(model.config.text_config).eval()
    own.load_state_dict(
        {
            k.replace('.multiway.0', ''): v
            for k, v in model.language_model.state_dict().items()
            if '.multiway.1.' not in k
        }
    )
    return own


# official numbers


@pytest.mark.parametrize('path', sorted(GOLDEN.glob('*.safetensors')), ids=lambda p: p.stem)
def test_official_numbers(path):
    report = parity.check_file(path)
    assert not report.problems and report.compared, report


@pytest.mark.parametrize(
    'file, name, words',
    [
        ('model', 'out.two_images.logits', 'numbers'),
        ('image_preprocess', 'out.pad.1', 'numbers'),
        ('multiway_decoder_layer', 'grad.w.self_attn.k_proj.multiway.1.weight', 'numbers'),
        ('model', 'out.one_image.greedy_new_ids', 'ids'),
    ],
)
def test_an_altered_number_is_noticed(file, name, words, tmp_path):
    golden = parity.read_golden(GOLDEN / f'{file}.safetensors')
    golden.config.pop('metadata')
    tensors = {**golden.tensors, name: golden.tensors[name].clone()}
    tensors[name].view(-1)[0] += 1 if words == 'ids' else 0.01
    save_file(tensors, tmp_path / 'a.safetensors', {'config': json.dumps(golden.config)})
    problems = parity.check_file(tmp_path / 'a.safetensors', 'owl2').problems
    assert len(problems) == 1 and re.match(rf'{re.escape(name)}: 1 of \d+ {words} differ', problems[0]), problems


# batches, cache, beams


@of_kind
@pytest.mark.parametrize('side', SIDES)
def test_a_batch_gives_the_single_answers(kind, side):
    model, (ids, mask) = build(kind), padded(ROWS, side)
    given = None if side == 'none' else mask
    logits, losses, counts = model(ids, given, pixels()).logits, [], []
    for row in range(3):
        one, images = alone(row, ids, mask)
        out = model(one, None, images, labels=supervised(one), return_logits=True)
        assert torch.allclose(logits[row][mask[row].bool()], out.logits[0], atol=3e-5)
        losses.append(out.loss)
        counts.append((supervised(one)[:, 1:] != -100).sum())
    if side == 'inside':
        return  # there the label of a token stands behind padding
    loss = model(ids, given, pixels(), labels=supervised(ids, mask)).loss
    assert torch.allclose(loss, sum(x * n for x, n in zip(losses, counts)) / sum(counts), atol=1e-5)


@pytest.mark.parametrize('seed', range(6))
@torch.no_grad()
def test_batches_of_any_composition(seed):
    random, rows, counts = np.random.default_rng(seed), [], []
    for _ in range(4):  # images anywhere: first, last, one after the other
        parts = random.permutation([1] * (images := int(random.integers(0, 4))) + [0] * int(random.integers(1, 6)))
        rows.append([token for part in parts for token in (IMAGE if part else [int(random.integers(2, 96))])])
        counts.append(images)
    model, images = build(), torch.randn(sum(counts), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    single = [model(torch.tensor([row]), None, part).logits[0] for row, part in zip(rows, images.split(counts))]
    said = [
        model.generate(torch.tensor([row]), None, part, **GREEDY)[0, -5:]
        for row, part in zip(rows, images.split(counts))
    ]
    for side in SIDES[:3]:
        ids, mask = padded(rows, side)
        logits = model(ids, mask, images).logits
        for row in range(4):
            assert torch.allclose(logits[row][mask[row].bool()], single[row], atol=3e-5)
        assert torch.equal(model.generate(ids, mask, images, **GREEDY)[:, -5:], torch.stack(said))


@of_kind
def test_decoding_of_batches_beams_and_any_padding(kind):
    model = build(kind)
    for beams in (1, 3):
        for side in SIDES:
            ids, mask = padded(ROWS, side)
            single = [
                model.generate(*((one := alone(row, ids, mask))[0], None, one[1]), num_beams=beams, **GREEDY)[0, -5:]
                for row in range(3)
            ]
            assert torch.equal(
                model.generate(ids, mask, pixels(), num_beams=beams, **GREEDY)[:, -5:], torch.stack(single)
            ), (beams, side)


@of_kind
@torch.no_grad()
def test_the_cache_changes_nothing(kind):
    model, (ids, images) = build(kind), alone(0)
    expected, so_far = [], ids
    for _ in range(5):  # everything again for every token
        expected.append(model(so_far, None, images).logits[:, -1])
        so_far = torch.cat([so_far, expected[-1].argmax(-1, keepdim=True)], 1)
    out = model.generate(ids, None, images, output_logits=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, so_far) and torch.allclose(
        torch.stack(out.logits), torch.stack(expected), atol=3e-5
    )
    for options in (dict(use_cache=False), dict(prompt_lookup_num_tokens=2)):
        assert torch.equal(model.generate(ids, None, images, **options, **GREEDY), so_far)
    cache = model(
        ids[:, :8], None, images[:1], use_cache=True
    ).past_key_values  # a second image comes to a cache that holds one
    assert torch.allclose(
        model(ids[:, 8:], None, images[1:], past_key_values=cache).logits,
        model(ids, None, images).logits[:, 8:],
        atol=3e-5,
    )


@torch.no_grad()
def test_beams_with_several_answers_and_images():
    model, (ids, mask) = build(), padded(ROWS, 'left')
    many = model.generate(ids, mask, pixels(), num_beams=4, num_return_sequences=3, **GREEDY)
    for row in range(3):
        one, images = alone(row)
        assert torch.equal(
            many[3 * row : 3 * row + 3, -5:],
            model.generate(one, None, images, num_beams=4, num_return_sequences=3, **GREEDY)[:, -5:],
        )
    assert len(many.unique(dim=0)) == 9


@of_kind
@torch.no_grad()
def test_an_image_changes_nothing_before_it(kind):
    model, (ids, images) = build(kind), alone(0)
    other = torch.stack([images[0], images[1] + 1])
    same = (model(ids, None, images).logits == model(ids, None, other).logits).all(-1)[0]
    assert same[:8].all() and not same[8:].any()  # the second image starts at token 8


def test_packed_rows_are_single_samples():
    processor = Owl2Processor(Owl2ImageProcessor(16), byte_tokenizer(), 5, -1, style='plain')
    model, samples = build(text=dict(vocab_size=260)), pictured(processor)
    packed = collate(samples, 0, packed=True, length=80, image_tensor=processor.image_tensor)
    assert packed['input_ids'].shape[0] == 2 and packed['attention_mask'].dim() == 4
    ids = packed.pop('ids')
    logits = model(**{k: v for k, v in packed.items() if k != 'labels'}).logits
    starts = [(row, int(at)) for row in range(2) for at in (packed['input_ids'][row] == 1).nonzero()]
    for name, (row, at) in zip(ids, starts, strict=True):
        sample = next(sample for sample in samples if sample.id == name)
        one = collate([sample], 0, image_tensor=processor.image_tensor)
        one.pop('ids')
        assert torch.allclose(
            logits[row, at : at + len(sample)],
            model(**{k: v for k, v in one.items() if k != 'labels'}).logits[0],
            atol=3e-5,
        )
    together = collate(samples, 0, image_tensor=processor.image_tensor)
    together.pop('ids')
    assert torch.allclose(model(**packed).loss, model(**together).loss, atol=1e-5)


# indicators


@of_kind
@torch.no_grad()
def test_indicators_given_are_those_found(kind):
    model, (ids, mask) = build(kind), padded(ROWS, 'left')
    expected, indicators = model(ids, mask, pixels()).logits, (ids == -1).long()
    for given in (indicators, indicators.bool(), indicators.float()):
        assert torch.equal(model(ids, mask, pixels(), modality_indicators=given).logits, expected)
    embeds = model.embed(ids, pixels())
    assert torch.equal(model(None, mask, inputs_embeds=embeds, modality_indicators=indicators).logits, expected)
    if model.config.adaptive:
        assert not torch.allclose(
            model(None, mask, inputs_embeds=embeds).logits[mask.bool()], expected[mask.bool()], atol=1e-2
        )


@pytest.mark.parametrize(
    'given, message',
    [
        (torch.zeros(1, 13), r'modality_indicators are \[1, 13\], the tokens \[1, 14\]'),
        (torch.zeros(2, 14), r'are \[2, 14\]'),
        (torch.full((1, 14), 2), r'hold \[2\]; expected 0 at text and 1'),
        (torch.full((1, 14), -1), r'hold \[-1\]'),
        (torch.full((1, 14), 0.5), r'hold \[0.5\]'),
        (torch.full((1, 14), float('nan')), r'hold \[nan'),
    ],
    ids=str,
)
def test_indicators_that_do_not_fit(given, message):
    ids, images = alone(0)
    with pytest.raises(ValueError, match=message):
        build()(ids, None, images, modality_indicators=given)


@pytest.mark.parametrize('seed', range(6))
def test_ways_by_stretches_are_ways_by_token(seed):
    torch.manual_seed(seed)
    visual = torch.rand(3, 7) < (0.0, 0.2, 0.5, 0.8, 1.0, 0.5)[seed]
    x, route = torch.randn(3, 7, 6), Route.of(visual)
    linear, norm = WayLinear(torch.nn.Linear(6, 4)), WayNorm(type(build().language_model.model.norm)(6))
    for part in (linear, norm):
        for parameter in part.multiway[1].parameters():
            parameter.data.normal_()
        expected = torch.where(visual[..., None], part.multiway[1](x), part.multiway[0](x))
        assert torch.allclose(part(x, route), expected, atol=1e-6)
    assert (route is None) == (not visual.any())


def apart(part):
    "The part, its copies all different."
    for way in part.multiway:
        for parameter in way.parameters():
            parameter.data.normal_()
    return part


@pytest.mark.parametrize('n', [1, 2, 3, 5])
@pytest.mark.parametrize('seed', range(3))
def test_a_token_goes_through_the_copy_that_its_index_names(n, seed):
    "Values and gradients, copies without tokens included."
    torch.manual_seed(seed)
    indices = torch.randint(n, (3, 7)) * (seed > 0)  # all text; any; without the first or the last way
    indices = indices.clamp(min=1 if n > 2 else 0, max=max(n - 2, 0)) if seed == 2 else indices
    x = torch.randn(3, 7, 6, requires_grad=True)
    for part in (
        apart(WayLinear(torch.nn.Linear(6, 4), n)),
        apart(WayLinear(torch.nn.Linear(6, 6, bias=False), n)),
        apart(WayNorm(type(build().language_model.model.norm)(6), n)),
    ):
        assert [name for name, _ in part.named_children()] == ['multiway'] and len(part.multiway) == n
        found = part(x, Route.of(indices))
        expected = sum((indices == i)[..., None] * way(x) for i, way in enumerate(part.multiway))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        weight, inputs = torch.randn_like(found), [x, *part.parameters()]
        ours, theirs = (torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True) for y in (found, expected))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32, torch.int64, torch.float32])
def test_indices_of_any_type(dtype):
    indices, x, part = torch.tensor([[2, 0, 1]]), torch.randn(1, 3, 6), apart(WayLinear(torch.nn.Linear(6, 4), 3))
    assert torch.equal(part(x, Route.of(indices.to(dtype))), part(x, Route.of(indices)))


@pytest.mark.parametrize('n, wrong', [(2, 2), (2, -1), (3, 7), (4, -3)])
def test_an_index_without_a_copy_is_named(n, wrong):
    for part in (WayLinear(torch.nn.Linear(6, 4), n), WayNorm(type(build().language_model.model.norm)(6), n)):
        with pytest.raises(ValueError, match=f'index {wrong}, which has no copy: there are {n}'):
            part(torch.randn(1, 3, 6), Route.of(torch.tensor([[0, wrong, 1]])))


def test_one_copy_ignores_indices_and_no_copy_is_none():
    part, x = WayLinear(torch.nn.Linear(6, 4), 1), torch.randn(1, 3, 6)
    assert torch.equal(part(x, Route.of(torch.tensor([[0, 5, 1]]))), part.multiway[0](x))
    with pytest.raises(ValueError, match='0 ways; expected at least one'):
        WayLinear(torch.nn.Linear(6, 4), 0)
    with pytest.raises(ValueError, match='indices hold 1.5; expected whole numbers'):
        Route.of(torch.tensor([[0, 1.5]]))


# text


@of_kind
@torch.no_grad()
def test_text_alone_is_the_plain_model_bit_for_bit(kind):
    model, (ids, mask) = build(kind), padded([row for row in ROWS if -1 not in row] + [[1, *range(40, 57)]], 'left')
    own = plain(model)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = own(ids, mask, position_ids=positions).logits
    none = torch.zeros(0, 3, 16, 16)
    for images in (None, none):
        assert torch.equal(model(ids, mask, images).logits, expected)
    assert torch.equal(model(ids, mask, image_features=torch.zeros(0, 17, 32)).logits, expected)
    assert torch.equal(model(ids[1:]).logits, own(ids[1:]).logits)
    assert torch.equal(model.generate(ids, mask, none, **GREEDY), own.generate(ids, attention_mask=mask, **GREEDY))


def test_text_alone_trains_no_visual_way():
    model, ids = build(), torch.tensor([ROWS[2]])
    model(ids, labels=ids).loss.backward()
    own = plain(model)
    own(ids, labels=ids).loss.backward()
    theirs = {name: parameter.grad for name, parameter in own.named_parameters()}
    for name, parameter in model.language_model.named_parameters():
        if '.multiway.1.' in name:
            assert parameter.grad is None
        else:
            assert torch.allclose(parameter.grad, theirs[name.replace('.multiway.0', '')], atol=1e-6)


@of_kind
@torch.no_grad()
def test_equal_ways_are_the_shared_model(kind):
    model, (ids, mask) = build(kind, equal=True), padded(ROWS, 'right')
    shared = build(kind, adaptive=[])
    state = {n.replace('.multiway.0', ''): t for n, t in model.state_dict().items() if '.multiway.1.' not in n}
    shared.load_state_dict(state)
    assert torch.allclose(model(ids, mask, pixels()).logits, shared(ids, mask, pixels()).logits, atol=2e-5)
    embeds = model.embed(ids, pixels())
    assert torch.equal(
        shared(ids, mask, pixels()).logits[mask.bool()],
        plain(shared)(inputs_embeds=embeds, attention_mask=mask).logits[mask.bool()],
    )


@of_kind
def test_both_ways_start_as_the_language_model(kind):
    model = build(kind)
    state = both_ways(plain(model).state_dict(), model.config)
    model.load_state_dict(state, strict=False)
    assert set(state) == {name for name in model.state_dict() if name.startswith('language_model.')}
    for name, tensor in model.state_dict().items():
        if '.multiway.1.' in name:
            assert torch.equal(tensor, model.state_dict()[name.replace('.multiway.1.', '.multiway.0.')])


@pytest.mark.parametrize('kind', ['llama', 'qwen2'])
def test_text_is_untouched_by_stage_one(kind):
    model, (ids, images), text = build(kind), alone(0), torch.tensor([ROWS[2]])
    before, seen = model(text).logits.detach(), model(ids, None, images).logits.detach()
    said = model.generate(text, **GREEDY)
    names = trainable_names(model, _VISUAL)
    ways = [
        f'language_model.model.layers.{i}.{part}.multiway.1'
        for i in range(3)
        for part in ADAPTIVE[model.config.text_config.model_type]
    ]
    assert set(names) == {
        n for n, _ in model.named_parameters() if n.startswith(('vision_model.', 'visual_abstractor.', *ways))
    }
    freeze_all_but(model, names)
    stage = Stage(
        name='pretrain',
        trainable=_VISUAL,
        mixture={'pairs': 1.0},
        steps=3,
        batch_size=3,
        lr=0.05,
        weight_decay=0.05,
        lr_scale=layerwise_decay(2, 0.9),
    )
    optimiser = make_optimizer(model, names, stage)
    (mixed, mask), start = padded(ROWS, 'right'), copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimiser.zero_grad()
        model(mixed, mask, pixels(), labels=supervised(mixed, mask)).loss.backward()
        optimiser.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed == set(names)
    model.eval()
    assert torch.equal(model(text).logits, before) and torch.equal(model.generate(text, **GREEDY), said)
    assert not torch.allclose(model(ids, None, images).logits, seen, atol=0.1)


# precision, attention, checkpointing


@of_kind
@torch.no_grad()
def test_attention_implementations_agree(kind):
    model, (ids, mask) = build(kind), padded(ROWS, 'left')
    first = model(ids, mask, pixels()).logits
    model.language_model.set_attn_implementation('eager')
    out = model(ids, mask, pixels(), output_attentions=True, output_hidden_states=True)
    assert torch.allclose(out.logits[mask.bool()], first[mask.bool()], atol=5e-5)
    assert [a.shape for a in out.attentions] == [(3, 4, 14, 14)] * 3 and len(out.hidden_states) == 4


@of_kind
def test_mixed_precision(kind):
    model, (ids, mask) = build(kind), padded(ROWS, 'right')
    expected = model(ids, mask, pixels(), labels=supervised(ids, mask)).loss
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(ids, mask, pixels(), labels=supervised(ids, mask)).loss
    loss.backward()
    assert torch.allclose(loss, expected, rtol=0.02)
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        for n, p in model.named_parameters()
        if not n.endswith('key.bias')
    )


@of_kind
@torch.no_grad()
def test_half_precision(kind):
    model, (ids, mask) = build(kind), padded(ROWS, 'left')
    expected = model(ids, mask, pixels()).logits[mask.bool()]
    half = model.to(torch.bfloat16)
    for images in (pixels(), pixels().bfloat16()):
        found = half(ids, mask, images).logits[mask.bool()]
        assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert half.generate(ids, mask, pixels(), **GREEDY).shape == (3, 19)


@of_kind
@pytest.mark.parametrize('reentrant', (False, True))
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    model, (ids, mask), found, passes = build(kind).train(), padded(ROWS, 'right'), [], Counter()
    model.language_model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: passes.update(text=1))
    model.vision_model.encoder['layers'][0].input_layernorm.register_forward_hook(lambda *_: passes.update(vision=1))
    for used in (False, True):
        if used:
            model.gradient_checkpointing_enable({'use_reentrant': reentrant})
        model.zero_grad()
        model(ids, mask, pixels().requires_grad_(), labels=supervised(ids, mask)).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert passes == dict(text=3, vision=3)
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


# what a forward does

SEARCHES = {
    'nonzero',
    'index',
    'index_put',
    'index_put_',
    'index_select',
    'gather',
    'scatter',
    'scatter_',
    'scatter_add',
    'masked_select',
    'masked_scatter',
    'unique_consecutive',
    '_unique2',
    '_local_scalar_dense',
    'argsort',
    'sort',
    'is_nonzero',
    'tolist',
    'item',
    '__bool__',
    '__int__',
    '__float__',
    'embedding',
}
BACKWARD = {'embedding_dense_backward', 'index_backward', 'masked_scatter_backward'}
WAITS = {'nonzero', 'unique_consecutive', '_unique2', 'masked_select', '_local_scalar_dense', 'is_nonzero'}


class Calls(TorchDispatchMode):
    "Counts operators, in and outside decoder layers."

    def __init__(self, model):
        super().__init__()
        self.inside, self.all, self.depth = Counter(), Counter(), 0
        for layer in model.language_model.model.layers:
            layer.register_forward_pre_hook(lambda *_: self.enter(1))
            layer.register_forward_hook(lambda *_: self.enter(-1))

    def enter(self, by):
        self.depth += by

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.all[name] += 1
        if self.depth:
            self.inside[name] += 1
        return function(*arguments, **(options or {}))


class Asks(TorchFunctionMode):
    "Counts what Python asks of tensors without an operator, such as `tolist`."

    def __init__(self, calls):
        super().__init__()
        self.calls, self.inside, self.all = calls, Counter(), Counter()

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, '__name__', '')
        self.all[name] += 1
        if self.calls.depth:
            self.inside[name] += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize('kind', ['llama', 'qwen2'])
@pytest.mark.parametrize('step', ['forward', 'backward', 'decode'])
def test_no_layer_searches_or_waits(kind, step):
    waits, total = [], []
    for layers in (2, 5):
        model = build(kind, text=KINDS[kind].get('text', {}) | dict(num_hidden_layers=layers))
        ids, mask = padded(ROWS, 'left')
        given = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels())
        if step == 'decode':
            with torch.no_grad():
                cache = model(**given, use_cache=True).past_key_values
            given = dict(
                input_ids=torch.full((3, 1), 40),
                attention_mask=torch.cat([mask, mask[:, :1] * 0 + 1], 1),
                past_key_values=cache,
            )
        labels = supervised(ids, mask) if step == 'backward' else None
        with (calls := Calls(model)), (asks := Asks(calls)):
            out = model(**given, labels=labels)
            if labels is not None:
                out.loss.backward()
        assert calls.inside['mm'] >= 4 * layers and asks.inside['linear'] >= 7 * layers  # the counters see the layers
        assert not SEARCHES & (set(calls.inside) | set(asks.inside)), (calls.inside, asks.inside)
        waits.append(Counter({n: c for n, c in calls.all.items() if n in WAITS}) + Counter(tolist=asks.all['tolist']))
        total.append({n: c for n, c in calls.all.items() if n in SEARCHES | BACKWARD})
    assert waits[0] == waits[1] and total[0] == total[1]
    assert waits[0].total() <= {'forward': 7, 'backward': 10, 'decode': 5}[step], waits[0]


def test_the_route_is_found_once_and_text_has_none(monkeypatch):
    model, found, made = build(), [], Route.of.__func__
    monkeypatch.setattr(Route, 'of', classmethod(lambda cls, visual: found.append(made(cls, visual)) or found[-1]))
    ids, images = alone(0)
    model.generate(ids, None, images, **GREEDY)
    assert found[0].lengths == [2, 5, 1, 5, 1] and not any(found[1:])  # what is generated is text
    seen = []
    for layer in model.language_model.model.layers:
        layer.register_forward_pre_hook(lambda _, __, given: seen.append(given['route']), with_kwargs=True)
    model(ids, None, images)
    assert all(route is seen[0] for route in seen) and len(seen) == 3


# checkpoints


@pytest.fixture(scope='module')
def published():
    "The paper's model without memory."
    with torch.device('meta'):
        return Owl2Model(paper_config())


def official_keys():
    "Names and shapes of the released 7B files, without tables that can be computed."
    D, F, V, C, M, A, K, S = 4096, 11008, 32000, 1024, 4096, 2816, 64, 1025
    keys = {'lm_head.weight': (V, D), 'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
    for i in range(32):
        at = f'model.layers.{i}.'
        keys |= {f'{at}self_attn.{p}_proj.weight': (D, D) for p in 'qo'}
        keys |= {f'{at}self_attn.{p}_proj.multiway.{way}.weight': (D, D) for p in 'kv' for way in (0, 1)}
        keys |= {
            f'{at}{norm}.multiway.{way}.weight': (D,)
            for norm in ('input_layernorm', 'post_attention_layernorm')
            for way in (0, 1)
        }
        keys |= {
            f'{at}mlp.gate_proj.weight': (F, D),
            f'{at}mlp.up_proj.weight': (F, D),
            f'{at}mlp.down_proj.weight': (D, F),
        }

    def both(name, *shape):
        return {f'{name}.weight': shape, f'{name}.bias': shape[:1]}

    at = 'model.vision_model.'
    keys |= {f'{at}embeddings.cls_token': (1, 1, C), f'{at}embeddings.position_embedding': (1, S, C)}
    keys |= {f'{at}embeddings.patch_embed.weight': (C, 3, 14, 14)}
    keys |= both(f'{at}embeddings.pre_layernorm', C) | both(f'{at}post_layernorm', C)
    for i in range(24):
        layer = f'{at}encoder.layers.{i}.'
        keys |= (
            both(f'{layer}input_layernorm', C)
            | both(f'{layer}post_attention_layernorm', C)
            | both(f'{layer}self_attn.query_key_value', 3 * C, C)
        )
        keys |= both(f'{layer}self_attn.dense', C, C) | both(f'{layer}mlp.fc1', M, C) | both(f'{layer}mlp.fc2', C, M)
    at = 'model.visual_abstractor.'
    keys |= {f'{at}query_embeds': (1, K, C), f'{at}vit_eos': (1, 1, D)} | both(f'{at}visual_fc', D, C)
    for i in range(6):
        layer = f'{at}encoder.layers.{i}.crossattention.'
        for part in ('query', 'key', 'value'):
            keys |= both(f'{layer}attention.{part}', C, C)
        keys |= (
            both(f'{layer}output.out_proj', C, C)
            | both(f'{layer}norm1', C)
            | both(f'{layer}normk', C)
            | both(f'{layer}output.norm2', C)
        )
        layer += 'output.mlp.'
        keys |= (
            both(f'{layer}w1', A, C) | both(f'{layer}w3', A, C) | both(f'{layer}w2', C, A) | both(f'{layer}ffn_ln', A)
        )
    return keys


def test_released_keys_and_size(published):
    state = {name: torch.empty(shape, device='meta') for name, shape in official_keys().items()}
    frequencies = 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    ours = convert_official(
        state | {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': frequencies for i in range(32)}, published.config
    )
    assert {name: tuple(t.shape) for name, t in ours.items()} == {
        name: tuple(t.shape) for name, t in published.state_dict().items()
    }
    sizes = Counter()
    for name, parameter in published.named_parameters():
        sizes[name.split('.')[0]] += parameter.numel()
    assert (
        sizes == dict(vision_model=303_966_208, visual_abstractor=81_473_536, language_model=7_812_419_584)
        and sizes.total() == 8_197_859_328
    )
    with torch.device('meta'):
        shared = Owl2Model(paper_config(adaptive=[]))
    assert sizes.total() - shared.num_parameters() == 1_074_003_968
    assert paper_config().visual_token_count() == paper_config(224).visual_token_count() == 65


QWEN_NAMES = {
    'model.embed_tokens': 'transformer.wte',
    'model.norm': 'transformer.ln_f',
    'model.layers': 'transformer.h',
    'input_layernorm': 'ln_1',
    'post_attention_layernorm': 'ln_2',
    'self_attn.o_proj': 'attn.c_proj',
    'mlp.up_proj': 'mlp.w1',
    'mlp.gate_proj': 'mlp.w2',
    'mlp.down_proj': 'mlp.c_proj',
}


def official_state(model):
    "The model's weights under the official names."

    def name_of(name):
        if not name.startswith('language_model.'):
            return f'{owner}.{name}'
        name = name.removeprefix('language_model.')
        if owner == 'model':
            return name
        for ours, theirs in QWEN_NAMES.items():
            name = name.replace(ours, theirs)
        return name

    owner = 'model' if model.config.text_config.model_type == 'llama' else 'transformer'
    state, found = model.state_dict(), {}
    for name, tensor in state.items():
        if owner == 'model' or not re.search(r'self_attn\.[qkv]_proj', name):
            found[name_of(name)] = tensor.contiguous()
        elif 'q_proj' in name:
            together = torch.cat([state[name.replace('q_proj', f'{part}_proj')] for part in 'qkv'])
            found[name_of(name).replace('self_attn.q_proj', 'attn.c_attn')] = together
    return found


def official_settings(model):
    "The content of an official config.json."
    text, vision = model.config.text_config.to_dict(), model.config.vision_config.to_dict()
    visual = dict(visual_model=vision, visual_abstractor=model.config.connector_config)
    common = ['vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'max_position_embeddings']
    if text['model_type'] == 'llama':
        fields = dict(rope_theta=1e4)
        common += ['num_key_value_heads', 'rms_norm_eps', 'attention_bias', 'hidden_act']
    else:
        fields = dict(layer_norm_epsilon=text['rms_norm_eps'], rotary_emb_base=10000, kv_channels=12, no_bias=True)
        fields |= dict(multiway=bool(model.config.adaptive))
    fields |= {name: text[name] for name in common}
    fields['intermediate_size'] = text['intermediate_size'] * (1 if text['model_type'] == 'llama' else 2)
    return fields | dict(tie_word_embeddings=False, visual_config=visual)


def write_official(folder, model, kind='safetensors', **changes):
    "An official folder with the model's weights; a change to None takes a key away."
    state = {name: tensor for name, tensor in (official_state(model) | changes).items() if tensor is not None}
    (folder / 'config.json').write_text(json.dumps(official_settings(model)))
    if kind == 'safetensors':
        return save_file(state, folder / 'model.safetensors')
    names, index = sorted(state), {}
    for shard in range(3):
        file = f'pytorch_model-{shard + 1}-of-3.bin'
        torch.save({name: state[name] for name in names[shard::3]}, folder / file)
        index |= dict.fromkeys(names[shard::3], file)
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': index}))


@pytest.mark.parametrize('files', ['safetensors', 'shards'])
@pytest.mark.parametrize('kind', ['llama', 'grouped', 'biased', 'qwen2', 'qwen2_shared'])
@torch.no_grad()
def test_official_folder(kind, files, tmp_path):
    model, (ids, mask) = build(kind), padded(ROWS, 'left')
    write_official(tmp_path, model, files)
    loaded = load_official(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded(ids, mask, pixels()).logits, model(ids, mask, pixels()).logits)
    half = load_official(tmp_path, torch.bfloat16)
    found, expected = half(ids, mask, pixels()).logits[mask.bool()], model(ids, mask, pixels()).logits[mask.bool()]
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.1 * expected.abs().max()


@torch.no_grad()
def test_tables_in_a_file_may_only_be_ours(tmp_path):
    model, (ids, images) = build(), alone(0)
    at, inv_freq = (
        'model.visual_abstractor.encoder.layers.1.crossattention.attention.',
        'model.layers.2.self_attn.rotary_emb.inv_freq',
    )
    tables = {f'{at}q_pos_embed': sine_positions(torch.arange(4), 32), f'{at}k_pos_embed': sine_grid(4, 32, True)}
    tables[inv_freq] = 10000.0 ** (-torch.arange(0, 12, 2) / 12)
    for dtype in (torch.float32, torch.float16):
        write_official(tmp_path, model, **{name: table.to(dtype) for name, table in tables.items()})
        assert torch.equal(load_official(tmp_path)(ids, None, images).logits, model(ids, None, images).logits)
    for name, table in tables.items():
        for wrong in (table + 0.05, table[:-1].clone()):  # other values, another shape
            write_official(tmp_path, model, **{name: wrong})
            with pytest.raises(OfficialWeightsError, match=re.escape(name)):
                load_official(tmp_path)


def test_official_keys_that_do_not_fit(tmp_path):
    model = build()
    way, head = 'model.layers.1.self_attn.k_proj.multiway.1.weight', 'lm_head.weight'
    write_official(
        tmp_path,
        model,
        **{way: None, head: torch.zeros(95, 48), 'model.layers.1.self_attn.k_proj.weight': torch.zeros(48, 48)},
    )
    with pytest.raises(OfficialWeightsError, match='3 keys do not fit, nothing was loaded') as found:
        load_official(tmp_path)
    message = str(found.value)
    assert 'missing     language_model.model.layers.1.self_attn.k_proj.multiway.1.weight [48, 48]' in message
    assert 'unexpected  language_model.model.layers.1.self_attn.k_proj.weight [48, 48]' in message
    assert 'wrong shape language_model.lm_head.weight: found [95, 48], expected [96, 48]' in message


def test_owl21_without_ways_is_qwen_itself(tmp_path):
    "`multiway: false`: one fused projection for all tokens; the flag and the weights must agree."
    model, (ids, images) = build('qwen2_shared'), alone(0)
    write_official(tmp_path, model)
    state, config = load_file(tmp_path / 'model.safetensors'), json.loads((tmp_path / 'config.json').read_text())
    assert config['multiway'] is False and not any('multiway' in name for name in state)
    assert state['transformer.h.0.attn.c_attn.weight'].shape == (144, 48)
    loaded = load_official(tmp_path)
    assert loaded.config.adaptive == [] and not any('multiway' in name for name in loaded.state_dict())
    assert torch.equal(loaded(ids, None, images).logits, model(ids, None, images).logits)
    (tmp_path / 'config.json').write_text(json.dumps(config | {'multiway': True}))
    with pytest.raises(OfficialWeightsError, match='self_attn.q_proj.multiway.0.weight'):
        load_official(tmp_path)
    assert official_config({k: v for k, v in config.items() if k != 'multiway'}).adaptive == list(ADAPTIVE['qwen2'])


@pytest.mark.parametrize(
    'weights, settings, message',
    [
        ('qwen2', 'llama', r'weights are those of Owl2.1 \(Qwen\), the configuration is of Owl2 \(Llama\)'),
        ('llama', 'qwen2', r'weights are those of Owl2 \(Llama\), the configuration is of Owl2.1 \(Qwen\)'),
    ],
)
def test_a_checkpoint_of_the_other_variant(weights, settings, message, tmp_path):
    write_official(tmp_path, build(weights))
    (tmp_path / 'config.json').write_text(json.dumps(official_settings(build(settings))))
    with pytest.raises(OfficialWeightsError, match=message):
        load_official(tmp_path)


def test_settings_that_do_not_fit():
    good = official_settings(build())
    for missing in ('vocab_size', 'intermediate_size', 'num_attention_heads'):
        with pytest.raises(ValueError, match=rf"config.json lacks \['{missing}'\]"):
            official_config({k: v for k, v in good.items() if k != missing})
    with pytest.raises(ValueError, match=r'visual_config has \[\]; expected visual_model'):
        official_config(good | {'visual_config': None})
    with pytest.raises(ValueError, match="abstractor has {'grid_size': 5}, the encoder needs {'grid_size': 4}"):
        build(connector=dict(grid_size=5))
    with pytest.raises(ValueError, match='must equal encoder_hidden_size 32'):
        build(connector=dict(hidden_size=64))
    with pytest.raises(ValueError, match=r"settings \['queries'\] are unknown"):
        build(connector=dict(queries=3))
    with pytest.raises(NotImplementedError, match='add_v2t_pos_emb'):
        build(connector=dict(add_v2t_pos_emb=True))
    with pytest.raises(ValueError, match='num_learnable_queries is 0'):
        build(connector=dict(num_learnable_queries=0))
    with pytest.raises(ValueError, match=r"parts \['self_attn'\] cannot have ways; expected some of"):
        build(adaptive=['self_attn'])
    with pytest.raises(ValueError, match="language model 'mistral'"):
        build(text=dict(model_type='mistral'))
    with pytest.raises(NotImplementedError, match='MistralDecoderLayer'):
        build(text=dict(model_type='mistral'), adaptive=['input_layernorm'])


@pytest.mark.parametrize('kind', ['llama', 'shared', 'qwen2'])
@torch.no_grad()
def test_saved_and_loaded(kind, tmp_path):
    model, (ids, mask) = build(kind), padded(ROWS, 'left')
    model.save_pretrained(tmp_path)
    loaded = Owl2Model.from_pretrained(tmp_path)
    assert all(
        getattr(loaded.config, name) == getattr(model.config, name)
        for name in ('adaptive', 'connector_config', 'image_token_id')
    )
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(loaded(ids, mask, pixels()).logits, model(ids, mask, pixels()).logits)
    state = load_file(tmp_path / 'model.safetensors')
    for part in (
        'language_model.model.layers.1.self_attn.q_proj',
        'vision_model.embeddings.position_embedding',
        'visual_abstractor.vit_eos',
    ):
        save_file(
            {k: v for k, v in state.items() if not k.startswith(part)}, tmp_path / 'model.safetensors', {'format': 'pt'}
        )
        with pytest.raises(ValueError, match=rf'lacks \d weights.*{part.rpartition(".")[2]}'):
            Owl2Model.from_pretrained(tmp_path)


@torch.no_grad()
def test_tied_embeddings_survive(tmp_path):
    model, (ids, images) = build(text=dict(tie_word_embeddings=True)), alone(0)
    model.save_pretrained(tmp_path)
    loaded = Owl2Model.from_pretrained(tmp_path)
    assert loaded.language_model.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(ids, None, images).logits, model(ids, None, images).logits)


# encoder


def test_positions_of_another_resolution():
    table = torch.randn(1 + 16, 8)
    larger = resize_positions(table, 64, leading=1)
    assert larger.shape == (65, 8) and torch.equal(larger[0], table[0])
    constant = torch.arange(8.0).expand(256, 8)
    assert torch.allclose(
        resize_positions(constant, 1024), torch.arange(8.0).expand(1024, 8), atol=1e-5
    )  # 224 -> 448 pixels
    ramp = resize_positions(torch.arange(16.0)[:, None].expand(-1, 16).reshape(256, 1).contiguous(), 1024).reshape(
        32, 32
    )
    assert torch.allclose(
        ramp[4:-4], ((torch.arange(32.0) + 0.5) / 2 - 0.5)[4:-4, None].expand(-1, 32), atol=0.05
    )  # rows stay rows
    assert resize_positions(table[1:], 16) is not None and torch.equal(resize_positions(table[1:], 16), table[1:])
    for rows, patches, message in ((15, 16, 'rows of the position table is 15'), (16, 15, 'number of patches is 15')):
        with pytest.raises(ValueError, match=message):
            resize_positions(torch.randn(rows, 8), patches)


@pytest.mark.parametrize('size', [16, 32])
@torch.no_grad()
def test_the_encoder_starts_as_clip(size):
    torch.manual_seed(0)
    common = {name: size for name, size in VISION.items() if name != 'image_size'} | dict(
        hidden_act='quick_gelu', layer_norm_eps=1e-5
    )
    clip = CLIPVisionModel(
        CLIPVisionConfig(image_size=16, initializer_range=1.0, initializer_factor=3.0, **common)
    ).eval()
    for parameter in clip.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    ours = Owl2VisionModel(Owl2VisionConfig(image_size=size, **common)).eval()
    for state in (
        clip.state_dict(),
        {f'vision_model.{name.removeprefix("vision_model.")}': t for name, t in clip.state_dict().items()},
    ):
        ours.load_state_dict(encoder_from_clip(state, 4, (size // 4) ** 2))
    x = torch.randn(2, 3, size, size)
    theirs, found = (
        clip(x, output_hidden_states=True, interpolate_pos_encoding=size != 16),
        ours(x, output_hidden_states=True),
    )
    assert len(found.hidden_states) == len(theirs.hidden_states) == 3
    for a, b in zip(found.hidden_states, theirs.hidden_states):
        assert torch.allclose(a, b, atol=1e-4)
    assert torch.allclose(found.last_hidden_state[:, 0], theirs.pooler_output, atol=1e-4)


# learning rates


def test_learning_rates_of_the_published_stages(published):
    pretrain, tune = published_stages(mixture_of())
    assert (pretrain.steps, tune.steps) == (42_500, 4_800)
    for stage, rate, decay in ((pretrain, 1e-4, 0.05), (tune, 2e-5, 0.0)):
        names = trainable_names(published, stage.trainable)
        groups = make_optimizer(published, names, stage).param_groups
        found = {name: (group['lr'], group['weight_decay']) for group in groups for name in group['names']}
        assert list(sorted(found)) == sorted(names)
        for name, parameter in published.named_parameters():
            if name not in found:
                continue
            layer = re.match(r'vision_model\.encoder\.layers\.(\d+)\.', name)
            power = 25 if name.startswith('vision_model.embeddings.') else 24 - int(layer[1]) if layer else 0
            assert found[name][0] == pytest.approx(rate * 0.9**power, rel=1e-12), name
            assert found[name][1] == (decay if parameter.dim() > 1 else 0.0), name
    frozen = {name for name, _ in published.named_parameters()} - set(trainable_names(published, pretrain.trainable))
    ways = {name for name, _ in published.named_parameters() if '.multiway.0.' in name}
    assert (
        len(ways) == 32 * 4
        and ways < frozen
        and all(name.startswith('language_model.') and '.multiway.1.' not in name for name in frozen)
    )
    assert len(frozen) == 32 * (4 + 5) + 3 and trainable_names(published, _ALL) == [
        name for name, _ in published.named_parameters()
    ]


# processor and model


def pictured(processor):
    "Encoded samples with pictures of several sizes, one without."

    def sample(name, sizes, text):
        images = [
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8))
            for i, (width, height) in enumerate(sizes)
        ]
        turns = [{'from': 'human', 'value': '<image>' * len(sizes) + text}, {'from': 'gpt', 'value': 'yes'}]
        return processor.encode(dict(id=name, images=images, conversations=turns))

    return [
        sample('a', [(40, 24), (9, 60)], ' which is older ?'),
        sample('b', [], 'is snow white ?'),
        sample('c', [(16, 16)], ' is it blue ?'),
        sample('d', [(3, 3), (16, 17), (100, 20)], ' and now ?'),
    ]


@torch.no_grad()
def test_pictures_of_any_size_in_one_batch():
    processor = Owl2Processor(Owl2ImageProcessor(16), byte_tokenizer(), 5, -1)
    model, samples = build(text=dict(vocab_size=260)), pictured(processor)
    for side in ('left', 'right'):
        batch = collate(samples, 0, side, image_tensor=processor.image_tensor)
        assert batch['pixel_values'].shape == (6, 3, 16, 16)
        logits = model(batch['input_ids'], batch['attention_mask'], batch['pixel_values']).logits
        for row, sample in enumerate(samples):
            one = processor.image_tensor(sample.images) if sample.images else None
            found, expected = (
                logits[row][batch['attention_mask'][row].bool()],
                model(torch.tensor([sample.input_ids]), None, one).logits[0],
            )
            assert torch.allclose(found, expected, atol=5e-5)


def test_a_cut_inside_an_image_takes_the_whole_image():
    processor = Owl2Processor(Owl2ImageProcessor(16), byte_tokenizer(), 5, -1, style='plain')
    turns = [
        {'from': role, 'value': text}
        for role, text in (('human', '<image> one ?'), ('gpt', 'yes'), ('human', '<image> two ?'), ('gpt', 'no'))
    ]
    whole = processor.encode(
        dict(id='s', images=[Image.new('RGB', (20, 30), colour) for colour in ('red', 'blue')], conversations=turns)
    )
    start, stop = whole.image_spans[1]
    model = build(text=dict(vocab_size=260))
    for length in range(start, stop + 2):
        cut = truncate(whole, length)
        assert (len(cut), len(cut.images)) == ((start, 1) if length < stop else (length, 2)) and cut.input_ids.count(
            -1
        ) == 5 * len(cut.images)
        batch = collate([cut], 0, image_tensor=processor.image_tensor)
        assert batch.pop('ids') == ['s'] and model(**batch).loss.isfinite()
    with pytest.raises(ValueError, match="sample 's'.*nothing supervised is left"):
        truncate(whole, 4)


# wrong input


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(pixel_values=pixels()), 'found 10 image positions, expected 15'),
        (dict(pixel_values=pixels(1)), 'found 10 image positions, expected 5'),
        (dict(), 'sample 0 has image positions but neither'),
        (dict(pixel_values=pixels(0)), 'sample 0 has image positions but neither'),
        (dict(image_features=torch.zeros(0, 17, 32)), 'sample 0 has image positions but neither'),
        (dict(image_features=torch.zeros(2, 16, 32)), 'image has 16 tokens, the abstractor has positions for 17'),
        (dict(pixel_values=torch.zeros(2, 3, 20, 20)), '25 patches, the position table has 16'),
    ],
    ids=['more', 'fewer', 'none', 'empty', 'no features', 'other features', 'larger'],
)
def test_images_must_fit_placeholders(given, message):
    model, ids = build(), torch.tensor([ROWS[0]])
    with pytest.raises(ValueError, match=message):
        model(ids, **given)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **given, **GREEDY)


def test_images_without_placeholder():
    model, ids = build(), torch.tensor(ROWS[2:] * 2)
    for rows in (ids[:1], ids):
        with pytest.raises(ValueError, match='found 0 image positions, expected 5: 1 of 1 images are left over'):
            model(rows, None, pixels(1))
    cut = torch.tensor([[1, *IMAGE[:4], 5]])
    with pytest.raises(ValueError, match='sample 0: found 4 image positions, expected a multiple of 5'):
        model(cut, None, pixels(1))


def test_a_whole_batch_may_have_no_image():
    processor = Owl2Processor(Owl2ImageProcessor(16), byte_tokenizer(), 5, -1)
    model, text = build(text=dict(vocab_size=260)), [s for s in pictured(processor) if not s.images]
    batch = collate(text * 2, 0, image_tensor=processor.image_tensor)
    assert batch.pop('ids') == ['b', 'b'] and 'pixel_values' not in batch
    assert torch.equal(model(**batch).loss, model(**batch, pixel_values=torch.zeros(0, 3, 16, 16)).loss)


def test_stage_1_goes_on_after_a_batch_without_images(tmp_path):
    processor = Owl2Processor(Owl2ImageProcessor(16), byte_tokenizer(), 5, -1)
    model, text = build(text=dict(vocab_size=260)), [s for s in pictured(processor) if not s.images]
    stage = Stage(name='pretrain', trainable=_VISUAL, mixture={'text': 1.0}, steps=2, batch_size=2, lr=0.05)
    before = copy.deepcopy(model.state_dict())
    points = train(
        model,
        [stage],
        {'text': text},
        partial(collate, pad_token_id=0, image_tensor=processor.image_tensor),
        tmp_path,
        0,
    ).points
    assert len(points) == 2 and all(point.loss > 0 and point.grad_norm == 0 for point in points)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# what would otherwise pass in silence


@pytest.mark.parametrize('part', ['mlp.gate_proj', 'self_attn.o_proj', 'mlp.down_proj'])
def test_a_part_that_cannot_have_ways_is_refused(part):
    with pytest.raises((ValueError, NotImplementedError), match=part):
        build(adaptive=[part])


def test_rotary_scaling_of_an_official_configuration_is_not_lost():
    scaled = official_settings(build()) | dict(rope_scaling={'type': 'linear', 'factor': 2.0})
    try:
        config = official_config(scaled)
    except (ValueError, NotImplementedError) as error:
        assert 'rope_scaling' in str(error)
    else:
        assert (
            config.text_config.rope_parameters['rope_type'] == 'linear'
            and config.text_config.rope_parameters['factor'] == 2.0
        )


@pytest.mark.parametrize('shape', [(8, 32), (17, 16)])
def test_pictures_of_another_shape_are_refused(shape):
    ids = torch.tensor([ROWS[1]])
    with pytest.raises(ValueError, match=f'{shape[0]}.*{shape[1]}'):
        build()(ids, None, torch.zeros(1, 3, *shape))


def test_an_encoder_without_all_its_weights_is_refused(tmp_path):
    encoder = build().vision_model
    encoder.save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    state.pop('embeddings.cls_token')
    save_file(state, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='embeddings.cls_token'):
        Owl2VisionModel.from_pretrained(tmp_path)


def test_generate_finds_the_indicators_itself():
    model, (ids, images) = build(), alone(0)
    for given in (torch.full_like(ids, 7), torch.zeros_like(ids)):
        with pytest.raises((ValueError, TypeError), match='modality_indicators'):
            model.generate(ids, None, images, modality_indicators=given, **GREEDY)


def test_a_model_used_for_inference_can_still_train():
    model, (ids, images) = build(), alone(0)
    expected = build()
    with torch.inference_mode():
        model(ids, None, images)
    for this in (model, expected):
        this(ids, None, images, labels=supervised(ids)).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), expected.parameters()))
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(half(ids, None, images).logits, build().to(torch.bfloat16)(ids, None, images).logits)
