"""Result files and what is shown of them."""

import json
import os
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from datasets import Dataset
from matplotlib.text import Text
from toys import RECORD

from mllm_replica.core.registry import PAPERS, recipes_of
from mllm_replica.running.show import curve_figure, predictions_figure, samples_figure
from mllm_replica.running.study import search_figure
from mllm_replica.tables import results, validity
from mllm_replica.tables.effects import effects_figure
from mllm_replica.tables.published import load_table, tables_of
from mllm_replica.tables.plain import as_json
from mllm_replica.tables.readme import matrix
from mllm_replica.tables.report import (
    escape,
    figure,
    markdown,
    png,
    scales_run,
    table_frame,
    verdict_frame,
    verdicts,
)
from mllm_replica.tables.reporting import own_frame, own_verdicts
from mllm_replica.tables.results import Record, read_results, results_path, summary, write_results

SPATIAL = dict(resampler_144=0.35, cabs_144=0.62, linear_256=0.60, resampler_256=0.37, cabs_256=0.71)


@pytest.fixture
def project(unrun):
    "Nothing has been run."
    return unrun


def record(row='cabs_144', seed=10, metric='spatial', value=0.5, **more):
    return Record(**RECORD | dict(row=row, seed=seed, metric=metric, value=value) | more)


def run(rows=SPATIAL, seeds=(10, 11, 12)):
    return [
        record(row, seed, metric, value + 0.01 * (seed % 3) * noise)
        for row, score in rows.items()
        for seed in seeds
        for metric, value, noise in (
            ('spatial', score, 1),
            ('easy_vqa', 1.2 - score, 1),
            ('control', 0.99, 0),
            ('gflop_step', 5 + 3 * ('256' in row) + score / 100, 0),
        )
    ]


def test_values_survive_the_file_exactly(project):
    given = [(0.1 + 0.2, 7), (1e-300, None), (-0.0, 0), (1 / 3, 10), (123456789.123456789, 1)]
    awkward = [record(value=v, seed=s, n_eval=n) for s, (v, n) in enumerate(given)]
    path = write_results('honeybee', '3', 'tiny', awkward)
    assert read_results('honeybee', '3', 'tiny') == awkward
    assert (
        path == results_path('honeybee', '3', 'tiny') and path.name == '3.tiny.csv' and b'\r' not in path.read_bytes()
    )


def test_writing_is_idempotent_and_ordered(project):
    path = write_results('honeybee', '3', 'tiny', run())
    before = path.read_bytes()
    write_results('honeybee', '3', 'tiny', run()[::-1][:4])
    rows = list(dict.fromkeys(r.row for r in read_results('honeybee', '3', 'tiny')))
    assert rows == [r.key for r in load_table('honeybee', '3').rows if r.key in SPATIAL]
    write_results('honeybee', '3', 'tiny', run())
    assert path.read_bytes() == before


def test_an_earlier_design_goes_when_its_row_is_run_again(project):
    from mllm_replica.running.publish import write_records

    def now(row, seed):
        return recipes_of('honeybee').recipe('5d', row, 'tiny', seed)

    old, kept = (
        record(row, 10, 'open', 0.1, table='5d', digest=digest)
        for row, digest in (('multi_turn', 'another recipe'), ('single_turn', 'another recipe'))
    )
    same, foreign = (
        record('multi_turn', seed, 'open', 0.2, table='5d', digest=now('multi_turn', seed).digest())
        for seed in (21, 11)
    )  # the table has not locked seed 11
    write_results('honeybee', '5d', 'tiny', [old, kept, same, foreign])
    (project / 'unit').mkdir()
    (project / 'unit/result.json').touch()
    (project / 'unit/commit').write_text('abc123+')
    metrics = {name: SimpleNamespace(value=value, n=500) for name, value in (('open', 0.4), ('dots', 0.8))}
    found = SimpleNamespace(digest='x', seconds=1.0, metrics=metrics, processor='p', threads=1, versions={'torch': '2'})
    order = SimpleNamespace(unit_key='new', folder=project / 'unit', result=lambda: found)
    with pytest.raises(ValueError, match='abc123[+], which nobody else can check out'):
        write_records('honeybee', '5d', 'tiny', [(now('multi_turn', 20), order)], own=False)
    assert write_records('honeybee', '5d', 'tiny', [(now('multi_turn', 20), order)]).is_relative_to(project / 'runs')
    (project / 'unit/commit').write_text('abc123')
    write_records('honeybee', '5d', 'tiny', [(now('multi_turn', 20), order)], own=False)
    found = {(r.row, r.seed, r.metric): r.value for r in read_results('honeybee', '5d', 'tiny')}
    assert found == {
        ('single_turn', 10, 'open'): 0.1,
        ('multi_turn', 21, 'open'): 0.2,
        ('multi_turn', 20, 'open'): 0.4,
        ('multi_turn', 20, 'dots'): 0.8,
        ('multi_turn', 20, 'single_turn'): pytest.approx(0.6),
    }  # a column that is the mean of the two


