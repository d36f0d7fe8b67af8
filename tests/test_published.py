"""Published tables: faithful, strict, and never under a false name."""

import math

import pytest
import yaml

from mllm_replica.core import reading
from mllm_replica.core.registry import PAPERS
from mllm_replica.core.settings import project_root
from mllm_replica.tables.published import Table, load_paper, load_table, tables_of

ALL = [(paper, key) for paper in PAPERS for key in tables_of(paper)]
GIVEN = project_root().parent / 'shared'


@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project folder with one table, which the tests spoil."
    (tmp_path / 'papers' / 'owl2' / 'tables').mkdir(parents=True)
    (tmp_path / 'settings.ini').touch()
    monkeypatch.setenv('MLLM_REPLICA_ROOT', str(tmp_path))
    project_root.cache_clear()
    yield tmp_path / 'papers' / 'owl2' / 'tables' / 'table_1.yaml'
    monkeypatch.undo()
    project_root.cache_clear()


GOOD = """paper: owl2
table: '1'
arxiv: 1.2v1
title: t
source: s
status: complete
columns:
- {key: score, name: Score, better: higher, max: 100}
rows:
- {key: a, label: A, values: {score: 1.5}}
"""


def test_all_five_papers_have_tables():
    assert {p for p, _ in ALL} == set(PAPERS) and len(ALL) == 78
    for paper, key in ALL:
        assert load_table(paper, key).key == key


def test_order_of_the_paper():
    assert tables_of('owl2')[:3] == ['1', '2', '3'] and tables_of('owl2')[-2:] == ['fig3', 'fig5']


@pytest.mark.skipif(not (GIVEN / 'papers').is_dir(), reason='the given tables lie beside the repository, not in it')
def test_every_given_value_is_kept():
    "Tables as they were given, or as they were completed later."

    def title(text):
        return ' '.join(text.split()).split(', 3 connectors')[0]  # one was given another end

    ours = {(paper, title(load_table(paper, key).title)): load_table(paper, key) for paper, key in ALL}
    later = {(path.parts[-3], path.stem.removeprefix('table_')): path for path in GIVEN.glob('updates/*/tables/*.yaml')}
    compared, completed = 0, set()
    for path in GIVEN.glob('papers/*/tables/*.yaml'):
        given = yaml.safe_load(path.read_text())
        table = ours[given['paper'], title(given['title'])]
        if place := later.get((table.paper, table.key)):
            completed, given = completed | {place}, yaml.safe_load(place.read_text())
        found = {r.key: r.values for r in table.rows}
        assert (table.table, list(found)) == (given['table'], [r['key'] for r in given['rows']]), path
        for row in given['rows']:
            assert [(k, type(v), v) for k, v in row['values'].items()] == [
                (k, type(v), v) for k, v in found[row['key']].items()
            ], (path, row['key'])
            compared += len(row['values'])
    assert compared > 3000 and completed >= {
        place for (_, key), place in later.items() if key != 'fig7'
    }  # Figure 7 was not given before


def test_loads_what_is_right(project):
    project.write_text(GOOD)
    assert load_table('owl2', '1').cell('a', 'score') == 1.5


