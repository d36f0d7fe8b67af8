"Eagle's model: experts and fusions by configuration, batches, crops, features, checkpoints, pre-alignment, released weights, wrong input."

import copy
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from toys import TOWERS
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM

from mllm_replica.core.recipe import Recipe, Stage
from mllm_replica.data.encoded import Encoded
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.data.packing import collate
from mllm_replica.eagle.fusing.fusion import FUSIONS
from mllm_replica.eagle.golden import parity_cases
from mllm_replica.eagle.model import EagleConfig, EagleModel, EagleVisionConfig, EagleVisionModel
from mllm_replica.eagle.prompts import EagleProcessor
from mllm_replica.eagle.released import (
    RELEASED,
    convert_official,
    load_official,
    official_config,
    our_name,
    paper_config,
)
from mllm_replica.eagle.stages import EXPERTS, JOINT, PROJECTOR, alignment, alignment_stages
from mllm_replica.models import parity
from mllm_replica.models.official import OfficialWeightsError
from mllm_replica.models.vision import FeatureCache, encoder_key
from mllm_replica.models.configuration import visual_token_count
from mllm_replica.planning.plan import stage_cost
from mllm_replica.running.unit import encoder_is_frozen
from mllm_replica.training.loop import train
from mllm_replica.training.optimiser import freeze_all_but, trainable_names

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / 'golden/eagle'
KINDS = TOWERS | {
    'pix2struct': TOWERS['pix2struct'] | dict(options=dict(max_patches=27)),
    'dinov2': TOWERS['dinov2'] | dict(options=dict(own_statistics=True)),
}
CHANNELS = dict(clip=16, convnext=12, sam=16, eva=16, pix2struct=16, dinov2=16, efficientnet_lite=40)
TWO = ('clip', 'convnext')
TEXT = dict(
    vocab_size=96,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
ROWS = [[1, 10, None, 11, None, 12], [1, 20, None, 21, 22], [1, 30, 31, 32, 33]]  # None: an image
COUNTS = [2, 1, 0]
GREEDY = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
every_fusion = pytest.mark.parametrize('fusion', FUSIONS)


def config_of(fusion='channel', experts=TWO, text={}, tiles=1, grid=2, **connector):
    vision = dict(experts=[dict(name=kind) | KINDS[kind] for kind in experts], image_size=32)
    return EagleConfig(
        vision_config=vision,
        connector_config=dict(fusion=fusion, grid=grid) | connector,
        text_config=TEXT | text,
        tiles=tiles,
    )


def build(*args, **kwargs):
    "A small model without a weight at zero."
    torch.manual_seed(0)
    model = EagleModel(config_of(*args, **kwargs)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or 'rel_pos' in name or 'align_stages' in name or 'mining' in name:
            torch.nn.init.normal_(parameter, float('norm' in name and name.endswith('weight')), 0.3)
    return model


def pixels(number=3, *shape):
    return torch.randn(number, *shape, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def rows_of(model, rows=ROWS):
    image = [-1] * visual_token_count(model.config)
    return [[i for token in row for i in (image if token is None else [token])] for row in rows]


def padded(rows, side):
    width = max(map(len, rows))
    cut = {'left': 0, 'inside': 2}.get(side)

    def place(row, value):
        return row[:cut] + [value] * (width - len(row)) + (row[cut:] if cut is not None else [])

    return torch.tensor([place(row, 0) for row in rows]), torch.tensor([place([1] * len(row), 0) for row in rows])


def alone(model, row, images=None):
    "One sample: ids and its pixels."
    first, images = sum(COUNTS[:row]), pixels() if images is None else images
    return torch.tensor([rows_of(model)[row]]), (images[first : first + COUNTS[row]] if COUNTS[row] else None)


def supervised(ids, mask=None):
    return ids.masked_fill((ids < 2) if mask is None else (ids < 2) | (mask == 0), -100)


# experts and fusions by configuration


@pytest.mark.parametrize(
    'experts', [('clip',), ('dinov2', 'pix2struct'), ('sam', 'clip', 'eva'), tuple(KINDS)], ids='-'.join
)
@torch.no_grad()
def test_any_number_and_order_of_experts(experts):
    model = build(experts=experts)
    features = model.fusion(model.vision_model(pixels()))
    assert (
        features.shape == (3, 4, sum(CHANNELS[kind] for kind in experts))
        and model.mm_projector[0].in_features == features.shape[2]
    )
    parts = features.split([CHANNELS[kind] for kind in experts], -1)
    for kind, tower, part in zip(
        experts, model.vision_model.vision_towers, parts
    ):  # each expert's channels are those of the expert alone
        single = build(experts=(kind,))
        single.vision_model.vision_towers[0].load_state_dict(tower.state_dict())
        torch.testing.assert_close(single.fusion(single.vision_model(pixels())), part)


@every_fusion
@pytest.mark.parametrize('tiles', [1, 2])
@pytest.mark.parametrize('experts', [TWO, ('clip', 'sam', 'dinov2')], ids=len)
@torch.no_grad()
def test_the_configuration_knows_what_an_image_costs(fusion, tiles, experts):
    model = build(fusion, experts, tiles=tiles, grid=3)
    images = pixels(2, 5) if tiles == 2 else pixels(2)
    assert model.visual_embeds(images).flatten(0, 1).shape == (2 * visual_token_count(model.config), 24)
    assert model.fusion.num_tokens * model.config.crops == visual_token_count(model.config)


def test_two_experts_of_a_kind_and_an_expert_by_name():
    experts = [
        dict(name=name, kind='convnext', config=KINDS['convnext']['config'], image_size=32)
        for name in ('ocr', 'shapes')
    ]
    config = EagleVisionConfig(experts=[*experts, 'dinov2-448'], image_size=32)
    assert [e['kind'] for e in config.experts] == ['convnext', 'convnext', 'dinov2-448']
    with torch.device('meta'):
        shapes = EagleVisionModel(config).shapes
    assert [tuple(shape) for shape in shapes] == [('ocr', 12, 4), ('shapes', 12, 4), ('dinov2-448', 1024, 32)]


def test_the_default_is_the_released_mixture():
    assert EagleConfig().to_dict() and visual_token_count(EagleConfig()) == 1024
    assert [e['name'] for e in EagleConfig().vision_config.experts] == [
        'clip-448',
        'convnext-1024',
        'sam-1024',
        'det-1024',
        'pix2struct-1024',
    ]


# official numbers


def test_an_altered_number_of_the_whole_model_is_noticed():
    golden = parity.read_golden(GOLDEN / 'full_model.safetensors')
    for name in (
        'out.logits',
        'out.generated_ids',
        'grad.model.vision_tower.vision_towers.2.vision_tower.neck.conv1.weight',
    ):
        tensors = {**golden.tensors, name: golden.tensors[name].clone()}
        tensors[name].view(-1)[0] += 1
        problems = parity.check(golden._replace(tensors=tensors), parity_cases).problems
        assert len(problems) == 1 and problems[0].startswith(f'{name}: 1 of')


# batches, cache, beams


@every_fusion
@pytest.mark.parametrize('side', ['left', 'right', 'inside'])
def test_a_batch_gives_the_single_answers(fusion, side):
    model = build(fusion)
    ids, mask = padded(rows_of(model), side)
    logits, losses, counts = model(ids, mask, pixels()).logits, [], []
    for row in range(3):
        one, images = alone(model, row)
        out = model(one, None, images, labels=supervised(one), return_logits=True)
        torch.testing.assert_close(logits[row][mask[row].bool()], out.logits[0], rtol=1e-4, atol=5e-5)
        losses.append(out.loss)
        counts.append((supervised(one)[:, 1:] != -100).sum())
    if side == 'inside':
        return  # there the label of a token stands behind padding
    out = model(ids, mask, pixels(), labels=supervised(ids, mask), return_logits=False)
    assert out.logits is None
    torch.testing.assert_close(out.loss, sum(x * n for x, n in zip(losses, counts)) / sum(counts), rtol=1e-5, atol=1e-5)


@every_fusion
@torch.no_grad()
def test_answers_of_batches_with_several_images_and_none(fusion):
    model = build(fusion)
    single = [model.generate(*((one := alone(model, row))[0], None, one[1]), **GREEDY)[0, -5:] for row in range(3)]
    for side, beams in itertools.product(('left', 'right', 'inside'), (1, 3)):
        ids, mask = padded(rows_of(model), side)
        found = model.generate(ids, mask, pixels(), num_beams=beams, **GREEDY)[:, -5:]
        if beams == 1:
            assert torch.equal(found, torch.stack(single)), side
        assert torch.equal(
            found,
            model.generate(ids, mask, image_features=model.visual_features(pixels()), num_beams=beams, **GREEDY)[
                :, -5:
            ],
        )


@torch.no_grad()
def test_the_cache_changes_nothing():
    model = build()
    ids, images = alone(model, 0)
    expected, so_far = [], ids
    for _ in range(5):  # everything again for every token
        expected.append(model(so_far, None, images).logits[:, -1])
        so_far = torch.cat([so_far, expected[-1].argmax(-1, keepdim=True)], 1)
    out = model.generate(ids, None, images, output_logits=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, so_far)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected), rtol=1e-4, atol=5e-5)
    cache = model(
        ids[:, :7], None, images[:1], use_cache=True
    ).past_key_values  # a second image comes to a cache that holds one
    found = model(ids[:, 7:], None, images[1:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids, None, images).logits[:, 7:], rtol=1e-4, atol=5e-5)


@torch.no_grad()
def test_text_alone_is_the_plain_llama_and_asks_no_expert():
    model = build()
    own = LlamaForCausalLM(model.config.text_config).eval()
    own.load_state_dict(model.language_model.state_dict())
    for tower in model.vision_model.vision_towers:
        tower.register_forward_pre_hook(lambda *_: pytest.fail('an expert ran'))
    ids, mask = padded([ROWS[2], [1, *range(40, 50)]], 'left')
    expected = own(ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for images in (None, pixels(0), []):
        assert torch.equal(model(ids, mask, images).logits, expected)
    assert torch.equal(model(ids, mask, image_features=torch.zeros(0, 1, 5)).logits, expected)
    assert torch.equal(model.generate(ids, mask, pixels(0), **GREEDY), own.generate(ids, attention_mask=mask, **GREEDY))


@torch.no_grad()
def test_keywords_reach_the_decoder():
    model = build()
    model.language_model.set_attn_implementation('eager')
    ids, images = alone(model, 0)
    out = model(ids, None, images, output_attentions=True, output_hidden_states=True, logits_to_keep=2)
    assert len(out.attentions) == 2 and len(out.hidden_states) == 3 and out.logits.shape[1] == 2
    with pytest.raises((TypeError, ValueError)):
        model.generate(ids, None, images, colour='red', **GREEDY)


def test_packed_rows_are_single_samples():
    model = build(text=dict(vocab_size=260))
    processor = EagleProcessor.from_config(model.config, byte_tokenizer(), template='words')
    image = Image.effect_noise((40, 30), 90).convert('RGB')
    samples = [
        processor.encode(
            dict(
                id=str(n),
                images=[image] * n,
                conversations=[{'from': 'human', 'value': '<image>' * n + 'what ?'}, {'from': 'gpt', 'value': 'red'}],
            )
        )
        for n in (1, 0, 2)
    ]
    losses = []
    for packed in (True, False):
        batch = collate(samples, 0, packed=packed, image_tensor=processor.image_tensor)
        batch.pop('ids')
        losses.append(model(**batch).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


# crops and features


@every_fusion
@torch.no_grad()
def test_crops_are_pictures_one_after_the_other(fusion):
    model, crops = build(fusion), pixels(2, 3)
    row = torch.tensor(
        [[1, *[-1] * 3 * visual_token_count(model.config), 5, *[-1] * 3 * visual_token_count(model.config), 6]]
    )
    expected = model(row, None, crops.flatten(0, 1)).logits  # six images
    for given in (crops, list(crops)):
        assert torch.equal(model(row, None, given).logits, expected)
    torch.testing.assert_close(model(row, None, image_features=model.visual_features(crops)).logits, expected)
    uneven = [crops[0, :1], crops[1]]
    short = torch.tensor(
        [[1, *[-1] * visual_token_count(model.config), 5, *[-1] * 3 * visual_token_count(model.config), 6]]
    )
    assert torch.equal(model(short, None, uneven).logits, model(short, None, torch.cat(uneven)).logits)
    assert torch.equal(model.generate(row, None, crops, **GREEDY), model.generate(row, None, list(crops), **GREEDY))


@torch.no_grad()
def test_an_image_in_tiles():
    model = build(tiles=2, text=dict(vocab_size=260))
    processor = EagleProcessor.from_config(model.config, byte_tokenizer(), template='words')
    image = Image.new('RGB', (64, 64), 'white')
    image.paste('black', (0, 0, 32, 32))
    values = processor.image_tensor([image, image.rotate(90)])
    assert values.shape == (2, 5, 3, 32, 32)
    brightness = values.mean((2, 3, 4)) > 1
    assert brightness.tolist() == [
        [True, False, True, True, True],
        [True, True, True, False, True],
    ]  # the whole, then row by row
    sample = processor.encode(
        dict(
            id='s', images=[image], conversations=[{'from': 'human', 'value': 'what ?'}, {'from': 'gpt', 'value': 'x'}]
        )
    )
    assert sample.image_spans[0][1] - sample.image_spans[0][0] == 5 * 4
    batch = collate([sample], 0, image_tensor=processor.image_tensor)
    batch.pop('ids')
    assert model(**batch).loss.isfinite()


@every_fusion
@torch.no_grad()
def test_cached_features_are_those_of_the_pixels(fusion, tmp_path):
    model = build(fusion)
    processor = EagleProcessor.from_config(model.config, byte_tokenizer())
    images = {str(i): Image.effect_noise((32, 32), 20 + 40 * i).convert('RGB') for i in range(3)}
    key = encoder_key(model.vision_model, layer=model.config.feature_layer)
    cache = FeatureCache.compute(
        tmp_path,
        key,
        sorted(images),
        lambda names: [images[name] for name in names],
        lambda batch: model.visual_features(processor.image_tensor(batch)),
        batch_size=2,
    )
    torch.testing.assert_close(
        model.visual_embeds(None, cache[['2', '0']]),
        model.visual_embeds(processor.image_tensor([images['2'], images['0']])),
    )
    assert encoder_key(build(fusion, ('clip', 'sam')).vision_model, layer=-2) != key


@every_fusion
def test_features_are_cached_only_where_no_weight_before_them_learns(fusion):
    stage = Stage(
        name='tune',
        trainable=('mm_projector|fusion', 'language_model'),
        mixture={'a': 1},
        steps=1,
        batch_size=1,
        lr=1e-3,
    )
    recipe = Recipe(
        paper='eagle',
        table='4',
        row='r',
        scale='tiny',
        seed=0,
        model={},
        stages=(stage,),
        benchmarks=(),
        sources={'a': dict(kind='world', name='tiles')},
    )
    assert encoder_is_frozen(build(fusion), recipe) == (
        fusion != 'llava_hr'
    )  # its adapters sit between the layers of CLIP
    every = recipe.model_copy(update=dict(stages=(stage.model_copy(update=dict(trainable=('.*',))),)))
    assert not encoder_is_frozen(build(fusion), every)


def test_each_picture_is_resized_once_per_size(monkeypatch):
    made, plain = [], F.interpolate
    model = build(
        experts=('clip', 'dinov2', 'convnext', 'sam'), grid=4
    )  # 24, 24, 32 and 32 pixels; only maps of 6 cells are brought to the grid
    monkeypatch.setattr(
        F, 'interpolate', lambda x, size, **kwargs: made.append((x.shape[1], tuple(size))) or plain(x, size, **kwargs)
    )
    model.visual_embeds(pixels())
    assert [size for channels, size in made if channels == 3] == [(24, 24)]


# training


@every_fusion
def test_every_weight_learns(fusion):
    model = build(fusion, ('clip', 'convnext')).train()
    ids, mask = padded(rows_of(model), 'right')
    model(ids, mask, pixels(), labels=supervised(ids, mask)).loss.backward()
    unread = r'class_embedding|post_layernorm|position_embedding\.weight$'
    silent = [
        name
        for name, p in model.named_parameters()
        if (p.grad is None or not p.grad.any()) and not re.search(unread, name)
    ]
    assert all(name.endswith('.k_proj.bias') for name in silent), silent
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_fusion
def test_half_precision(fusion):
    model = build(fusion)
    ids, mask = padded(rows_of(model), 'left')
    expected, loss = (
        model(ids, mask, pixels()).logits[mask.bool()],
        model(ids, mask, pixels(), labels=supervised(ids, mask)).loss,
    )
    with torch.autocast('cpu', torch.bfloat16):
        mixed = model(ids, mask, pixels(), labels=supervised(ids, mask)).loss
    mixed.backward()
    torch.testing.assert_close(mixed, loss, rtol=0.05, atol=0.05)
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        features = model.visual_features(pixels())  # in float32, as a cache keeps them
        for given in (dict(pixel_values=pixels()), dict(image_features=features)):
            found = half(ids, mask, **given).logits[mask.bool()]
            assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.15 * expected.abs().max()


def test_gradient_checkpointing_changes_nothing():
    model, found = build(experts=('clip', 'convnext', 'sam', 'eva')).train(), []
    ids, mask = padded(rows_of(model), 'right')
    for used in (False, True):
        if used:
            model.gradient_checkpointing_enable({'use_reentrant': False})
        model.zero_grad()
        model(ids, mask, pixels(), labels=supervised(ids, mask)).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    layers = [m for m in model.modules() if getattr(m, 'gradient_checkpointing', False)]
    assert len(layers) > 2 + 4 + 3 + 2 + 3
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_used_for_inference_can_still_train():
    model, fresh = build(experts=('eva', 'sam', 'convnext')), build(experts=('eva', 'sam', 'convnext'))
    ids, images = alone(model, 0)
    with torch.inference_mode():
        model(ids, None, images)  # the tables are made here
    for this in (model, fresh):
        this(ids, None, images, labels=supervised(ids)).loss.backward()
    for a, b in zip(model.parameters(), fresh.parameters()):
        assert a.grad is None and b.grad is None or torch.equal(a.grad, b.grad)


# pre-alignment

SHOWN = dict(mixture={'qa': 1.0}, steps=3, batch_size=2, lr=1e-2)


def questions(model, count=6):
    "Encoded samples with an image each."
    made, images = [], pixels(count)
    for i in range(count):
        ids = [1, *[-1] * visual_token_count(model.config), 5 + i, 20, 30 + i]
        made.append(
            Encoded(
                id=str(i),
                input_ids=ids,
                labels=[-100] * (len(ids) - 2) + ids[-2:],
                images=[images[i]],
                image_ids=[str(i)],
                image_spans=[(1, len(ids) - 3)],
            )
        )
    return {'qa': made}


def trained_on(model, stages, folder):
    return train(model, stages, questions(model), lambda samples: collate(samples, 0), folder, seed=0)


def moved(before, model):
    return {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}


@pytest.mark.parametrize('fusion', [name for name in FUSIONS if name != 'sequence'])
def test_stages_train_what_they_name(fusion, tmp_path):
    model = build(fusion, ('clip', 'convnext', 'sam'), aligned=['convnext', 'sam'])
    parts = {
        'convnext': r'^vision_model\.vision_towers\.1\.|^aligners\.convnext\.',
        'sam': r'^vision_model\.vision_towers\.2\.|^aligners\.sam\.',
        'project': PROJECTOR,
        'tune': r'^(?!aligners)',
    }
    stages = dict(
        zip(
            parts,
            (
                *alignment_stages(model.config, **SHOWN),
                *(Stage(name=n, trainable=JOINT[n], **SHOWN) for n in ('project', 'tune')),
            ),
        )
    )
    for name, stage in stages.items():
        before, ran = copy.deepcopy(model.state_dict()), set()
        hooks = [
            tower.register_forward_hook(lambda *_, k=k: ran.add(k))
            for k, tower in enumerate(model.vision_model.vision_towers)
        ]
        history = trained_on(model, [stage], tmp_path / name)
        for hook in hooks:
            hook.remove()
        assert history.steps == 3 and not model.training and model.aligning() is None
        assert ran == ({1} if name == 'convnext' else {2} if name == 'sam' else {0, 1, 2})
        named = {n for n, p in model.named_parameters() if re.search(parts[name], n)}
        assert moved(before, model) <= named and len(moved(before, model)) > 0.7 * len(
            named
        )  # the rest is never read, such as a class embedding


def test_alignment_is_the_training_of_a_model_with_one_expert(tmp_path):
    model = build(experts=('clip', 'convnext', 'sam'), aligned=['convnext', 'clip'])
    for k, name in ((1, 'convnext'), (0, 'clip')):
        single = build(experts=(name,))
        single.vision_model.vision_towers[0].load_state_dict(model.vision_model.vision_towers[k].state_dict())
        single.mm_projector.load_state_dict(model.aligners[name].state_dict())
        single.language_model.load_state_dict(model.language_model.state_dict())
        alone = trained_on(
            single, [Stage(name='alone', trainable=(EXPERTS, PROJECTOR), **SHOWN)], tmp_path / f'{name} alone'
        )
        together = trained_on(model, alignment_stages(model.config, [name], **SHOWN), tmp_path / name)
        assert alone.losses == together.losses and len(set(alone.losses)) == 3
        for a, b in (
            (single.vision_model.vision_towers[0], model.vision_model.vision_towers[k]),
            (single.mm_projector, model.aligners[name]),
        ):
            assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_a_killed_alignment_goes_on_where_it_was(tmp_path):
    def fresh():
        return build(experts=('clip', 'convnext'), aligned=['clip', 'convnext'])

    whole, broken = fresh(), fresh()
    settings = SHOWN | dict(checkpoint_every=1)
    stages = [*alignment_stages(whole.config, **settings), Stage(name='tune', trainable=JOINT['tune'], **settings)]
    expected = trained_on(whole, stages, tmp_path / 'whole')

    class Killed(Exception):
        pass

    def kill(step, *_):
        if step == 5:
            raise Killed  # in the second alignment

    with pytest.raises(Killed):
        train(
            broken,
            stages,
            questions(broken),
            lambda samples: collate(samples, 0),
            tmp_path / 'broken',
            seed=0,
            progress=kill,
        )
    again = fresh()
    found = trained_on(again, stages, tmp_path / 'broken')
    assert found.losses == expected.losses and all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values())
    )


def test_who_is_aligned():
    model = build(aligned=['clip', 'convnext'])
    ids, images = alone(model, 0)
    joint = model(ids, None, images).logits
    freeze_all_but(model, trainable_names(model, alignment(model.config, 'convnext')))
    assert model.aligning() == 'convnext' and not torch.allclose(model(ids, None, images).logits, joint)
    with pytest.raises(ValueError, match="expert 'convnext' is being aligned"):
        model(ids, None, image_features=model.visual_features(images))
    assert torch.equal(model.eval()(ids, None, images).logits, joint) and model.aligning() is None
    freeze_all_but(model, trainable_names(model, ['^aligners']))
    with pytest.raises(ValueError, match='clip, convnext learn at once; align one expert per stage'):
        model(ids, None, images)
    freeze_all_but(model, trainable_names(model, ['.*']))
    assert model.aligning() is None and build().train().aligning() is None
    with pytest.raises(ValueError, match="'sam' has no projector of its own; the configuration aligns clip, convnext"):
        alignment(model.config, 'sam')
    with pytest.raises(ValueError, match='the configuration aligns none'):
        alignment(config_of(), 'clip')


def test_what_the_stages_cost():
    config = config_of(experts=('clip', 'convnext', 'sam'), aligned=['convnext'])
    stages = [
        *alignment_stages(config, **SHOWN),
        *(Stage(name=name, trainable=JOINT[name], **SHOWN) for name in ('project', 'tune')),
    ]
    align, project, tune = (stage_cost(lambda: EagleModel(config), stage, 20, 1) for stage in stages)
    assert align[0].forward < project[0].forward == tune[0].forward and project[0].backward < tune[0].backward
    with torch.device('meta'):
        model = EagleModel(config)

    def count(part):
        return sum(p.numel() for p in part.parameters())

    assert align[2] == count(model.vision_model.vision_towers[1]) + count(model.aligners)
    assert project[2] == count(model.mm_projector) and tune[2] == count(model) - count(model.aligners)


@pytest.mark.slow
def test_what_the_stages_of_the_paper_cost():
    config, given = paper_config(aligned=['sam-1024']), SHOWN | dict(precision='bf16')
    stages = (*alignment_stages(config, **given), Stage(name='project', trainable=JOINT['project'], **given))
    found = [stage_cost(lambda: EagleModel(config), stage, 1300, 1) for stage in stages]
    assert [round(trained / 1e6, 1) for _, _, trained in found] == [328.7, 48.2]
    assert found[0][0].forward < 0.7 * found[1][0].forward


# checkpoints of our own


@every_fusion
@torch.no_grad()
def test_saved_and_loaded(fusion, tmp_path):
    model = build(fusion, tuple(KINDS), aligned=[] if fusion == 'sequence' else ['sam'])
    ids, images = alone(model, 0)
    model.save_pretrained(tmp_path)
    for loaded in (EagleModel.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is EagleModel and loaded.config.connector_config == model.config.connector_config
        assert loaded.config.vision_config.experts == model.config.vision_config.experts
        assert list(loaded.state_dict()) == list(model.state_dict())
        assert torch.equal(loaded(ids, None, images).logits, model(ids, None, images).logits)
        assert loaded.train().aligning() is None  # everything may learn, so all experts work together
    ours, file = (set(names) for names in (model.state_dict(), load_file(tmp_path / 'model.safetensors')))
    assert all(
        'vision_towers.5.' in name for name in ours ^ file
    )  # transformers writes DINOv2 under its older names, and reads both
    model.vision_model.save_pretrained(tmp_path / 'experts')
    if fusion != 'llava_hr':
        experts = AutoModel.from_pretrained(tmp_path / 'experts')
        for a, b in zip(experts(images), model.vision_model(images)):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    'part',
    [
        'vision_model.vision_towers.1.vision_tower.stem.0.weight',
        'mm_projector.2.bias',
        'language_model.model.norm.weight',
    ],
)
def test_a_checkpoint_without_a_weight_is_refused(part, tmp_path):
    build().save_pretrained(tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    save_file({name: w for name, w in state.items() if name != part}, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(
        ValueError, match=f'lacks 1 weights.*{re.escape(part)}' if 'mm_projector' not in part else 'lacks 1 weights'
    ):
        EagleModel.from_pretrained(tmp_path)


@pytest.mark.parametrize('experts', [('convnext', 'clip'), ('clip', 'convnext', 'sam'), ('clip',)], ids='-'.join)
def test_a_checkpoint_of_our_own_with_other_experts(experts, tmp_path):
    build().save_pretrained(tmp_path)
    config_of(experts=experts).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match='lacks|mismatch|size'):
        EagleModel.from_pretrained(tmp_path)


def test_processor_and_tied_embeddings_survive(tmp_path):
    model = build(text=dict(tie_word_embeddings=True), tiles=2)
    model.save_pretrained(tmp_path)
    EagleProcessor.from_config(model.config, byte_tokenizer(), template='words').save_pretrained(tmp_path)
    loaded, processor = EagleModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert loaded.language_model.lm_head.weight is loaded.get_input_embeddings().weight
    assert (processor.image_processor.tiles, processor.visual_tokens, processor.image_processor.side) == (2, 20, 32)


# rows of the released code


@pytest.mark.parametrize('side', ['left', 'right'])
@torch.no_grad()
def test_rows_with_one_placeholder_per_image(side):
    model = build()
    ids, mask = padded([[-200 if token is None else token for token in row] for row in ROWS], 'right')
    owned = torch.cat([pixels(), pixels(1)])  # the last sample owns an image, too
    given = model.official_inputs(ids, owned, mask, supervised(ids, mask), padding_side=side)
    out = model(**given, return_logits=True)
    for row in range(3):
        one, images = alone(model, row)
        torch.testing.assert_close(
            out.logits[row][given['attention_mask'][row].bool()],
            model(one, None, images).logits[0],
            rtol=1e-4,
            atol=5e-5,
        )
    cut = model.official_inputs(ids, pixels(), mask, supervised(ids, mask), max_length=5)
    whole = model.official_inputs(ids, pixels(), mask, supervised(ids, mask))
    assert cut['inputs_embeds'].shape == (3, 5, 24) and torch.equal(cut['inputs_embeds'], whole['inputs_embeds'][:, :5])


# released checkpoints

TOWERS = {
    'clip-448': KINDS['clip'] | dict(image_size=16),
    'convnext-1024': dict(config=dict(depths=[1, 1, 1, 1], dims=[4, 6, 8, 12]), image_size=32),
    'sam-1024': KINDS['sam'] | dict(image_size=32),
    'det-1024': KINDS['eva'],
    'pix2struct-1024': KINDS['pix2struct'],
}
X4, X5 = ('clip-448', 'convnext-1024', 'det-1024', 'pix2struct-1024'), tuple(TOWERS)
SMALL = dict(image_size=32, grid=4)


def official_settings(names=X5, **changes):
    "The content of a released config.json, its small language model apart."
    return (
        dict(
            model_type='eagle_llama',
            architectures=['EagleLlamaForCausalLM'],
            mm_vision_tower=';'.join(names),
            mm_projector_type='mlp2x_gelu',
            mm_hidden_size=0,
            mm_vision_select_layer=-2,
            mm_vision_select_feature='patch',
            mm_patch_merge_type='flat',
            image_aspect_ratio='pad',
            mm_use_im_start_end=False,
            mm_use_im_patch_token=False,
            use_mm_proj=True,
            tokenizer_padding_side='right',
            tokenizer_model_max_length=2048,
            rope_scaling=None,
            hidden_act='silu',
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            attention_bias=False,
        )
        | TEXT
        | changes
    )


def official_model(names=X5):
    torch.manual_seed(0)
    return EagleModel(official_config(official_settings(names), {name: TOWERS[name] for name in names}, **SMALL)).eval()


def official_state(model):
    "Its weights under the released names, with what released files hold besides."
    names = (
        (r'^vision_model\.', 'model.vision_tower.'),
        (r'^mm_projector', 'model.mm_projector'),
        (r'^language_model\.', ''),
    )
    state = {}
    for name, weight in model.state_dict().items():
        for pattern, official in names:
            name = re.sub(pattern, official, name)
        state[name] = weight
    for k, tower in enumerate(model.vision_model.vision_towers):
        prefix = f'model.vision_tower.vision_towers.{k}.vision_tower.'
        if type(tower).__name__ == 'ConvNextExpert':
            state |= {
                f'{prefix}head.norm.weight': torch.ones(12),
                f'{prefix}head.fc.weight': torch.zeros(1000, 12),
                f'{prefix}head.fc.bias': torch.zeros(1000),
            }
        if type(tower).__name__ == 'ClipExpert':
            state[f'{prefix}vision_model.embeddings.position_ids'] = torch.arange(17)[None]
        if type(tower).__name__ == 'EvaExpert':
            for side, where in ((3, 'rope_win'), (8, 'rope_glb'), (3, 'blocks.0.attn.rope'), (8, 'blocks.2.attn.rope')):
                position = torch.arange(side).float() / side * 16
                angle = (position[:, None] * 10000 ** (-torch.arange(0, 4, 2).float() / 4)).repeat_interleave(
                    2, 1
                )  # [side,d/2]
                grid = torch.cat(
                    [angle[:, None].expand(side, side, -1), angle[None].expand(side, side, -1)], -1
                ).flatten(0, 1)
                state |= {f'{prefix}{where}.freqs_cos': grid.cos(), f'{prefix}{where}.freqs_sin': grid.sin()}
    return state


def write(folder, names=X5, shards=False, settings={}, **changes):
    "A released folder; a change to None takes a key away."
    state = {name: w for name, w in (official_state(official_model(names)) | changes).items() if w is not None}
    (folder / 'config.json').write_text(json.dumps(official_settings(names, **settings)))
    if not shards:
        return save_file({name: w.contiguous() for name, w in state.items()}, folder / 'model.safetensors')
    index = {name: f'pytorch_model-{i % 3 + 1}-of-3.bin' for i, name in enumerate(sorted(state))}
    for file in set(index.values()):
        torch.save({name: w for name, w in state.items() if index[name] == file}, folder / file)
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': index}))


@pytest.mark.parametrize('names, shards', [(X4, False), (X5, False), (X5, True)], ids=['X4', 'X5', 'X5 in .bin shards'])
@torch.no_grad()
def test_a_released_folder(names, shards, tmp_path):
    write(tmp_path, names, shards)
    model, given = official_model(names), dict(experts={name: TOWERS[name] for name in names}, **SMALL)
    loaded = load_official(tmp_path, **given)
    ids, images = alone(model, 0)
    assert all(torch.equal(w, loaded.state_dict()[name]) for name, w in model.state_dict().items())
    assert torch.equal(loaded(ids, None, images).logits, model(ids, None, images).logits)
    assert (
        loaded.config.text_config.rope_parameters['rope_theta'] == 5e5
        and loaded.config.vision_config.experts[0]['name'] == 'clip-448'
    )
    assert load_official(tmp_path, torch.bfloat16, **given)(ids, None, images).logits.dtype == torch.bfloat16


def test_everything_that_does_not_fit_is_reported(tmp_path):
    key = 'model.vision_tower.vision_towers.2.vision_tower.layers.1.attn.qkv.bias'
    write(
        tmp_path,
        **{key: None, 'lm_head.weight': torch.zeros(95, 24), 'model.layers.1.self_attn.q_proj.bias': torch.zeros(24)},
    )
    with pytest.raises(OfficialWeightsError, match='3 keys do not fit, nothing was loaded') as found:
        load_official(tmp_path, experts=TOWERS, **SMALL)
    for line in (
        'missing     vision_model.vision_towers.2.vision_tower.layers.1.attn.qkv.bias [48]',
        'unexpected  language_model.model.layers.1.self_attn.q_proj.bias [24]',
        'wrong shape language_model.lm_head.weight: found [95, 24], expected [96, 24]',
    ):
        assert line in str(found.value)


@pytest.mark.parametrize(
    'found, message',
    [
        (
            X5[:2] + X5[3:],
            r'holds the experts clip, convnext, det, pix2struct; expected clip, convnext, sam, det, pix2struct \(sam missing\)',
        ),
        (
            (X5[0], X5[2], X5[1], *X5[3:]),
            r'clip, sam, convnext, det, pix2struct; expected clip, convnext, sam, det, pix2struct \(another order',
        ),
    ],
    ids=['missing', 'order'],
)
def test_a_checkpoint_with_other_experts(found, message, tmp_path):
    write(tmp_path, found)
    (tmp_path / 'config.json').write_text(json.dumps(official_settings()))
    with pytest.raises(ValueError, match=message):
        load_official(tmp_path, experts=TOWERS, **SMALL)


def test_other_rotations_are_refused(tmp_path):
    name = 'model.vision_tower.vision_towers.3.vision_tower.rope_glb.freqs_cos'
    table = official_state(official_model())[name]
    for wrong in (table + 0.1, table[:-1].clone()):
        write(tmp_path, **{name: wrong})
        with pytest.raises(ValueError, match=f'{re.escape(name)}.* is not our rotation'):
            load_official(tmp_path, experts=TOWERS, **SMALL)


def test_settings_of_a_checkpoint_that_do_not_fit():
    good = official_settings()
    for name in ('mm_vision_tower', 'hidden_size'):
        with pytest.raises(ValueError, match=rf"config.json lacks \['{name}'\]"):
            official_config({k: v for k, v in good.items() if k != name})
    for change in (
        dict(mm_use_im_start_end=True),
        dict(mm_patch_merge_type='spatial'),
        dict(rope_scaling={'type': 'linear', 'factor': 2.0}),
    ):
        with pytest.raises(NotImplementedError, match=next(iter(change))):
            official_config(good | change)
    with pytest.raises(ValueError, match='towers dinov2-448 are unknown'):
        official_config(good | dict(mm_vision_tower='clip-448;dinov2-448'))
    with pytest.raises(ValueError, match='settings of vit; the checkpoint has clip-448'):
        official_config(good, {'vit': {}})
    with pytest.raises(ValueError, match="projector 'mlp' is unknown"), torch.device('meta'):
        EagleModel(official_config(good | dict(mm_projector_type='mlp')))


def published_keys(name):
    "Names and shapes of a released file, from the recorded patterns."
    mixture, width, inner, layers, key_width, words = {
        'Eagle-X4-7B': (X4, 4096, 11008, 32, 4096, 32000),
        'Eagle-X5-7B': (X5, 4096, 11008, 32, 4096, 32000),
        'Eagle-X4-13B': (X4, 5120, 13824, 40, 5120, 32000),
        'Eagle-X5-13B': (X5, 5120, 13824, 40, 5120, 32000),
        'Eagle-X5-13B-Chat': (X5, 5120, 13824, 40, 5120, 32000),
        'Eagle-X4-8B-Plus': (X4, 4096, 14336, 32, 1024, 128256),
        'Eagle-X4-13B-Plus': (X4, 5120, 13824, 40, 5120, 32000),
        'Eagle-X5-34B-Plus': (X5, 7168, 20480, 60, 1024, 64000),
    }[name]
    found = {
        'model.embed_tokens.weight': (words, width),
        'lm_head.weight': (words, width),
        'model.norm.weight': (width,),
    }
    for n in range(layers):
        layer = dict(input_layernorm=(width,), post_attention_layernorm=(width,)) | {
            f'self_attn.{p}_proj': (width, width) for p in 'qo'
        }
        layer |= {f'self_attn.{p}_proj': (key_width, width) for p in 'kv'} | {
            f'mlp.{p}_proj': (inner, width) for p in ('gate', 'up')
        }
        found |= {
            f'model.layers.{n}.{part}.weight': shape
            for part, shape in (layer | {'mlp.down_proj': (width, inner)}).items()
        }
    channels = dict(zip(X5, (1024, 3072, 1024, 1024, 1536)))
    projector = {
        '0.weight': (width, sum(channels[e] for e in mixture)),
        '0.bias': (width,),
        '2.weight': (width, width),
        '2.bias': (width,),
    }
    found |= {f'model.mm_projector.{part}': shape for part, shape in projector.items()}

    def both(name, weight, bias=None):
        return {f'{name}.weight': weight, f'{name}.bias': bias or weight[:1]}

    def norm(name, size):
        return both(name, (size,))

    towers = {e: {} for e in X5}
    clip = towers['clip-448']
    clip |= {
        'embeddings.class_embedding': (1024,),
        'embeddings.patch_embedding.weight': (1024, 3, 14, 14),
        'embeddings.position_embedding.weight': (577, 1024),
    }
    clip |= norm('pre_layrnorm', 1024) | norm('post_layernorm', 1024)
    for n in range(24):
        at = f'encoder.layers.{n}.'
        for part in 'qkv':
            clip |= both(f'{at}self_attn.{part}_proj', (1024, 1024))
        clip |= (
            both(f'{at}self_attn.out_proj', (1024, 1024))
            | both(f'{at}mlp.fc1', (4096, 1024))
            | both(f'{at}mlp.fc2', (1024, 4096))
        )
        clip |= norm(f'{at}layer_norm1', 1024) | norm(f'{at}layer_norm2', 1024)
    towers['clip-448'] = {f'vision_model.{name}': shape for name, shape in clip.items()}
    cnx, dims = towers['convnext-1024'], (384, 768, 1536, 3072)
    cnx |= (
        both('stem.0', (384, 3, 4, 4)) | norm('stem.1', 384) | norm('head.norm', 3072) | both('head.fc', (1000, 3072))
    )
    for i, (depth, c) in enumerate(zip((3, 4, 30, 3), dims)):
        if i:
            cnx |= norm(f'stages.{i}.downsample.0', dims[i - 1]) | both(
                f'stages.{i}.downsample.1', (c, dims[i - 1], 2, 2)
            )
        for j in range(depth):
            at = f'stages.{i}.blocks.{j}.'
            cnx |= {f'{at}weight': (c,)} | both(f'{at}conv_dw', (c, 1, 7, 7)) | norm(f'{at}norm', c)
            cnx |= both(f'{at}mlp.fc1', (4 * c, c)) | both(f'{at}mlp.fc2', (c, 4 * c))
    sam = towers['sam-1024']
    sam |= {'pos_embed': (1, 64, 64, 1024), 'neck.conv1.weight': (256, 1024, 1, 1)}
    sam |= both('patch_embed.projection', (1024, 3, 16, 16)) | norm('neck.layer_norm1', 256)
    for n in range(24):
        at, rows = f'layers.{n}.', 127 if n in (5, 11, 17, 23) else 27
        sam |= norm(f'{at}layer_norm1', 1024) | norm(f'{at}layer_norm2', 1024)
        sam |= both(f'{at}attn.qkv', (3072, 1024)) | both(f'{at}attn.proj', (1024, 1024))
        sam |= (
            both(f'{at}mlp.lin1', (4096, 1024))
            | both(f'{at}mlp.lin2', (1024, 4096))
            | {f'{at}attn.rel_pos_{axis}': (rows, 64) for axis in 'hw'}
        )
    eva = towers['det-1024']
    eva |= {'pos_embed': (1, 197, 1024)} | both('patch_embed.proj', (1024, 3, 16, 16))
    for n in range(24):
        at = f'blocks.{n}.'
        eva |= norm(f'{at}norm1', 1024) | norm(f'{at}norm2', 1024) | both(f'{at}attn.proj', (1024, 1024))
        eva |= {f'{at}attn.{p}_bias': (1024,) for p in 'qv'}
        eva |= (
            {f'{at}attn.{p}_proj.weight': (1024, 1024) for p in 'qkv'}
            | both(f'{at}mlp.w1', (2730, 1024))
            | both(f'{at}mlp.w2', (2730, 1024))
        )
        eva |= both(f'{at}mlp.w3', (1024, 2730)) | norm(f'{at}mlp.ffn_ln', 2730)
    p2s = towers['pix2struct-1024']
    p2s |= both('embeddings.patch_projection', (1536, 768)) | {
        f'embeddings.{axis}_embedder.weight': (4096, 1536) for axis in ('row', 'column')
    }
    p2s |= {'layernorm.weight': (1536,)}
    for n in range(18):
        at = f'encoder.layer.{n}.'
        p2s |= {f'{at}attention.{part}.weight': (1536, 1536) for part in ('query', 'key', 'value', 'output')} | {
            f'{at}mlp.wo.weight': (1536, 3968)
        }
        p2s |= {f'{at}mlp.wi_{i}.weight': (3968, 1536) for i in (0, 1)}
        p2s |= {f'{at}pre_{part}_layer_norm.weight': (1536,) for part in ('attention', 'mlp')}
    for k, e in enumerate(mixture):
        found |= {
            f'model.vision_tower.vision_towers.{k}.vision_tower.{part}': shape for part, shape in towers[e].items()
        }
    return found


@pytest.mark.parametrize('name', RELEASED)
def test_released_key_lists_of_full_size(name):
    keys = published_keys(name)
    with torch.device('meta'):
        model = EagleModel(paper_config(name))
        state = {key: torch.empty(shape) for key, shape in keys.items()}
    ours = convert_official(state, model)
    assert len(ours) == len(model.state_dict()) == len(keys) - 4  # ConvNeXt's classifier: two norms, two maps
    assert visual_token_count(model.config) == 1024 and our_name('lm_head.weight') == 'language_model.lm_head.weight'
    scale = 'vision_towers.1.vision_tower.stages.2.blocks.29.weight'
    state.pop(f'model.vision_tower.{scale}')
    with pytest.raises(OfficialWeightsError, match=f'1 keys do not fit.*\nmissing     vision_model.{scale}'):
        convert_official(state, model)


def test_variants_of_the_paper():
    for name, theta in (('Eagle-X5-7B', 1e4), ('Eagle-X4-8B-Plus', 5e5), ('Eagle-X5-34B-Plus', 5e6)):
        assert paper_config(name).text_config.rope_parameters['rope_theta'] == theta
    assert paper_config(sizes={'clip-448': 448}).vision_config.experts[0]['image_size'] == 448
    with torch.device('meta'):
        for fusion in FUSIONS:
            EagleModel(paper_config(experts=['clip-448', 'convnext-1024', 'sam-1024'], fusion=fusion))
        single = EagleModel(paper_config(experts=['clip-448'], image_size=448, sizes={'clip-448': 448}))
        assert single.visual_embeds(torch.empty(1, 3, 448, 448)).shape == (1, 1024, 4096)
    for given, message in ((dict(name='X9'), "'X9' is unknown"), (dict(sizes={'vit': 3}), 'sizes of vit')):
        with pytest.raises(ValueError, match=message):
            paper_config(**given)


# wrong input


@every_fusion
def test_images_must_fit_placeholders(fusion):
    model = build(fusion)
    ids, tokens = torch.tensor([rows_of(model)[0], [5] * len(rows_of(model)[0])]), visual_token_count(model.config)
    nothing = 'sample 0 has image positions but neither'
    for given, message in (
        (dict(), nothing),
        (dict(pixel_values=pixels(0)), nothing),
        (dict(pixel_values=[]), nothing),
        (dict(pixel_values=pixels(1)), f'sample 0: {2 * tokens} image positions; the images left for it have {tokens}'),
        (dict(pixel_values=pixels(3)), 'sample 1: 0 image positions; 1 of 3 images are left over'),
        (dict(pixel_values=pixels(2, 2)), '1 of 2 images are left over'),
        (
            dict(pixel_values=[pixels(1), pixels(2)]),
            f'sample 0: {2 * tokens} .* the images left for it have {3 * tokens}',
        ),
        (dict(image_features=torch.zeros(2, 1, 7)), r'image_features \[2, 1, 7\]; expected \[images, crops'),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **given)
        with pytest.raises(ValueError, match=message):
            model.generate(ids, **given, **GREEDY)


def test_crops_and_placeholders_of_released_rows():
    model, ids = build(), torch.tensor([[1, -200, 5], [1, -200, -200]])
    for images in (pixels(2), pixels(4), pixels(2, 3), [pixels(2)]):
        with pytest.raises(ValueError, match=r'images \(crops of one picture count as one image\) for 3 placeholders'):
            model.official_inputs(ids, images)


@pytest.mark.parametrize(
    'shape, message',
    [
        ((2, 3, 32, 24), r'expected \[B, 3, 32, 32\]'),
        ((2, 1, 32, 32), r'expected \[B, 3, 32, 32\]'),
        ((2, 3, 64, 64), r'expected \[B, 3, 32, 32\]'),
        ((3, 32, 32), r'pixel_values \[3, 32, 32\]'),
    ],
)
def test_pictures_of_another_shape(shape, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([rows_of(model)[0]]), None, torch.zeros(shape))


def test_a_map_that_does_not_reach_the_grid():
    model = build()
    model.vision_model.vision_towers[1].register_forward_hook(lambda _, __, out: out[..., :3])
    with pytest.raises(
        ValueError, match="'convnext': its map 3 x 12 x 4 x 3 is not square and does not reach the grid of 2 x 2"
    ):
        model.visual_embeds(pixels())


def test_settings_that_cannot_be():
    for experts, message in (
        ([], 'there is no expert'),
        (['clip-448', 'clip-448'], 'clip-448 are given twice'),
        ([dict(kind='clip')], 'give it a name'),
        ([dict(name='a.b', kind='clip')], 'without a dot'),
        ([dict(name='a', width=3)], r"settings \['width'\] are unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            EagleVisionConfig(experts=experts)
    for kind, size, message in (
        ('clip', 26, 'no multiple of 4 pixels'),
        ('convnext', 30, 'no multiple of 8 pixels'),
        ('eva', 33, 'no multiple of 4 pixels'),
        ('dinov2', 18, 'no multiple of 4 pixels'),
        ('sam', 40, 'set image_size in the config'),
    ):
        expert = dict(name=kind) | KINDS[kind] | dict(image_size=size)
        with pytest.raises(ValueError, match=message):
            EagleVisionModel(EagleVisionConfig(experts=[expert]))
    with pytest.raises(ValueError, match="unknown expert 'vit'"):
        EagleVisionModel(EagleVisionConfig(experts=['vit']))
    for connector, message in (
        (dict(fusion='mean'), "fusion 'mean' is unknown"),
        (dict(fuse=1), r"settings \['fuse'\] are unknown"),
        (dict(aligned=['sam']), 'experts sam are to be aligned; the mixture has clip, convnext'),
        (dict(tiles=0), 'tiles is 0'),
        (dict(fusion='sequence', aligned=['clip']), 'expected another fusion'),
        (dict(grid=-1), 'grid has side -1'),
    ):
        with pytest.raises(ValueError, match=message):
            build(**connector)
    with pytest.raises(ValueError, match="'clip' is the only expert"):
        build('mini_gemini', ('clip',))
    with pytest.raises(ValueError, match='the tokens keep 28 channels'):
        build(projector='identity')