def test_a_unit_is_replaced_as_a_whole(project):
    write_results('honeybee', '3', 'tiny', run())
    write_results('honeybee', '3', 'tiny', [record(value=0.9, unit='new')])
    assert [
        (r.metric, r.value) for r in read_results('honeybee', '3', 'tiny') if (r.row, r.seed) == ('cabs_144', 10)
    ] == [('spatial', 0.9)]


def test_an_interrupted_write_leaves_the_old_file(project, monkeypatch):
    path = write_results('honeybee', '3', 'tiny', run())
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='No space'):
        write_results('honeybee', '3', 'tiny', [record(value=0.9)])
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    'old, new, message',
    [
        ('3,cabs_144', '3,cabs_145', "has no row 'cabs_145'"),
        ('3,cabs_144', '4,cabs_144', 'belongs to table 4'),
        (',tiny,', ',paper,', 'belongs to table 3 at paper'),
        (',0.5,', ',nan,', 'value'),
        (',0.5,', ',much,', 'value'),
        (',0.5,', ',,', 'value'),
        (',10,', ',ten,', 'seed'),
        ('2025-01-01', '2025-13-01', 'date'),
        (',61.5', ',-1', 'seconds'),
        ('abc123', 'abc123,more', 'line 2'),
        ('seed', 'sede', 'has the columns'),
    ],
)
def test_spoilt_files_are_refused_with_their_place(project, old, new, message):
    path = write_results('honeybee', '3', 'tiny', [record()])
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match='3.tiny.csv') as error:
        read_results('honeybee', '3', 'tiny')
    assert message in str(error.value)


def test_doubled_and_torn_lines_are_refused(project):
    path = write_results('honeybee', '3', 'tiny', [record()])
    head, line = path.read_text().splitlines()
    path.write_text('\n'.join([head, line, line]))
    with pytest.raises(ValueError, match='line 3.*already given'):
        read_results('honeybee', '3', 'tiny')
    path.write_text(f'{head}\n{line[:30]}')
    with pytest.raises(ValueError, match='line 2'):
        read_results('honeybee', '3', 'tiny')


def test_records_of_another_table_are_not_written(project):
    with pytest.raises(ValueError, match='does not belong into 4.tiny.csv'):
        write_results('honeybee', '4', 'tiny', [record()])
    assert not results_path('honeybee', '4', 'tiny').exists()


def test_summary(project):
    line = summary(run())['cabs_144', 'spatial']
    assert line.mean == pytest.approx(0.63) and line.n == 3 and line.low < 0.63 < line.high


def test_published_beside_replicated(project):
    write_results('honeybee', '3', 'tiny', run())
    frame = table_frame('honeybee', '3', 'tiny')
    line = frame.loc['B3 C-Abstractor M=144']
    ours = line['replicated at tiny']
    assert line['published', 'AvgN'] == '53.5' and ours['spatial mean'].startswith('0.630 [') and ours['seeds'] == '3'
    assert frame.loc['B1 Linear M=144', ('replicated at tiny', 'spatial mean')] == '–'
    assert not {n for h, n in frame.columns if h != 'published'} & {c.name for c in load_table('honeybee', '3').columns}


