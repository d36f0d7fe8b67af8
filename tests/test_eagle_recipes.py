"Recipes of Eagle: one unit of every kind, what rows share and vary, the search, and the plan at the scale of the paper."

import pytest
import torch

from mllm_replica.core.settings import settings
from mllm_replica.data.sources import load_source
from mllm_replica.eagle.fusing.fusion import FUSIONS
from mllm_replica.eagle.recipes import _TINY, build, recipe, rows, search, tables
from mllm_replica.eagle.tiny import _TOWERS
from mllm_replica.models.backbones import BackboneError
from mllm_replica.planning.plan import plan
from mllm_replica.running import study
from mllm_replica.running.unit import run_unit
from mllm_replica.tables.published import load_table
from mllm_replica.training.optimiser import trainable_names

torch.set_num_threads(1)
KINDS = [
    ('2', 'clip336_frozen'),
    ('4', 'seq_append_3'),
    ('4', 'llava_hr_2'),
    ('4', 'mini_gemini_3'),
    ('4', 'deform_2'),
    ('5', 'cnx_frozen_pa'),
    ('experts', 'dinov2'),
    ('external', 'x4_8b_plus'),
    ('fig4', 'x6'),
]


@pytest.mark.parametrize('table,row', KINDS)
def test_one_unit_of_every_kind(table, row, tmp_path):
    result = run_unit(recipe(table, row, 'smoke', 0), tmp_path)
    assert set(result.metrics) == {c.key for c in load_table('eagle', table).replication['tiny'].columns}


def test_tables_that_run():
    assert tables('tiny') == list(_TINY) and tables('paper') == [
        '2',
        '4',
        '5',
        '6',
        '6_released',
        '8',
        '8_released',
        'cost',
        'experts',
        'fig4',
    ]


def test_rows_that_say_the_same_are_one_unit():
    def digests(*places):
        return {recipe(*place, 'tiny', 1).digest() for place in places}

    assert len(digests(('fig4', 'x1'), ('2', 'clip448_unfrozen'), ('experts', 'clip'), ('external', 'x5_keep0'))) == 1
    assert (
        len(
            digests(
                ('fig4', 'x2'),
                ('4', 'chan_concat_2'),
                ('5', 'cnx_unfrozen'),
                ('external', 'x5_keep01'),
                ('external', 'x4_keep01'),
            )
        )
        == 1
    )
    assert (
        len(digests(('fig4', 'x5'), ('external', 'x5_7b')))
        == len(digests(('4', 'chan_concat_3'), ('external', 'x5_keep012')))
        == 1
    )
    assert (
        len(digests(*(('4', row) for row in rows('4', 'tiny')))) == 10
        and len(digests(*(('fig4', row) for row in rows('fig4', 'tiny')))) == 6
    )


def test_rows_of_table_5_vary_in_their_stages_alone():
    made = {row: recipe('5', row, 'tiny', 1) for row in rows('5', 'tiny')}
    assert [len(r.stages) for r in made.values()] == [2, 4, 2, 4]
    for row, r in made.items():
        assert r.sources == made['cnx_frozen'].sources and r.model | {'aligned': False} == made['cnx_frozen'].model
        model = build(r.model_copy(update={'scale': 'smoke', 'sources': recipe('5', row, 'smoke', 1).sources}))[0]
        learning = {name.split('.')[0] for name in trainable_names(model, r.stages[-1].trainable)}
        assert learning == {'mm_projector', 'language_model'} | ({'vision_model'} if 'unfrozen' in row else set())
        assert r.stages[-1].steps == made['cnx_frozen'].stages[-1].steps


def test_mixtures_start_from_the_same_experts_and_reader():
    first, second = (build(recipe('fig4', row, 'smoke', 3))[0] for row in ('x2', 'x5'))
    for name, weight in first.language_model.state_dict().items():
        assert torch.equal(weight, second.language_model.state_dict()[name]), name
    for k, name in enumerate(first.config.vision_config.experts):
        other = next(i for i, e in enumerate(second.config.vision_config.experts) if e['name'] == name['name'])
        mine, theirs = (
            model.vision_model.vision_towers[at].state_dict() for model, at in ((first, k), (second, other))
        )
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    fresh = build(recipe('fig4', 'x2', 'smoke', 4))[0].vision_model.state_dict()
    assert any(not torch.equal(weight, fresh[name]) for name, weight in first.vision_model.state_dict().items())


