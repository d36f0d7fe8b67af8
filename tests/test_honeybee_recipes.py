"Recipes of Honeybee: what rows share and vary, and what they say can be built."

import re

import pytest
import torch
from toys import save_backbones
from transformers import Dinov2Config, Dinov2Model

from mllm_replica.honeybee import recipes
from mllm_replica.data.worlds.pictures import draw_letters
from mllm_replica.models import backbones
from mllm_replica.running.unit import run_unit
from mllm_replica.tables.published import load_table, tables_of
from mllm_replica.training.real import TOWERS


def test_equal_settings_are_one_experiment():
    def digest(table, row, seed=10):
        return recipes.recipe(table, row, 'tiny', seed).digest()

    assert digest('3', 'cabs_144') == digest('8', 'cabs_144') == digest('9', 'cabs') == digest('7', 'c7b_144')
    assert len({digest('9', row) for row in recipes.rows('9', 'tiny')}) == 11
    assert digest('3', 'cabs_144') != digest('3', 'cabs_144', 11)


def test_every_row_of_a_table_is_another_model_at_the_scale_of_the_paper():
    for table in tables_of('honeybee'):
        digests = [
            recipes.recipe(table, row, 'paper', 1).digest()
            for row, reason in recipes.rows(table, 'paper').items()
            if reason is None
        ]
        assert len(set(digests)) == len(digests), table


SMALL_UNITS = [
    ('3', 'resampler_144'),
    ('8', 'linear_256'),
    ('9', 'dabs'),
    ('9', 'convnext'),
    ('4', 'D1'),
    ('5a', 'per_task'),
    ('5c', 'coarse_single'),
    ('5d', 'multi_turn_dedup'),
    ('fig9', 'dabs'),
]


@pytest.mark.parametrize('table,row', SMALL_UNITS)
def test_one_unit_of_every_kind(table, row, tmp_path):
    result = run_unit(recipes.recipe(table, row, 'smoke', 0), tmp_path)
    assert {c.key for c in load_table('honeybee', table).replication['tiny'].columns if not c.mean_of} <= set(
        result.metrics
    )


def test_rows_of_a_table_share_their_data():
    for table in ('3', '8', '9'):
        found = {
            tuple(sorted((n, s.model_dump_json()) for n, s in recipes.recipe(table, row, 'tiny', 10).sources.items()))
            for row, reason in recipes.rows(table, 'tiny').items()
            if reason is None
        }
        assert len(found) == 1


def test_task_groups_are_left_out():
    def mixture(row):
        return recipes.recipe('4', row, 'paper', 0).stages[1].mixture

    assert 'vqav2' not in mixture('D3') and 'scienceqa' in mixture('D3')
    assert set(mixture('D10')) == {'llava150k', 'sharegpt'}
    assert len(mixture('D2')) == 6
    assert sum(mixture('D1').values()) == pytest.approx(100.3)


def test_balancing_rules_differ():
    rules = {
        row.key: recipes.recipe('5a', row.key, 'paper', 0).stages[1].mixture
        for row in load_table('honeybee', '5a').rows
    }
    assert len(set(rules['per_dataset'].values())) == 1
    assert rules['per_sample_100k']['vg'] == 100_000 and rules['per_sample_100k']['vsr'] == 8_000
    assert rules['per_task']['coyo'] == 1 and rules['per_task']['vqav2'] == 0.25


@pytest.mark.parametrize('row, size, parameters', [('honeybee_c_7b', 4096, 37.07e6), ('honeybee_d_13b', 5120, None)])
def test_paper_models_have_the_published_shapes(row, size, parameters):
    recipe = recipes.recipe('6', row, 'paper', 42)
    with torch.device('meta'):
        model, _ = recipes.build(recipe)
    assert model.config.text_config.hidden_size == size
    found = sum(p.numel() for p in model.abstractor.parameters())
    if parameters:
        assert abs(found - parameters) < 0.01e6
    stages = recipe.stages
    assert [s.steps for s in stages] == [200_000, 10_000] and stages[0].lr == (1e-4 if '_d_' in row else 3e-4)
    trained = [n for n, _ in model.named_parameters() if any(re.search(p, n) for p in stages[0].trainable)]
    assert trained and all(n.startswith('abstractor.') for n in trained)


def test_the_small_models_start_alike():
    made = [recipes.build(recipes.recipe('3', row, 'tiny', 10))[0] for row in ('cabs_144', 'linear_256')]
    for name, parameter in made[0].vision_model.named_parameters():
        assert torch.equal(parameter, made[1].vision_model.get_parameter(name)), name
    assert not torch.equal(
        made[0].vision_model.embeddings.position_embedding.weight,
        recipes.build(recipes.recipe('3', 'cabs_144', 'tiny', 11))[0].vision_model.embeddings.position_embedding.weight,
    )


def test_pretrained_backbones_from_local_folders(tmp_path, monkeypatch):
    from mllm_replica.core.settings import settings
    from mllm_replica.running.unit import run_unit

    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path / 'runs'))
    settings.cache_clear()
    save_backbones(tmp_path)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14)).save_pretrained(tmp_path / 'vision')
    draw_letters(tmp_path / 'runs' / 'packaged')
    folders = {TOWERS[part]: str(tmp_path / part) for part in TOWERS}
    monkeypatch.setattr(backbones, 'settings', lambda: settings().model_copy(update={'backbones': folders}))
    whole = recipes.recipe('9', 'linear', 'small', 0)
    few = {name: source.model_copy(update={'size': 4}) for name, source in whole.sources.items()}
    short = tuple(
        s.model_copy(update={'steps': 2, 'batch_size': 2, 'accumulate': 1, 'warmup_steps': 1, 'precision': 'fp32'})
        for s in whole.stages
    )
    recipe = whole.model_copy(update={'sources': few, 'stages': short})
    monkeypatch.setattr(recipes, 'recipe', lambda *_: recipe)
    result = run_unit(recipe, tmp_path / 'unit')
    settings.cache_clear()
    assert result.steps == 2 and 0 <= result.metrics['scenes'].value <= 1