@pytest.mark.parametrize(
    'old, new, message',
    [
        ('score: 1.5', 'score: 150', 'outside 0'),
        ('score: 1.5', 'score: .nan', 'outside 0'),
        ('score: 1.5', 'score: 1.5, score: 2.5', "keys ['score'] given more than once"),
        ('score: 1.5', 'scores: 1.5', "has cells ['scores']"),
        ('score: 1.5', 'score: [1.5]', 'rows.0.values'),
        ('title: t', 'titel: t', 'titel'),
        ('status: complete', 'status: finished', 'status'),
        ('better: higher', 'better: bigger', 'better'),
        ('paper: owl2', 'paper: owl3', "says paper 'owl3'"),
        ('rows:', 'rows', 'table_1.yaml'),
        ('- {key: a, label: A, values: {score: 1.5}}', '- !!python/object/apply:os.getcwd []', 'table_1.yaml'),
        ('rows:', 'claims: [{id: c, statement: s, test: null}]\nrows:', 'a reason why there is none'),
        ('rows:', 'claims: [{id: c, statement: s, test: a.score > 1}]\nrows:', 'testable at tiny'),
        ('rows:', 'errata: [{cell: a.score, printed: 2, note: n}]\nrows:', 'the cell holds 1.5'),
        (
            'rows:',
            'replication: {tiny: {columns: [{key: own, name: Score}]}}\nrows:',
            'carry the name of a published column',
        ),
        (
            'rows:',
            'replication: {tiny: {columns: [{key: own, name: own}], stands_for: {score: other}}}\nrows:',
            'stands_for',
        ),
        ('rows:', 'replication: {tiny: {columns: [{key: own, name: own}], control: other}}\nrows:', "control 'other'"),
        (
            'rows:',
            'replication: {tiny: {columns: [{key: own, name: own}], also: {again: {stands_for: {score: other}}}}}\nrows:',
            'tiny also again stands_for',
        ),
        (
            'rows:',
            'replication: {tiny: {columns: [{key: own, name: own}], also: {again: {stands_for: {other: own}}}}}\nrows:',
            'tiny also again stands_for',
        ),
        (
            'rows:',
            'replication: {tiny: {columns: [{key: own, name: own}], also: {again: {stands_for: {}}}}}\nrows:',
            'tiny also again stands_for',
        ),
        (
            'rows:',
            'replication: {tiny: {columns: [{key: own, name: own}], also: {again: {note: n}}}}\nrows:',
            'also.again.stands_for',
        ),
    ],
)
def test_refuses_what_is_wrong(project, old, new, message):
    assert old in GOOD
    project.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match='table_1.yaml') as error:
        load_table('owl2', '1')
    assert message in str(error.value)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(KeyError, match='known: owl2, honeybee'):
        load_table('owl4', '1')
    with pytest.raises(KeyError, match='it has 1, 2, 3'):
        load_table('honeybee', '../../../settings')


def test_stand_ins_never_carry_a_benchmark_name():
    real = {c.name.lower() for p, k in ALL for c in load_table(p, k).columns}
    ours = [(p, k, c.name) for p, k in ALL for r in load_table(p, k).replication.values() for c in r.columns]
    assert ours and not [x for x in ours if x[2].lower() in real]


def test_means_agree_with_their_parts():
    "AvgN of Honeybee's tables is the mean of its columns, for every row that has them."
    for key in '5a', '5b', '5c', '5d', '8', '9', '10':
        for row in load_table('honeybee', key).rows:
            v = row.values
            assert math.isclose(v['avg_n'], (v['mmb'] + v['seed_i'] + v['mme_p'] / 20) / 3, abs_tol=0.11), (
                key,
                row.key,
            )


def test_papers():
    for paper in PAPERS:
        found = load_paper(paper)
        assert found.deviations and found.arxiv and all(d.ours for d in found.deviations)
    assert len(load_paper('honeybee').deviations) == 18
    assert load_paper('honeybee').code.commit == '68a8d84' and load_paper('mm1').code.repository is None


def test_smoke_and_small_measure_what_tiny_does():
    table: Table = load_table('honeybee', '3')
    assert table.measured('smoke') == table.measured('small') == table.replication['tiny']
    assert table.measured('paper').stands_for['avg_n'] == 'avg_n'
    assert load_table('owl2', '1').measured('tiny') is None


def test_tables_of_projectors_are_read_twice():
    for key in '3', '7', '8', '9':
        measured = load_table('honeybee', key).measured('tiny')
        assert measured.control == 'control' and set(measured.names('easy-VQA')) == set(measured.names())
        assert {measured.names()[c] for c, name in measured.names('easy-VQA').items() if name == 'easy_vqa'} == {
            'spatial'
        }
    with pytest.raises(KeyError, match="no reading 'photographs'"):
        measured.names('photographs')


def test_reading_uses_a_safe_loader():
    assert issubclass(reading._Loader, (yaml.SafeLoader, getattr(yaml, 'CSafeLoader', yaml.SafeLoader)))
