"What confirming runs are judged by is written down before them, and every later change of it shows."

import subprocess

import pytest
import yaml
from typer.testing import CliRunner

from mllm_replica.cli import app
from mllm_replica.core.registry import PAPERS
from mllm_replica.core.settings import Trouble
from mllm_replica.running import runner
from mllm_replica.running.publish import write_records
from mllm_replica.tables.locks import (
    AFTER,
    BEFORE,
    check_locked,
    faults,
    lock_results,
    lock_table,
    lock_text,
    locks_path,
)
from mllm_replica.tables.locks import read_locks
from mllm_replica.tables.results import Record, read_results, write_results

TABLE = ('mm1', 'first', 'tiny')


@pytest.mark.parametrize('paper', PAPERS)
def test_every_table_is_what_it_has_locked(paper):
    assert faults(paper) == [] and len(read_locks(paper)) >= 5


@pytest.fixture
def toy(project):
    "The chapter of the project, and what is done to its table `first`."
    from toychapter import recipes

    class Toy:
        root, chapter, path = project.root, recipes, project.root / 'papers/mm1/tables/table_first.yaml'

        def change(self, change):
            "Edit the table."
            content = yaml.safe_load(self.path.read_text())
            change(content)
            self.path.write_text(yaml.safe_dump(content))

        def log(self, number):
            "A further line of the design log."
            with open(project.root / 'papers/mm1/design_log.md', 'a') as file:
                file.write(f'| {number} | first | what was tried | what it showed |\n')

        def measure(self, *seeds, rows=('wide', 'narrow'), table='first', **told):
            "Results of some seeds."
            same = dict(unit='k', code='c', seconds=1.0, processor='p', threads='1', torch='2', metric='toy', value=0.5)
            same |= dict(table=table, scale='tiny', commit='', date='2999-01-01T00:00:00+00:00') | told
            units = [recipes.recipe(table, row, 'tiny', seed) for row in rows for seed in seeds]
            records = [Record(row=unit.row, seed=unit.seed, digest=unit.digest(), **same) for unit in units]
            write_results('mm1', table, 'tiny', records)

        def git(self, *words):
            "What git says in the project."
            who = ['-c', 'user.name=t', '-c', 'user.email=t@t']
            done = subprocess.run(['git', '-C', project.root, *who, *words], capture_output=True, text=True, check=True)
            return done.stdout.strip()

    return Toy()


def shorter(recipe):
    "A recipe with fewer steps."
    stage = recipe.stages[0].model_copy(update=dict(steps=2))
    return recipe.model_copy(update=dict(stages=(stage,)))


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda t: t['claims'][0].update(test='narrow.acc > wide.acc + 0.1'), 'margins was nothing and is 0.1'),
        (lambda t: t['claims'][0].update(test='wide.acc > narrow.acc'), 'family was narrow.toy > wide.toy and is'),
        (lambda t: t['claims'][0].update(statement='the first is better'), 'statement was the second is better'),
        (
            lambda t: t['claims'][0]['scales'].update(tiny=dict(testable=False)),
            'test was narrow.acc > wide.acc and is nothing',
        ),
        (lambda t: t['replication']['tiny'].update(stands_for=dict(acc='size')), 'family was narrow.toy > wide.toy'),
        (lambda t: t['replication']['tiny'].update(control='toy'), "the control was '' and is 'toy'"),
        (lambda t: t['claims'].clear(), 'claim order is gone'),
        (
            lambda t: t['claims'].append(
                dict(id='again', statement='s', test=None, reason='none', holds_on_published_numbers=None)
            ),
            'claim again is new',
        ),
    ],
)
def test_a_changed_claim_shows(toy, change, message):
    lock_table(*TABLE, [10, 11], 'c')
    toy.measure(10, 11)
    assert faults('mm1') == []
    toy.change(change)
    assert any(message in fault for fault in faults('mm1')), faults('mm1')
    with pytest.raises(Trouble, match='is not what was locked'):
        check_locked([toy.chapter.recipe('first', 'wide', 'tiny', 10)])


