"Recipes of mPLUG-Owl3: what is published, what runs, and one unit of every kind."

import pytest
import torch

from mllm_replica.models.backbones import BackboneError
from mllm_replica.owl3.recipes import build, recipe, tables
from mllm_replica.owl3.stages import layers_of, mixture_of, published_stages
from mllm_replica.core.machine import Machine
from mllm_replica.planning.plan import plan
from mllm_replica.running.unit import run_unit
from mllm_replica.tables.published import load_table
from mllm_replica.training.optimiser import trainable_names

torch.set_num_threads(1)


def test_published_schedule():
    pretrain, several, sft = published_stages()
    assert [(s.steps, s.batch_size, s.lr, s.min_lr, s.max_length) for s in (pretrain, several, sft)] == [
        (20_000, 2048, 1e-3, 1e-5, 768),
        (3_000, 1024, 2e-5, 1e-7, 4096),
        (11_000, 1024, 2e-5, 1e-7, 4096),
    ]
    assert all(s.warmup_steps == round(0.03 * s.steps) for s in (pretrain, several, sft))
    assert all(abs(sum(mixture_of(stage).values()) - 100) < 0.1 for stage in (1, 2, 3))


def test_rows_of_the_ablations_differ_in_what_they_say():
    made = {(t, r.key): layers_of(r.params) for t in ('8', '9', '10') for r in load_table('owl3', t).rows}
    assert [made['8', row]['fusion'] for row in ('concat', 'pre_cross', 'post_cross', 'hyper')] == [
        'concat',
        'pre_cross',
        'post_cross',
        'hyper',
    ]
    assert made['9', 'l4']['hyper_layers'] == [0, 8, 16, 24]
    assert made['10', 'base'] == dict(fusion='hyper', gate='scalar', shared_norm=False, mi_rope=False)
    assert made['10', 'full'] == dict(fusion='hyper', gate='adaptive', shared_norm=True, mi_rope=True)
    assert (
        recipe('8', 'hyper', 'tiny', 3).digest() == recipe('10', 'full', 'tiny', 3).digest()
    )  # one unit serves both tables


def test_tables_that_run():
    assert (
        tables('tiny') == [t for t in tables('tiny') if t in ('8', '9', '10', 'fig4', 'fig1a')]
        and len(tables('tiny')) == 5
    )


@pytest.mark.parametrize(
    'table,row',
    [
        ('8', 'concat'),
        ('8', 'post_cross'),
        ('10', 'base'),
        ('9', 'l8'),
        ('fig4', 'owl3'),
        ('fig4', 'llava_interleave'),
        ('fig1a', 'owl3'),
        ('fig1a', 'llava_interleave'),
    ],
)
def test_one_unit_of_every_kind(table, row, tmp_path):
    result = run_unit(recipe(table, row, 'smoke', 0), tmp_path)
    known = {c.key for c in load_table('owl3', table).replication['tiny'].columns}
    few = {
        'fig4': {'circular_1', 'circular_2', 'plain_1', 'plain_2', 'control'},
        'fig1a': {'seconds_10', 'seconds_20'},
    }.get(table, known)
    assert few <= set(result.metrics) and few <= known


def test_the_encoder_stays_frozen_and_all_else_learns():
    made = recipe('10', 'full', 'tiny', 0)
    model, _ = build(made)
    names = trainable_names(model, made.stages[0].trainable)
    assert (
        not any(n.startswith('vision_model.') for n in names)
        and any('v_kv_proj' in n for n in names)
        and 'vision2text_model.weight' in names
    )


def test_one_seed_one_model():
    first, second = (build(recipe('10', 'full', 'tiny', 5))[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.nightly
def test_all_stages_are_planned_at_the_scale_of_the_paper():
    (unit,) = plan('owl3', '4', 'paper', ['owl3'], Machine(devices=8, shard='fsdp', checkpointing=True)).units
    assert [round(s.trained / 1e6, 2) for s in unit.stages][0] == 18.88 and len(unit.stages) == 3
    assert all(sum(s.memory.values()) < 80 for s in unit.stages)


def test_weights_are_not_downloaded():
    with pytest.raises(BackboneError, match=r'\[backbones\]'):
        build(recipe('4', 'owl3', 'paper', 1))
