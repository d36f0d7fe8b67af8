"What holds for the recipes of every paper: rows run or say why, a plan trains nothing, and what units start from is taught once."

import re

import pytest
import torch

from mllm_replica.core.registry import PAPERS, recipes_of
from mllm_replica.core.settings import SCALES, settings
from mllm_replica.planning.plan import plan
from mllm_replica.tables.published import tables_of

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