def test_changed_recipes_and_rows_show(toy, monkeypatch):
    lock_table(*TABLE, [10, 11], 'c')
    toy.measure(10, 11)
    made, rows = toy.chapter.recipe, toy.chapter.rows
    monkeypatch.setattr(toy.chapter, 'recipe', lambda *unit: shorter(made(*unit)) if unit[1] == 'wide' else made(*unit))
    found = faults('mm1')
    assert (
        len(found) == 3 and 'row wide has another recipe' in found[0] and 'another recipe than the locked' in found[1]
    )
    with pytest.raises(Trouble, match='row wide has another recipe'):
        check_locked([toy.chapter.recipe('first', 'narrow', 'tiny', 10)])
    monkeypatch.setattr(toy.chapter, 'recipe', made)
    monkeypatch.setattr(toy.chapter, 'rows', lambda table, scale: rows(table, scale) | {'wide': 'no more'})
    assert 'row wide is gone' in faults('mm1')[0]
    monkeypatch.setattr(toy.chapter, 'rows', lambda table, scale: dict.fromkeys(rows(table, scale)))
    assert 'row other is new' in faults('mm1')[0]


def test_foreign_results_show(toy):
    toy.measure(10)
    assert 'has results and no entry' in faults('mm1')[0]
    lock_table(*TABLE, [11], 'c')
    assert faults('mm1') == [f'MM1 table first at tiny: row {row}, seed 10 is not locked' for row in ('wide', 'narrow')]


def test_results_older_than_their_entry_show(toy):
    lock_table(*TABLE, [10, 11], 'c')
    toy.measure(10, 11, date='2020-01-01T00:00:00+00:00')
    assert len(faults('mm1')) == 4 and 'before its entry of' in faults('mm1')[0]
    lock_results(*TABLE, 'c')  # what stands may be locked after it, and says so
    assert faults('mm1') == [] and lock_text(*TABLE, [10, 11]) == 'locked after the results'


def test_the_commit_of_a_result_has_its_entry(toy):
    toy.git('init', '-q')
    toy.git('add', 'papers')
    toy.git('commit', '-qm', 'before')
    before = toy.git('rev-parse', '--short=12', 'HEAD')
    lock_table(*TABLE, [10, 11], before)
    toy.git('add', 'papers')
    toy.git('commit', '-qm', 'locked')
    toy.measure(10, 11, commit=toy.git('rev-parse', '--short=12', 'HEAD'))
    assert faults('mm1') == []
    toy.measure(10, 11, commit=before)
    assert len(faults('mm1')) == 4 and f'at commit {before}, which does not have its entry' in faults('mm1')[0]


def test_only_fresh_seeds_are_locked(toy):
    toy.measure(10)
    toy.measure(20, table='second', rows=['wide'])  # the same experiment in another table
    for seeds, message in [
        ([3, 12], 'seeds 3 are for designing'),
        ([10, 12], 'seeds 10 have been used'),
        ([12, 20], 'seeds 20 have been used'),
    ]:
        with pytest.raises(Trouble, match=message):
            lock_table(*TABLE, seeds, 'c')
    with pytest.raises(Trouble, match='seeds 12 have been used'):
        lock_table(*TABLE, [12, 13], 'c', used=[12])
    with pytest.raises(Trouble, match='locked at tiny, sighted, small'):
        lock_table('mm1', 'first', 'smoke', [12], 'c')
    assert not locks_path('mm1').exists()


def test_an_entry_grows_by_fresh_seeds(toy):
    toy.measure(10, 11)
    lock_results(*TABLE, 'c')
    lock_table(*TABLE, [12, 13], 'c')
    lock = read_locks('mm1')['first', 'tiny']
    assert [(b.seeds, b.locked) for b in lock.batches] == [((10, 11), AFTER), ((12, 13), BEFORE)]
    with pytest.raises(Trouble, match='seeds 13 are locked already'):
        lock_table(*TABLE, [13, 14], 'c')
    toy.measure(12, 13)
    assert (
        lock_text(*TABLE, range(10, 14))
        == 'locked after the results: seeds 10, 11, locked before its runs: seeds 12, 13'
    )