def test_clip_is_taught_at_its_own_size_and_used_at_another():
    model, processor = build(recipe('2', 'clip448_frozen', 'smoke', 0))
    clip = model.vision_model.vision_towers[0]
    assert clip.image_size == 48 and clip.vision_tower['vision_model'].config.image_size == 32
    native = build(recipe('2', 'clip336_frozen', 'smoke', 0))[0].vision_model.vision_towers[0]
    assert native.image_size == 32 and all(
        torch.equal(a, b) for a, b in zip(clip.state_dict().values(), native.state_dict().values())
    )


def test_training_and_test_share_no_picture():
    sources = recipe('fig4', 'x2', 'smoke', 0).sources

    def pictures(name):
        return {images[0]['bytes'] for images in load_source(sources[name], 0, settings().run_folder)['images']}

    assert not pictures('asked') & pictures('test_letter') and pictures('asked') == pictures('named')
    assert pictures('test_color') == pictures('test_letter')


def test_the_search_asks_for_mixtures(tmp_path, monkeypatch):
    asked, best = [], ['pix2struct', 'eva02']

    def run(recipes, name, seeds, options):
        asked.append([tuple(r.model['experts']) for r in recipes])

        def worth(r):
            return float(len({*best} & {*r.model['experts']})) + 0.1 * len(r.model['experts'])

        return type('Summary', (), {'failed': [], 'outcomes': [], 'exit_code': 0})(), {
            r.row: {'mean': {0: worth(r)}} for r in recipes
        }

    monkeypatch.setattr(study, '_run', run)
    monkeypatch.setattr(study, '_keep', lambda found, recipe, draw: found)
    found = study.run_search(search, 'smoke', seeds=[0], rounds=2)
    assert asked[0] == [('clip', 'convnext')] and len(asked[1]) == 4 and len(asked[2]) == 3
    assert {*found.frame[found.frame['chosen']].iloc[-1]['set'].split(', ')} == {'clip', 'convnext', *best}
    assert all(list(made) == [name for name in _TOWERS if name in made] for mixtures in asked for made in mixtures)


@pytest.mark.nightly
def test_pre_alignment_and_joint_stages_are_planned_at_the_scale_of_the_paper():
    (unit,) = plan('eagle', '5', 'paper', rows=['cnx_unfrozen_pa']).units
    clip, convnext, project, tune = unit.stages
    assert (clip.stage, convnext.stage) == ('align clip-448', 'align convnext-1024') and unit.visual_tokens == 1024
    assert (
        project.trained == (1024 + 3072) * 4096 + 4096**2 + 2 * 4096
        and project.steps == 2179
        and tune.steps == clip.steps == 7296
    )
    assert (
        clip.trained == pytest.approx(303.5e6 + 21e6, rel=0.01)
        and tune.trained > 7.9e9
        and clip.flops < convnext.flops < tune.flops
    )
    assert 'its schedule is not' in ' '.join(
        recipe('5', 'cnx_frozen_pa', 'paper', 1).assumptions
    )  # which a plan passes on


def test_rows_at_the_scale_of_the_paper_say_what_they_vary():
    models = {row: recipe('4', row, 'paper', 1) for row in rows('4', 'paper')}
    assert {r.model['fusion'] for r in models.values()} == set(FUSIONS) and models['seq_append_3'].stages[
        0
    ].max_length == 4096
    assert recipe('2', 'clip336_frozen', 'paper', 1).model['sizes'] == {'clip-448': 336}
    frozen, trained = (
        recipe('2', row, 'paper', 1).stages[-1].trainable for row in ('clip448_frozen', 'clip448_unfrozen')
    )
    assert len(frozen) == 2 and len(trained) == 3
    assert (
        recipe('6', 'eagle_x5_pa_13b', 'paper', 1).model['aligned']
        == recipe('6', 'eagle_x5_pa_13b', 'paper', 1).model['experts']
    )
    assert not recipe('6_released', 'eagle_x5_7b', 'paper', 1).model['aligned']


def test_weights_are_not_downloaded():
    with pytest.raises(BackboneError, match=r'\[backbones\]'):
        build(recipe('fig4', 'x5', 'paper', 1))
