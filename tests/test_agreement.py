"""Pairs of rows in the published order, the forest of claims, and which tables are informative."""

import random

import numpy as np
import pytest
from toys import RECORD

from mllm_replica.core.registry import PAPERS
from mllm_replica.tables import agreement
from mllm_replica.tables.agreement import row_orders, row_pairs, share
from mllm_replica.tables.forest import claim_lines, forest, forest_figure
from mllm_replica.tables.informative import findings, seeds_for
from mllm_replica.tables.published import load_table, tables_of
from mllm_replica.tables.results import Record, read_results, write_results


def put(table, values, seeds=(10, 11, 12), metric='spatial', paper='honeybee', spread=0.01):
    "Results of rows, each with a recipe of its own by its name: row -> mean."
    draw = random.Random(0)
    lines = [
        Record(
            **RECORD | dict(row=row, seed=seed, metric=metric, table=table, digest=f'{row}{seed}'),
            value=value + spread * draw.random(),
        )
        for row, value in values.items()
        for seed in seeds
    ]
    write_results(paper, table, 'tiny', lines)


def test_what_is_built_in_by_construction_is_marked():
    for paper in PAPERS:
        for table in map(lambda key: load_table(paper, key), tables_of(paper)):
            scopes = {f'{c.id} at {scale}': scope for c in table.claims for scale, scope in c.scales.items()}
            for name, found in (scopes | table.replication).items():
                if 'by construction' in found.note and getattr(found, 'testable', True):
                    assert found.built_in, f'{paper} table {table.key} {name}: built in by construction, but not marked'


def test_pairs_follow_the_published_order(unrun):
    "Table 3: C-Abstractor above linear above resampler; a resampler that wins here agrees with nobody."
    put('3', dict(cabs_256=0.9, linear_256=0.7, resampler_256=0.5))
    assert row_pairs('honeybee', 'tiny')[['resolved', 'agrees']].values.tolist() == [[True, True]] * 3
    put('3', dict(cabs_256=0.5, linear_256=0.7, resampler_256=0.9))
    assert row_pairs('honeybee', 'tiny')['agrees'].tolist() == [False] * 3


def test_one_seed_resolves_nothing_and_no_difference_has_no_sign(unrun):
    put('3', dict(cabs_256=0.9, linear_256=0.7), seeds=(10,))
    assert row_pairs('honeybee', 'tiny')[['resolved', 'agrees']].values.tolist() == [[False, True]]
    put('3', dict(cabs_256=0.7, linear_256=0.7), spread=0)
    assert len(row_pairs('honeybee', 'tiny')) == 0


def test_a_pair_of_two_tables_counts_once_and_what_they_dispute_does_not(unrun):
    put('3', dict(cabs_256=0.9, linear_256=0.7))
    put('8', dict(cabs_256=0.9, linear_256=0.7))  # the same recipes, ordered alike
    found = row_pairs('honeybee', 'tiny')
    assert len(found) == 1 and found['group'].tolist() == ['3']
    put('3', dict(resampler_256=0.9, linear_256=0.7))
    table = load_table('honeybee', '8')
    assert table.cell('resampler_256', 'avg_n') < table.cell('linear_256', 'avg_n')
    put('7', dict(c7b_144=0.5, c7b_256=0.6))  # five published columns, one of ours
    assert len(row_pairs('honeybee', 'tiny').query('table == "7"')) == 1
    put('10', dict(gate=0.9, gate_norm=0.7), metric='video', paper='owl3')  # MVBench falls, VideoMME falls
    put('8', dict(hyper=0.9, pre_cross=0.7), metric='video', paper='owl3')  # MVBench falls, VideoMME rises
    assert row_pairs('owl3', 'tiny')['table'].tolist() == ['10']


def test_counts_and_tables_without_a_testable_claim_are_left_out(unrun):
    put('3', dict(cabs_256=3.0, linear_256=4.0), metric='gflop_step')
    assert len(row_pairs('honeybee', 'tiny')) == 0
    path = unrun / 'papers/honeybee/tables/table_3.yaml'
    put('3', dict(cabs_256=0.9, linear_256=0.7))
    assert len(row_pairs('honeybee', 'tiny')) == 1
    path.write_text(path.read_text().replace('testable: true', 'testable: false'))
    assert len(row_pairs('honeybee', 'tiny')) == 0


def test_an_order_of_rows_is_compared_whole(unrun):
    rows = ['resampler_144', 'resampler_256', 'linear_256', 'cabs_144', 'cabs_256']  # as published, ascending
    put('3', {row: n / 10 for n, row in enumerate(rows)})
    assert row_orders('honeybee', 'tiny')['tau'].tolist() == pytest.approx([1.0])
    put('3', {row: -n / 10 for n, row in enumerate(rows)})
    assert row_orders('honeybee', 'tiny')['tau'].tolist() == pytest.approx([-1.0])
    put('3', dict.fromkeys(rows, 0.5), spread=0)
    assert row_orders('honeybee', 'tiny')['tau'].tolist() == [0.0]