def test_a_new_design_needs_a_line_in_the_log_and_fresh_seeds(toy, monkeypatch):
    lock_table(*TABLE, [10, 11], 'c')
    toy.change(lambda t: t['claims'][0].update(test='narrow.acc > wide.acc + 0.1'))
    lock_table(*TABLE, [12], 'c')  # nothing has run yet
    assert [b.seeds for b in read_locks('mm1')['first', 'tiny'].batches] == [(12,)]
    toy.measure(12)
    toy.change(lambda t: t['claims'][0].update(test='narrow.acc > wide.acc'))
    with pytest.raises(Trouble, match='design_log.md, then lock it with seeds that nobody has used'):
        lock_table(*TABLE, [13], 'c')
    toy.log(1)
    with pytest.raises(Trouble, match='seeds 12 have been used'):
        lock_table(*TABLE, [12, 13], 'c')
    lock_table(*TABLE, [13], 'c')
    assert len(faults('mm1')) == 2 and 'seed 12 is not locked' in faults('mm1')[0]
    unit = toy.chapter.recipe('first', 'wide', 'tiny', 13)
    monkeypatch.setattr('mllm_replica.running.publish._records', lambda *_: [])
    order = type('Order', (), {'unit_key': 'new'})
    write_records(*TABLE, [(unit, order), (toy.chapter.recipe('first', 'narrow', 'tiny', 13), order)], own=False)
    assert read_results(*TABLE) == []  # results of the old design go when the new ones are published


def test_a_damaged_file_is_told(toy):
    lock_table(*TABLE, [10], 'c')
    path = locks_path('mm1')
    for damaged in (
        '{"first": ',
        '{"first": {"tiny": {}}}',
        '[]',
        path.read_text().replace('before its runs', 'never'),
    ):
        path.write_text(damaged)
        with pytest.raises(Trouble, match='claims.lock is damaged'):
            read_locks('mm1')


def test_nothing_runs_that_is_not_locked(project, toy, monkeypatch):
    begun = []
    monkeypatch.setattr(runner, '_run', lambda plan, *_: begun.append((plan.study, [*plan.places.values()][0][0].seed)))

    def run(seed, **how):
        runner.run_tables('mm1', ['first'], 'tiny', rows=['wide'], seeds=[seed], pipeline=project.pipeline, **how)

    with pytest.raises(Trouble, match='lock mm1 first --scale tiny --seeds'):
        run(10)
    lock_table(*TABLE, [10, 11], 'c')
    with pytest.raises(Trouble, match='has not locked seeds 12'):
        run(12)
    assert begun == []
    run(3)
    run(10)
    run(12, report=False, study='s')
    assert begun == [('', 3), ('', 10), ('s', 12)]  # a study is not reported


def test_the_command(project, toy):
    def lock(*words):
        result = CliRunner().invoke(app, ['lock', 'mm1', 'first', '--scale', 'tiny', *words])
        return result.exit_code, ' '.join(result.output.split())

    code, said = lock('--seeds', '10-11')
    assert code == 0 and '1 of 1 claims with a test, 2 rows, seeds 10, 11, locked before its runs' in said
    key = next(iter(runner.make_plan('mm1', ['first'], 'tiny', ['wide'], [12]).places))
    unit = project.runs / 'units' / key  # finished and in no result file
    unit.mkdir(parents=True)
    (unit / 'result.json').touch()
    code, said = lock('--seeds', '12-13')
    assert code == 1 and 'seeds 12 have been used' in said
    for words in (['--seeds', '13', '--after-results'], []):
        code, said = lock(*words)
        assert code == 2 and 'either --seeds' in said
    code, said = lock('--after-results')
    assert code == 1 and 'has no published results' in said
