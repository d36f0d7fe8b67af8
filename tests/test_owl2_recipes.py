"Recipes of mPLUG-Owl2: what is published, what runs, one unit of every kind, and the small language model that rows share."

import json

import numpy as np
import pytest
import torch

from mllm_replica.core.metrics import word_accuracy
from mllm_replica.core.settings import settings
from mllm_replica.data.sources import load_source
from mllm_replica.data.worlds.mosaics import LETTERS, MOSAICS, leader
from mllm_replica.models.backbones import BackboneError
from mllm_replica.owl2.building import linear_probe
from mllm_replica.owl2.recipes import build, recipe, tables
from mllm_replica.owl2.stages import _stage, layerwise_decay, mixture_of, published_stages
from mllm_replica.core.machine import Machine
from mllm_replica.planning.plan import plan
from mllm_replica.running.unit import run_unit
from mllm_replica.tables.published import load_table
from mllm_replica.training.optimiser import trainable_names

torch.set_num_threads(1)
ROWS = ['nomam_text', 'nomam_mm', 'nomam_both', 'mam_text', 'mam_mm', 'mam_both']


def test_published_schedule():
    pretrain, tune = published_stages(mixture_of())

    def said(s):
        return (s.steps, s.batch_size, s.lr, s.min_lr, s.warmup_steps, s.weight_decay)

    assert said(pretrain) == (42_500, 8192, 1e-4, 1e-6, 1000, 0.05) and said(tune) == (4_800, 256, 2e-5, 1e-7, 250, 0.0)
    assert all((s.betas, s.eps, s.clip) == ((0.9, 0.98), 1e-6, 1.0) for s in (pretrain, tune))
    assert tune.lr_scale == pretrain.lr_scale == layerwise_decay(24, 0.9)
    assert min(tune.lr_scale.values()) == pytest.approx(0.9**25) and max(tune.lr_scale.values()) == pytest.approx(0.9)


def test_rows_differ_in_what_they_say():
    made = {row: recipe('5', row, 'paper', 1) for row in ROWS}
    assert all((made[row].model.get('adaptive') == []) == row.startswith('nomam') for row in ROWS)
    assert set(made['mam_text'].stages[1].mixture) | set(made['mam_mm'].stages[1].mixture) == set(
        made['mam_both'].stages[1].mixture
    )
    assert [recipe('7', row, 'paper', 1).model['num_queries'] for row in ('q8', 'q128')] == [8, 128]
    assert [recipe('8', row, 'paper', 1).model['image_size'] for row in ('r224', 'r448')] == [224, 448]
    frozen, plain, decayed = (recipe('6', row, 'paper', 1).stages[1] for row in ('frozen', 'unfrozen', 'unfrozen_llrd'))
    assert frozen.trainable != plain.trainable == decayed.trainable and not plain.lr_scale and decayed.lr_scale


def test_every_kind_is_seen_equally_often_in_table_5():
    made = {row: recipe('5', row, 'tiny', 1).stages[1] for row in ROWS}
    seen = {
        row: {name: stage.steps * share / sum(stage.mixture.values()) for name, share in stage.mixture.items()}
        for row, stage in made.items()
    }
    assert {steps for kinds in seen.values() for steps in kinds.values()} == {made['mam_mm'].steps}
    assert made['mam_both'] == made['nomam_both']


def test_tables_that_run():
    assert tables('tiny') == ['5', '6', '7', '8', 'fig5']


@pytest.mark.parametrize(
    'table,row',
    [('5', 'mam_both'), ('5', 'nomam_text'), ('6', 'unfrozen_llrd'), ('6', 'frozen'), ('7', 'q8'), ('8', 'r224')],
)
def test_one_unit_of_every_kind(table, row, tmp_path):
    result = run_unit(recipe(table, row, 'smoke', 0), tmp_path)
    assert {c.key for c in load_table('owl2', table).replication['tiny'].columns} == set(result.metrics)


def test_stage_1_trains_what_is_visual():
    for row in ('mam_both', 'nomam_both'):
        made = recipe('5', row, 'smoke', 0)
        names = trainable_names(build(made)[0], made.stages[0].trainable)
        assert any(n.startswith('vision_model.') for n in names) and any(
            n.startswith('visual_abstractor.') for n in names
        )
        assert all('.multiway.1.' in n for n in names if n.startswith('language_model.'))
        assert any('.multiway.1.' in n for n in names) == row.startswith('mam')


def test_rows_share_one_language_model_and_other_data_gives_another():
    first, second = (build(recipe('5', row, 'smoke', 3))[0].state_dict() for row in ('mam_both', 'nomam_mm'))
    for name in (n for n in second if n.startswith('language_model.')):
        parts = [n for n in first if n.replace('.multiway.0', '').replace('.multiway.1', '') == name]
        assert parts and all(torch.equal(first[part], second[name]) for part in parts), name
    before = len(list((settings().run_folder / 'pretrained').glob('*.lock')))
    changed = recipe('5', 'mam_both', 'smoke', 3).model_dump()
    changed['sources']['language']['options']['length'] = 7
    build(type(recipe('5', 'mam_both', 'smoke', 3))(**changed))
    assert len(list((settings().run_folder / 'pretrained').glob('*.lock'))) == before + 1


def test_both_stages_are_planned_at_the_scale_of_the_paper():
    (unit,) = plan('owl2', '2', 'paper', ['owl2'], Machine(devices=8, shard='fsdp', checkpointing=True)).units
    pretrain, tune = unit.stages
    assert unit.parameters == tune.trained == 8_197_859_328 and unit.visual_tokens == 65
    assert (
        pretrain.trained == 303_966_208 + 81_473_536 + 1_074_003_968 - 768 * 1024 and pretrain.length == 256
    )  # 768 positions fewer at 224 pixels
    assert all(sum(s.memory.values()) < 80 for s in unit.stages)


def test_weights_are_not_downloaded():
    with pytest.raises(BackboneError, match=r'\[backbones\]'):
        build(recipe('2', 'owl2', 'paper', 1))


def test_train_and_test_share_no_mosaic_and_no_list():
    sources = recipe('5', 'mam_both', 'smoke', 0).sources

    def cells(name):
        return {
            tuple(json.loads(meta)['cells']) for meta in load_source(sources[name], 0, settings().run_folder)['meta']
        }

    assert not cells('picture') & cells('test_picture_item') and not cells('text') & cells('test_text_item')


def test_worlds_ask_what_can_be_answered():
    assert leader(['red', 'blue', 'blue']) == 'blue' and leader(['red', 'blue']) is None and leader(['red']) == 'red'
    assert word_accuracy('red blue', 'red green') == 0.5
    scene = {'cells': ['red', 'blue', 'red', 'green'], 'palette': ['red', 'blue', 'green']}
    assert all(
        MOSAICS.tasks['next'](scene, np.random.default_rng(i))[:2] == (': right of blue', 'red') for i in range(5)
    )


def test_probe_separates_what_is_linear():
    torch.manual_seed(0)
    labels = torch.arange(200) % len(LETTERS)
    features = torch.nn.functional.one_hot(labels).float() @ torch.randn(8, 16) + 0.01 * torch.randn(200, 16)
    assert linear_probe((features, labels), (features, labels)) == 1.0
    assert linear_probe((torch.randn(200, 16), labels), (torch.randn(200, 16), labels)) < 0.3


def test_smoke_is_a_few_steps():
    assert (
        _stage('x', 'smoke', (r'.',), {'a': 1.0}, 1000).steps
        < 10
        < _stage('x', 'tiny', (r'.',), {'a': 1.0}, 1000).steps
    )