@pytest.mark.parametrize(
    'rows, groups', [((3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5, 12), 12), ((5,) * 8, 8), ((5, 6, 5, 6, 5), 5)]
)
@pytest.mark.parametrize('worlds', [300, pytest.param(4000, marks=pytest.mark.nightly)])
def test_the_interval_holds_what_random_orders_share(rows, groups, worlds):
    "Tables whose rows are ordered at random: half of their pairs agree in the long run, and the pairs of a table rise and fall together."
    draw, held = np.random.default_rng(0), []
    for _ in range(worlds):
        agrees, names = [], []
        for name, n in enumerate(rows):
            order = draw.permutation(n)
            agrees += [
                order[a] < order[b] for a in range(n) for b in range(a + 1, n)
            ] * 2  # two columns that say the same
            names += [name] * n * (n - 1)
        found = share(agrees, names)
        assert found.groups == groups
        held.append(found.low <= 0.5 <= found.high)
    assert np.mean(held) >= (0.93 if worlds > 300 else 0.92), np.mean(held)


def test_a_plain_proportion_would_be_too_sure():
    groups = [f'{n // 20}' for n in range(120)]
    wide, plain = (share([n // 20 % 2 == 0 for n in range(120)], of) for of in (groups, list(map(str, range(120)))))
    assert wide.high - wide.low > 3 * (plain.high - plain.low)


def test_seeds_fall_with_the_effect_and_rise_with_the_family():
    found = [seeds_for(x) for x in (0.2, 0.3, 0.5, 1, 2, 5)]
    assert found == sorted(found, reverse=True) and found[-1] >= 2
    assert seeds_for(0.5, 0.025 / 8) > seeds_for(0.5)
    assert seeds_for(0.0) is None and seeds_for(-1.0) == seeds_for(1.0)


def test_a_row_that_has_learnt_nothing_informs_of_nothing(unrun, monkeypatch):
    "Below the blind baseline a C-Abstractor is no better than a resampler, whatever the interval says."
    monkeypatch.setattr('mllm_replica.tables.informative.blind_line', lambda *cell: 0.27)
    put('3', dict(cabs_144=0.31, resampler_144=0.28), metric='spatial', spread=0.001)
    put('3', dict(cabs_144=0.9, resampler_144=0.7), spread=0.001)
    write_control('3', ('cabs_144', 'resampler_144'))
    good = {f.claim: f for f in findings('honeybee', '3', 'tiny')}['resampler-weak-144']
    assert good.reason == 'built in'
    put('3', dict(cabs_144=0.31, resampler_144=0.28), spread=0.001)
    write_control('3', ('cabs_144', 'resampler_144'))
    bad = {f.claim: f for f in findings('honeybee', '3', 'tiny')}['resampler-weak-144']
    assert bad.reason.startswith('not learnt: cabs_144, resampler_144')


def write_control(table, rows):
    "The rows' results with a solved control beside them."
    known = read_results('honeybee', table, 'tiny')
    more = [r.model_copy(update=dict(metric='control', value=1.0)) for r in known if r.row in rows]
    write_results('honeybee', table, 'tiny', known + more)


def test_an_unsolved_control_is_no_equivalence(unrun):
    "Where the control is not solved the claim is inconclusive, and no number of seeds mends that."
    put('3', dict(cabs_144=0.9, resampler_144=0.7), spread=0.001)
    found = {f.claim: f for f in findings('honeybee', '3', 'tiny')}['resampler-weak-144']
    assert (found.word, found.seeds) == ('inconclusive', '')


def test_claims_that_are_not_run_are_not_drawn(unrun):
    put('3', dict(cabs_256=0.9, linear_256=0.7))
    write_control('3', ('cabs_256', 'linear_256'))
    assert [line.claim for line in claim_lines('honeybee', '3', 'tiny')] == []  # each claim lacks a row
    put('3', dict(cabs_144=0.9, resampler_144=0.7))
    write_control('3', ('cabs_144', 'resampler_144'))
    lines = claim_lines('honeybee', '3', 'tiny')
    assert {line.claim: line.built_in for line in lines} == {
        'resampler-weak-144': True,
        'fewer-tokens-still-better': False,
    }
    figure = forest_figure(forest('tiny'), 'one $claim$')
    assert any('resampler-weak-144' in text.get_text() for ax in figure.axes for text in ax.get_yticklabels())


def test_nothing_run_is_nothing_said(unrun):
    assert agreement.scales_compared() == []
    assert agreement.agreement('tiny').empty and agreement.orders_table().empty
    assert forest('tiny').empty and findings('honeybee', '3', 'tiny') == []