def test_verdicts_read_the_files(project):
    assert {v.word for v in verdicts('honeybee', '3', 'tiny')} == {'not run', 'counted'}  # at the published sizes
    write_results('honeybee', '3', 'tiny', run())
    words = {v.claim.id: v.word for v in verdicts('honeybee', '3', 'tiny')}
    assert (words['resampler-weak-144'], words['step-time-follows-M']) == ('supported', 'counted')
    shown = verdict_frame('honeybee', '3', 'tiny')
    differences = shown['difference [95 % interval]']
    assert (
        'cabs_144.spatial > resampler_144.spatial: by 0.270' in differences[0]
        and not differences.str.contains('avg_n|s_per_step').any()
    )


def test_every_claim_is_judged_on_both_readings(project):
    write_results('honeybee', '3', 'tiny', run())
    shown = verdict_frame('honeybee', '3', 'tiny')
    assert shown['verdict at tiny'].tolist() == ['supported', 'supported', 'supported', 'counted']
    assert shown['verdict on easy-VQA'].tolist() == [
        'contradicted',
        'contradicted',
        'supported',
        '–',
    ]  # the last one counts cost only
    assert 'cabs_144.easy_vqa > resampler_144.easy_vqa: by -0.270' in shown['difference [95 % interval]'][0]
    assert [v.word for v in verdicts('honeybee', '3', 'tiny', 'easy-VQA')][3] == 'counted'
    assert shown['false ones'].tolist()[3] == '–' and float(shown['false ones'][0]) < 0.05
    assert '3 supported, 1 counted; easy-VQA: 1 supported, 2 contradicted' in next(
        x for x in matrix().splitlines() if x.startswith('| Honeybee | 3 |')
    )
    assert not [c for c in verdict_frame('honeybee', 'fig9', 'tiny').columns if c.startswith('verdict on')]


def test_smoke_stays_out_of_the_papers(project):
    path = write_results('honeybee', '3', 'smoke', [record(scale='smoke')])
    assert (
        path == project / 'runs' / 'results' / 'honeybee' / '3.smoke.csv'
        and len(read_results('honeybee', '3', 'smoke')) == 1
    )
    assert (
        not list((project / 'papers').rglob('results'))
        and scales_run('honeybee', '3') == ['smoke']
        and 'smoke' not in matrix()
    )
    with pytest.raises(KeyError, match='unknown paper'):
        results_path('nobody', '3', 'smoke')


def test_contradictions_inside_a_paper_are_shown():
    assert 'contradicted by its own table' in set(verdict_frame('owl3', '7', 'tiny')['published numbers'])


def test_stale_rows_are_marked(project, monkeypatch):
    for module in ('report', 'plain', 'readme'):
        monkeypatch.setattr(f'mllm_replica.tables.{module}.stale', validity.stale)
    digests = {'cabs_144': 'other', 'linear_256': 'digest', 'cabs_256': 'digest', 'resampler_256': 'digest'}

    def recipe(table, row, scale, seed):
        return SimpleNamespace(digest=lambda: digests[row])

    monkeypatch.setattr(validity, 'recipes_of', lambda paper: SimpleNamespace(recipe=recipe))
    monkeypatch.setattr(validity, 'code_of', lambda recipe: 'source')
    others = [record('linear_256'), record('cabs_256', code='older'), record('resampler_256', code=results.LOST)]
    write_results('honeybee', '3', 'tiny', [record('cabs_144'), record('resampler_144'), *others])
    reasons = {
        'cabs_144': 'its recipe has changed',
        'resampler_144': 'it has no recipe any more',
        'cabs_256': 'the code has changed and is not verified',
        'resampler_256': 'the code that gave it is lost',
    }
    assert validity.stale('honeybee', read_results('honeybee', '3', 'tiny')) == reasons
    marked = [label for label in table_frame('honeybee', '3', 'tiny').index if label.endswith('†')]
    assert len(marked) == 4 and 'tiny †' in matrix()
    assert [
        u['stale'] for u in as_json('honeybee')['honeybee']['tables']['3']['replicated']['tiny']['provenance']
    ].count(None) == 1
    step = dict(commit='c', processor='p', torch='2', canaries=1, date='2026-01-01')
    validity.append_ledger('honeybee', [validity.Verification(before='older', after='middle', **step)])
    assert 'cabs_256' in validity.stale('honeybee', read_results('honeybee', '3', 'tiny'))
    validity.append_ledger('honeybee', [validity.Verification(before='middle', after='source', **step)])
    assert 'cabs_256' not in validity.stale('honeybee', read_results('honeybee', '3', 'tiny'))


