"Recipes of MM1: what is published, what runs, one unit of every kind, and what rows share."

import json
from dataclasses import replace

import pytest
import torch

from mllm_replica.data.encoded import Encoded
from mllm_replica.data.worlds import documents
from mllm_replica.data.worlds.making import samples
from mllm_replica.mm1.recipes import arrange, build, recipe, rows, tables
from mllm_replica.mm1.small import CellTags
from mllm_replica.mm1.studies import SHOTS, TINY
from mllm_replica.models.backbones import BackboneError
from mllm_replica.core.machine import Machine
from mllm_replica.planning.plan import plan
from mllm_replica.running.unit import run_unit
from mllm_replica.tables.published import load_table

torch.set_num_threads(1)
KINDS = [
    ('1', 'aim_1b_224'),
    ('1', 'clip_h_336_vecap'),
    ('4', 'mm1_3b_chat'),
    ('4', 'mm1_7b_moe'),
    ('connectors', 'att_random_half'),
    ('connectors', 'resampler_full'),
    ('fig4', 'cabs_224_64'),
    ('fig5', 'c_ratios'),
    ('fig6_7', 'lr_slope'),
    ('fig7', 'res_1344'),
    ('fig7', 'length_0'),
]


@pytest.mark.parametrize('table,row', KINDS)
def test_one_unit_of_every_kind(table, row, tmp_path):
    result = run_unit(recipe(table, row, 'smoke', 0), tmp_path)
    columns = {c.key for c in load_table('mm1', table).replication['tiny'].columns}
    assert set(result.metrics) == columns - ({'evenness'} if 'chat' in row else set())


def test_tables_that_run():
    assert tables('tiny') == list(TINY) and tables('paper') == ['1', '3', '4', 'fig4', 'fig5']


def test_rows_of_figure_4_differ_in_one_thing_each():
    made = {row: recipe('fig4', row, 'tiny', 1) for row in rows('fig4', 'tiny')}
    assert len({r.digest() for r in made.values()}) == 12
    base = made['cabs_336_144']
    assert made['cabs_336_64'].model | {'connector': base.model['connector']} == base.model
    assert made['cabs_224_144'].model | {'vision': base.model['vision']} == base.model
    assert all(r.sources == base.sources and r.stages == base.stages for r in made.values())
    assert recipe('connectors', 'cabs_full', 'tiny', 1).digest() == base.digest()


