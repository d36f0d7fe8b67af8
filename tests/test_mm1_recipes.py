"Recipes of MM1: what is published, what runs, one unit of every kind, and what rows share."
import json

import pytest
import torch

from mllm_replica import documents
from mllm_replica.mm1.recipes import _TINY, SHOTS, build, page_mixture, recipe, rows, tables
from mllm_replica.mm1.small import CellTags
from mllm_replica.plan import plan
from mllm_replica.published import load_table
from mllm_replica.unit import run_unit
from mllm_replica.worlds import samples

torch.set_num_threads(1)
KINDS = [('1', 'aim_1b_224'), ('1', 'clip_h_336_vecap'), ('4', 'mm1_3b_chat'), ('4', 'mm1_7b_moe'), ('connectors', 'att_random_half'),
         ('connectors', 'resampler_full'), ('fig4', 'cabs_224_64'), ('fig5', 'c_ratios'), ('fig6_7', 'lr_slope'), ('fig7', 'res_1344'), ('fig7', 'length_0')]


@pytest.mark.parametrize('table,row', KINDS)
def test_one_unit_of_every_kind(table, row, tmp_path):
    result = run_unit(recipe(table, row, 'smoke', 0), tmp_path)
    columns = {c.key for c in load_table('mm1', table).replication['tiny'].columns}
    assert set(result.metrics) == columns - ({'evenness'} if 'chat' in row else set())


def test_tables_that_run():
    assert tables('tiny') == list(_TINY) and tables('paper') == ['1', '3', '4', 'fig4', 'fig5']


def test_rows_of_figure_4_differ_in_one_thing_each():
    made = {row: recipe('fig4', row, 'tiny', 1) for row in rows('fig4', 'tiny')}
    assert len({r.digest() for r in made.values()}) == 12
    base = made['cabs_336_144']
    assert made['cabs_336_64'].model | {'connector': base.model['connector']} == base.model
    assert made['cabs_224_144'].model | {'vision': base.model['vision']} == base.model
    assert all(r.sources == base.sources and r.stages == base.stages for r in made.values())
    assert recipe('connectors', 'cabs_full', 'tiny', 1).digest() == base.digest()


def test_mixtures_fill_the_positions_they_are_meant_to():
    weights, batch = page_mixture(45, 45, 10)
    made = recipe('fig5', 'c_ratios', 'tiny', 1)
    _, processor = build(recipe('fig5', 'c_ratios', 'smoke', 1))
    lengths = {kind: [len(processor.encode(s)) for s in samples('pages', 'train', 0, 600, **made.sources[kind].options)] for kind in weights}
    positions = {kind: weights[kind] * sum(found) / len(found) for kind, found in lengths.items()}
    shares = {kind: found / sum(positions.values()) for kind, found in positions.items()}
    assert shares == pytest.approx({'caption': 0.45, 'interleaved': 0.45, 'text': 0.1}, abs=0.01)
    assert batch * sum(positions.values()) / sum(weights.values()) == pytest.approx(2048, rel=0.02)


def test_skills_are_asked_without_a_picture():
    for task in ('fact', 'copy'):
        source = recipe('fig5', 'c_ratios', 'tiny', 1).sources[f'test_{task}']
        assert not next(samples('pages', 'test', 1, 1, **source.options))['images']


def test_mixtures_that_say_the_same_are_one_unit():
    assert recipe('fig5', 'a_100_0', 'tiny', 1).digest() == recipe('fig5', 'b_caption', 'tiny', 1).digest()
    assert recipe('fig5', 'a_0_100', 'tiny', 1).digest() == recipe('fig5', 'b_inter', 'tiny', 1).digest()


def test_rows_start_from_the_same_weights():
    first, second = (build(recipe('fig5', row, 'smoke', 3))[0].state_dict() for row in ('c_ratios', 'a_0_100'))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(recipe('1', 'aim_1b_224', 'smoke', 3))[0].state_dict()
    same = {name.split('.')[0] for name in first if first[name].shape == other[name].shape and torch.equal(first[name], other[name])}
    sheets = [build(recipe('fig4', row, 'smoke', 3))[0].language_model.state_dict() for row in ('avg_336_64', 'cabs_224_144')]
    assert all(torch.equal(sheets[0][name], sheets[1][name]) for name in sheets[0])
    assert 'language_model' in same and not torch.equal(first['vision_model.post_layernorm.weight'], other['vision_model.post_layernorm.weight'])


@pytest.mark.parametrize('row,billions', [('mm1_3b_chat', 2.94), ('mm1_30b_chat', 30.1), ('mm1_3b_moe', 63.9), ('mm1_7b_moe', 47.0)])
def test_models_of_the_paper_are_planned(row, billions):
    unit, = plan('mm1', '4', 'paper', rows=[row]).units
    pretrain, tune = unit.stages
    assert unit.parameters / 1e9 == pytest.approx(billions + 0.66, abs=0.05) and unit.visual_tokens == 144
    assert pretrain.tokens == 200_000 * 512 * 4096 and tune.length == 2048
    assert all(sum(s.memory.values()) < 80 for s in unit.stages) == (row == 'mm1_3b_chat')
    assert 'only the number of parameters is published' in ' '.join(plan('mm1', '4', 'paper', rows=['mm1_3b_chat']).assumptions)


def test_weights_are_not_downloaded():
    with pytest.raises(NotImplementedError, match='planned only'): build(recipe('4', 'mm1_3b_chat', 'paper', 1))


def test_demonstrations_are_of_the_test_split_and_topic():
    for shots in SHOTS:
        sample = next(samples('pages', 'test', 1, 1, tasks=['shots'], kind='interleaved', images=[shots + 1] * 2))
        scene = json.loads(sample['meta'])
        assert len(sample['images']) == shots + 1 and sample['answer'] == scene['pictures'][-1][scene['topic']] and sample['answer'] in documents.WORDS


def test_tags_name_the_cell_of_every_patch():
    class Still(torch.nn.Module):
        "An encoder that has learnt nothing."
        config = type('Config', (), {'hidden_size': 8})
        post_layernorm = torch.nn.Identity()
        def forward(self, pixel_values): return type('Out', (), {'last_hidden_state': pixel_values})
    tags = CellTags(Still(), 10)
    labels = torch.tensor([[-100, 1, 2, 3, 4, 5, 6, 7, 8]])
    patches = torch.zeros(1, 17, 8)
    with torch.no_grad():
        tags.names.weight.zero_()
        tags.names.bias.zero_()
        assert tags(patches, labels).loss.item() == pytest.approx(torch.log(torch.tensor(10.)).item(), abs=1e-5)
        for cell in range(4): patches[0, [1 + 8 * (cell // 2) + 2 * (cell % 2) + d for d in (0, 1, 4, 5)], cell] = 50.0
        for cell in range(4): tags.names.weight[1 + cell, cell] = tags.names.weight[10 + 5 + cell, cell] = 1.0
        assert tags(patches, labels).loss.item() < 1e-3