def test_matrix_has_a_line_per_table(project):
    assert len(matrix().splitlines()) == 2 + sum(len(tables_of(p)) for p in PAPERS)
    write_results('honeybee', '3', 'tiny', run())
    write_results('honeybee', '3', 'smoke', [r.model_copy(update={'scale': 'smoke'}) for r in run(seeds=(0,))])
    line = [x for x in matrix().splitlines() if x.startswith('| Honeybee | 3 |')]
    assert len(line) == 1 and '| tiny | 5 of 6, 3 seeds |' in line[0] and 'supported' in line[0]


def test_json_is_plain_and_complete(project):
    write_results('honeybee', '3', 'tiny', run())
    found = json.loads(json.dumps(as_json(), allow_nan=False))
    assert set(found) == set(PAPERS)
    table = found['honeybee']['tables']['3']
    assert (
        table['rows'][2]['values']['avg_n'] == 53.5
        and table['replicated']['tiny']['cells']['cabs_144']['spatial']['n_eval'] == 1000
    )
    judged = table['claims'][0]['verdicts']['tiny']
    assert (
        judged['verdict'] == 'supported'
        and judged['also']['easy-VQA']['verdict'] == 'contradicted'
        and len(table['replicated']['tiny']['provenance']) == 15
    )
    assert (
        found['owl2']['tables']['1']['replicated'] == {}
        and 'tiny' in found['owl2']['tables']['1']['claims'][0]['verdicts']
    )


def test_an_own_run_stands_beside_the_committed_one(project):
    write_results('honeybee', '3', 'tiny', run())
    assert own_frame('honeybee', '3', 'tiny').empty
    mine = [r for r in run(seeds=(10, 11)) if r.row != 'cabs_256']
    mine[0] = mine[0].model_copy(update={'value': mine[0].value + 0.25})
    write_results('honeybee', '3', 'tiny', mine, own=True)
    found = own_frame('honeybee', '3', 'tiny').reset_index()
    assert set(found['row']) == {'B2 Resampler M=144', 'B3 C-Abstractor M=144', 'B4 Linear M=256', 'B5 Resampler M=256'}
    first = found[(found['row'] == 'B2 Resampler M=144') & (found['measured'] == 'spatial mean')].iloc[0]
    assert first['same digits'] == '1 of 2 seeds' and first['ours'] != first['yours']
    judged = own_verdicts('honeybee', '3', 'tiny')
    assert judged.loc['resampler-weak-144', 'ours'] == 'supported'
    assert list(judged['agree']) == [
        'yes' if a == b else 'no' for a, b in zip(judged['ours, your rows and seeds'], judged['yours'])
    ]
    assert judged.loc['resampler-weak-256', 'yours'] == 'not run'
    assert [scales_run('honeybee', 'fig9', own) for own in (False, True)] == [[], []]
    assert len(read_results('honeybee', '3', 'tiny')) == len(run())  # the committed ones stay


def test_paper_scale_judges_cells(project):
    ours = [
        record('cabs_144', metric='avg_n', value=53.6, scale='paper'),
        record('cabs_144', metric='mme_pos', value=145.2, scale='paper'),
        record('cabs_144', metric='s_per_step', value=2.5, scale='paper'),
        record('cabs_144', metric='questions.mme', value=0.7, scale='paper'),
        record('cabs_256', metric='avg_n', value=46.0, scale='paper'),
    ]
    write_results('honeybee', '3', 'paper', ours)
    frame = table_frame('honeybee', '3', 'paper')
    line = frame.loc['B3 C-Abstractor M=144', 'replicated at paper']
    assert line['AvgN'] == '53.6 (one seed) match' and line['MME POS'] == '145.2 (one seed) near'
    assert line['s/step'] == '2.500 (one seed)' and '0.7' not in ' '.join(map(str, line))
    assert frame.loc['B6 C-Abstractor M=256', ('replicated at paper', 'AvgN')].endswith('differs')
    cells = as_json('honeybee')['honeybee']['tables']['3']['replicated']['paper']['cells']['cabs_144']
    assert {name: cell.get('verdict') for name, cell in cells.items()} == {
        'avg_n': 'match',
        'mme_pos': 'near',
        's_per_step': 'not run',
        'questions.mme': None,
    }