@pytest.mark.parametrize('row', ['c_ratios', 'c_86_14', 'b_caption', 'b_inter', 'a_66_33'])
def test_every_sequence_of_a_study_is_seen_once(row):
    made, (_, processor) = recipe('fig5', row, 'tiny', 1), build(recipe('fig5', row, 'smoke', 1))
    (stage,) = made.stages
    encoded = {
        name: [processor.encode(s) for s in samples('pages', 'train', 1, 200, **made.sources[name].options)]
        for name in stage.mixture
    }
    whole = {
        name: [
            replace(e, id=str(i), images=[], image_ids=list(e.images))
            for i, e in enumerate(found * (made.sources[name].size // 200))
        ]
        for name, found in encoded.items()
    }  # as long as the real sources, from fewer pictures
    given = arrange(made.stages, whole, pad_token_id=0)
    order = given['draw']({name: len(found) for name, found in given['datasets'].items()}, stage.mixture, 1)
    places = [place for step in range(stage.steps) for place in order.indices(step, stage.batch_size)]
    assert len(set(places)) == len(places) == 1600
    for name, found in given['datasets'].items():
        assert all(len(s) <= stage.max_length and len(s.image_spans) <= 16 for s in found)
        assert {e.id for e in whole[name]} == {part for s in found for part in s.id.split('+')}


def test_an_example_that_is_not_of_its_kind_is_not_trained_on():
    (stage,) = recipe('fig5', 'c_ratios', 'tiny', 1).stages
    text = Encoded('t', [1, 5, 2], [-100, 5, 2])
    picture = Encoded('p', [1, 9, 9, 2], [-100, -100, -100, 2], ['x'], ['x'], [(1, 3)])
    assert set(arrange([stage], {'caption': [picture], 'text': [text]}, pad_token_id=0)['datasets']) == {
        'caption',
        'text',
    }
    with pytest.raises(ValueError, match="document 'p' has 1 images, an example of kind 'text' has 0"):
        arrange([stage], {'text': [text, picture]})
    with pytest.raises(ValueError, match="document 't' has 0 images, an example of kind 'caption' has 1"):
        arrange([stage], {'caption': [text]})


def test_skills_are_asked_without_a_picture():
    for task in ('fact', 'copy'):
        source = recipe('fig5', 'c_ratios', 'tiny', 1).sources[f'test_{task}']
        assert not next(samples('pages', 'test', 1, 1, **source.options))['images']


def test_mixtures_that_say_the_same_are_one_unit():
    assert recipe('fig5', 'a_100_0', 'tiny', 1).digest() == recipe('fig5', 'b_caption', 'tiny', 1).digest()
    assert recipe('fig5', 'a_0_100', 'tiny', 1).digest() == recipe('fig5', 'b_inter', 'tiny', 1).digest()
    assert recipe('fig5', 'a_50_50', 'tiny', 1).digest() == recipe('fig5', 'c_100_0', 'tiny', 1).digest()


def test_points_that_the_studies_do_not_have():
    unmade = {
        key
        for table in ('fig5', 'fig7')
        for key, reason in rows(table, 'tiny').items()
        if reason and 'nothing to vary' not in reason
    }
    assert unmade == {'c_66_33'} | {f'res_{n}' for n in (224, 448, 560, 896)} | {f'length_{n}' for n in (2, 22, 52, 72)}
    assert (
        rows('fig5', 'paper')['c_66_33'] is None and 'more sequences than there are' in rows('fig5', 'tiny')['c_66_33']
    )


def test_rows_start_from_the_same_weights():
    first, second = (build(recipe('fig5', row, 'smoke', 3))[0].state_dict() for row in ('c_ratios', 'a_0_100'))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(recipe('1', 'aim_1b_224', 'smoke', 3))[0].state_dict()
    same = {
        name.split('.')[0]
        for name in first
        if first[name].shape == other[name].shape and torch.equal(first[name], other[name])
    }
    sheets = [
        build(recipe('fig4', row, 'smoke', 3))[0].language_model.state_dict() for row in ('avg_336_64', 'cabs_224_144')
    ]
    assert all(torch.equal(sheets[0][name], sheets[1][name]) for name in sheets[0])
    assert 'language_model' in same and not torch.equal(
        first['vision_model.post_layernorm.weight'], other['vision_model.post_layernorm.weight']
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    'row, billions',
    [
        ('mm1_3b_chat', 2.94),
        ('mm1_7b_chat', 6.4),
        ('mm1_30b_chat', 30.1),
        ('mm1_3b_moe', 63.9),
        ('mm1_7b_moe', 47.0),
    ],
)
def test_models_of_the_paper_are_planned(row, billions):
    found = plan('mm1', '4', 'paper', [row], Machine(devices=8, shard='fsdp', checkpointing=True))
    (unit,) = found.units
    pretrain, tune = unit.stages
    assert unit.parameters / 1e9 == pytest.approx(billions + 0.66, abs=0.05) and unit.visual_tokens == 144
    assert pretrain.tokens == 200_000 * 512 * 4096 and tune.length == 2048
    assert all(sum(s.memory.values()) < 80 for s in unit.stages) == ('moe' not in row)  # fits
    assert any(
        'assumed widths' in sentence and 'only the number of parameters is published' in sentence
        for sentence in found.assumptions
    )


def test_weights_are_not_downloaded():
    with pytest.raises(BackboneError, match=r'\[backbones\]'):
        build(recipe('4', 'mm1_3b_chat', 'paper', 1))


def test_demonstrations_are_of_the_test_split_and_topic():
    for shots in SHOTS:
        sample = next(samples('pages', 'test', 1, 1, tasks=['shots'], kind='interleaved', images=[shots + 1] * 2))
        scene = json.loads(sample['meta'])
        assert (
            len(sample['images']) == shots + 1
            and sample['answer'] == scene['pictures'][-1][scene['topic']]
            and sample['answer'] in documents.WORDS
        )


def test_tags_name_the_cell_of_every_patch():
    class Still(torch.nn.Module):
        "An encoder that has learnt nothing."

        config = type('Config', (), {'hidden_size': 8})
        post_layernorm = torch.nn.Identity()

        def forward(self, pixel_values):
            return type('Out', (), {'last_hidden_state': pixel_values})

    tags = CellTags(Still(), 10)
    labels = torch.tensor([[-100, 1, 2, 3, 4, 5, 6, 7, 8]])
    patches = torch.zeros(1, 17, 8)
    with torch.no_grad():
        tags.names.weight.zero_()
        tags.names.bias.zero_()
        assert tags(patches, labels).loss.item() == pytest.approx(torch.log(torch.tensor(10.0)).item(), abs=1e-5)
        for cell in range(4):
            patches[0, [1 + 8 * (cell // 2) + 2 * (cell % 2) + d for d in (0, 1, 4, 5)], cell] = 50.0
        for cell in range(4):
            tags.names.weight[1 + cell, cell] = tags.names.weight[10 + 5 + cell, cell] = 1.0
        assert tags(patches, labels).loss.item() < 1e-3


def test_rows_of_figure_4_with_real_eyes_differ_in_one_thing_each():
    made = {row: recipe('fig4', row, 'sighted', 1) for row, why in rows('fig4', 'sighted').items() if not why}
    assert len({r.digest() for r in made.values()}) == 9
    base = made['cabs_336_144']
    assert made['cabs_336_64'].model | {'connector': base.model['connector']} == base.model
    assert made['cabs_224_64'].model | {'image_size': 112} == made['cabs_336_64'].model
    assert all(r.sources == base.sources and r.stages == base.stages for r in made.values())
    assert recipe('connectors', 'cabs_full', 'sighted', 1).digest() == base.digest()
