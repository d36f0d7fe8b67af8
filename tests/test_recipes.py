"What holds for the recipes of every paper: rows run or say why, a plan trains nothing, and what units start from is taught once."

import re

import pytest
import torch
from pydantic import ValidationError

from mllm_replica.core.recipe import Benchmark, Recipe, Source, Stage
from mllm_replica.core.registry import PAPERS, recipes_of
from mllm_replica.core.settings import SCALES, settings
from mllm_replica.core.variation import vary
from mllm_replica.data.encoded import Encoded
from mllm_replica.planning.plan import plan
from mllm_replica.tables.published import tables_of
from mllm_replica.training.loop import train

torch.set_num_threads(1)
PLANNED = [
    ('owl2', '5', 'mam_both'),
    ('mm1', 'fig5', 'c_ratios'),
    ('mm1', 'fig7', 'res_1344'),
    ('eagle', 'fig4', 'x5'),
]  # units that start from training


@pytest.fixture
def empty(tmp_path, monkeypatch):
    "A run folder without anything."
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('paper', PAPERS)
def test_every_row_runs_or_says_why(paper, scale):
    chapter = recipes_of(paper)
    for table in tables_of(paper):
        for row, reason in chapter.rows(table, scale).items():
            if reason is None:
                assert chapter.recipe(table, row, scale, 1).label == f'{paper}/{table}/{row}/{scale}/1'
            else:
                with pytest.raises(ValueError, match=f'cannot run at scale {scale}: {re.escape(reason)}'):
                    chapter.recipe(table, row, scale, 1)


@pytest.mark.parametrize('paper,table,row', PLANNED)
def test_a_plan_trains_nothing(paper, table, row, empty):
    assert plan(paper, table, 'smoke', rows=[row]).units
    assert not (empty / 'pretrained').exists()


@pytest.mark.parametrize('row', ['seq_append_3', 'mini_gemini_2'])
def test_what_units_start_from_is_all_that_building_trains(row, empty):
    eagle = recipes_of('eagle')
    made = eagle.recipe('4', row, 'smoke', 0)

    def trained():
        return {file.parent.name for file in (empty / 'pretrained').glob('*/weights.safetensors')}

    for count, start in enumerate(eagle.starts(made), 1):
        eagle.teach(made, start)
        assert len(trained()) == count, start
    before = trained()
    model, _ = eagle.build(made)
    assert trained() == before and not any(weight.is_meta for weight in model.parameters())


# settings outside their range

STAGE = dict(name='s', trainable=('.',), mixture={'a': 1.0}, steps=2, batch_size=4, lr=1e-3)
SOURCE = dict(kind='world', name='tiles')
BENCHMARK = dict(name='b', source='a')
NAN, INF = float('nan'), float('inf')


def made(stage=None, **changes):
    stages = (stage or Stage(**STAGE),)
    whole = dict(paper='mm1', table='1', row='r', scale='tiny', seed=0, model={}, sources={'a': Source(**SOURCE)})
    return Recipe(**whole | dict(stages=stages, benchmarks=()) | changes)


@pytest.mark.parametrize(
    'field, values',
    dict(
        name=['', 3],
        trainable=[(), ('(',), ('',)],
        mixture=[{}, {'a': 0.0}, {'a': -1.0}, {'a': NAN}, {'a': INF}],
        steps=[-1, 1.5],
        batch_size=[0, -4],
        lr=[0.0, -1e-3, NAN, INF],
        min_lr=[-1.0, 1.0, NAN],
        warmup_steps=[-1],
        accumulate=[0, -1, 5],
        lr_scale=[{'a': -1.0}, {'a': NAN}, {'(': 1.0}],
        layer_decay=[0.0, -0.9, 1.1, 0.9, NAN],
        decayed_layers=['(', r'layers\.(\d+)'],
        weight_decay=[-0.1, NAN],
        betas=[(0.9, 1.0), (-0.1, 0.9), (0.9,), (NAN, 0.9)],
        eps=[0.0, -1.0, NAN],
        clip=[-1, -1.0, 0.0, NAN, INF],
        precision=['fp16'],
        max_length=[0, -1, 1],
        checkpoint_every=[0, -1],
    ).items(),
)
def test_a_stage_outside_its_range_is_refused_when_the_recipe_is_made(field, values):
    for value in values:
        with pytest.raises(ValidationError, match=field):
            Stage(**STAGE | {field: value})
        with pytest.raises(ValidationError, match=field):
            made(Stage(**STAGE).model_copy(update={field: value}))


def test_other_settings_outside_their_range():
    for change in (dict(size=0), dict(size=-1), dict(name=''), dict(split='')):
        with pytest.raises(ValidationError, match=next(iter(change))):
            Source(**SOURCE | change)
    for change in (dict(name=''), dict(max_new_tokens=0), dict(batch_size=0), dict(tasks=('',)), dict(method='guess')):
        with pytest.raises(ValidationError, match=next(iter(change))):
            Benchmark(**BENCHMARK | change)
    for change in (dict(seed=-1), dict(paper=''), dict(row='')):
        with pytest.raises(ValidationError, match=next(iter(change))):
            made(**change)
    ask = Benchmark(**BENCHMARK)
    with pytest.raises(ValidationError, match=r"two benchmarks are called \['b'\]"):
        made(benchmarks=(ask, ask))


def test_an_unknown_metric_is_found_when_the_recipe_is_made():
    with pytest.raises(ValidationError, match="unknown metric 'bleu'; known: exact_match"):
        Benchmark(**BENCHMARK, metric='bleu')
    with pytest.raises(ValidationError, match="unknown metric 'bleu'"):
        made(benchmarks=(Benchmark(**BENCHMARK).model_copy(update={'metric': 'bleu'}),))
    with pytest.raises(ValueError, match='clip'):
        vary(made(), {'stages.0.clip': -1})


def test_training_refuses_a_stage_that_no_recipe_has_seen(tmp_path):
    stage, model = Stage(**STAGE).model_copy(update={'clip': -1.0}), torch.nn.Linear(2, 2)
    data = {'a': [Encoded('x', [1, 2], [-100, 2])]}
    with pytest.raises(ValidationError, match='clip'):
        train(model, [stage], data, None, tmp_path, 0)
    assert not (tmp_path / 'curve.csv').exists()