@pytest.mark.parametrize(
    'paper, key', [('honeybee', k) for k in ('3', '4', '5a', '9', 'fig9')] + [('owl2', '7'), ('owl2', '15')]
)
def test_figures_print_the_scale_and_keep_names_apart(project, paper, key):
    if key == '3':
        write_results('honeybee', '3', 'tiny', run())
    found, table = figure(paper, key, 'tiny'), load_table(paper, key)
    assert 'scale tiny' in found.get_suptitle()
    for ax in found.axes:
        if ax.get_visible() and ax.get_title(loc='left') != 'published':
            assert ax.get_xlabel().split('  (')[0] not in {c.name for c in table.columns}
    assert len(png(found)) < 60_000


def test_figure_shows_control_and_real_pictures_beside_the_mean(project):
    write_results('honeybee', '3', 'tiny', run())
    found = {ax.get_xlabel().split('  (')[0]: ax.get_title(loc='left') for ax in figure('honeybee', '3', 'tiny').axes}
    assert found['spatial mean'].endswith('grey: ◇ bright or dark, △ easy-VQA') and not {
        'bright or dark',
        'easy-VQA',
    } & set(found)
    assert [x for x in found if found[x] == 'published'] == ['AvgN', 's/step'] and 'relation of two tiles' in found


def test_markdown_shows_cells_as_they_are():
    frame = table_frame('honeybee', '3', 'tiny')[['published']].head(6)
    frame.index = ['a|b', '<img src=x>', '*x*', '_y_', 'line\nbreak', 'c_d']
    lines = markdown(frame).splitlines()
    assert len(lines) == 8 and len({line.replace('\\|', '').count('|') for line in lines}) == 1
    assert escape('a|b') == 'a\\|b' and escape('_y_ c_d') == '\\_y\\_ c_d' and escape('<img>') == '&lt;img>'


def test_text_of_the_tables_is_drawn_as_it_is(project):
    "Two dollar signs are no mathematics: not in a title, not in names of rows and columns."
    path = project / 'papers' / 'honeybee' / 'tables' / 'table_3.yaml'
    strange = r'from $5 to $9_{ \frac'
    table = yaml.safe_load(path.read_text())
    table['title'] = strange
    for part in table['rows']:
        part['label'] = strange
    for part in table['columns']:
        part['name'] = strange
    path.write_text(yaml.safe_dump(table, allow_unicode=True, sort_keys=False))
    drawn = figure('honeybee', '3', 'tiny')
    assert png(drawn)
    shown = [text.get_text() for text in drawn.findobj(Text)]
    assert len({text for text in shown if text.count(r'\$') == 2}) >= 3


@pytest.mark.parametrize('text', ['$', 'from $5 to $9', r'$\frac', r'\$5 and \$6', '$$', '$^$_{'])
def test_text_of_the_data_is_drawn_as_it_is(text, tmp_path):
    sample = dict(id='s', images=[], conversations=[{'from': 'human', 'value': text}, {'from': 'gpt', 'value': text}])
    data = Dataset.from_list([sample | dict(document=None)])
    (tmp_path / 'p').write_text(json.dumps(dict(id='s', prediction=text, answer=text, correct=0.0)) + '\n')
    step = SimpleNamespace(step=1, stage=text, loss=0.5)
    frame = pd.DataFrame(
        [dict(round=0, added=text, set=text, chosen=True, seeds=1, low=0, high=1, mean=0.5, metric=text)]
    )
    effect = dict(factor=text, metric=text, mean=0.1, low=0.0, high=0.2, seeds=2, before='a', change=text, where=text)
    for drawn in (
        samples_figure(data),
        predictions_figure(data, tmp_path / 'p'),
        curve_figure([step, step]),
        search_figure(frame, text),
        effects_figure(pd.DataFrame([effect]), text),
    ):
        assert png(drawn)
        told = [part for part in drawn.findobj(Text) if '$' in part.get_text() and 'mathdefault' not in part.get_text()]
        assert told and not any(part._preprocess_math(part.get_text())[1] for part in told)
