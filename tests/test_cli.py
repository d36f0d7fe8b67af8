"The command line: what it prints, what it refuses, and how it ends."

import json, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from toys import RECORD
from typer.testing import CliRunner

from mllm_replica.cli import app
from mllm_replica.core.registry import PAPERS, Chapter, Search
from mllm_replica.core.settings import project_root, settings
from mllm_replica.tables.published import load_table, tables_of

ROOT = Path(__file__).resolve().parent.parent


def call(*words: str):
    return CliRunner().invoke(app, [str(w) for w in words])


def said(result) -> str:
    return ' '.join(result.output.replace('│', ' ').split())


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A copy of the published tables without results, as the project folder."
    shutil.copytree(ROOT / 'papers', tmp_path / 'papers', ignore=shutil.ignore_patterns('results'))
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    monkeypatch.setenv('MLLM_REPLICA_ROOT', str(tmp_path))
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path / 'runs'))
    for module in ('report', 'plain', 'validity'):
        monkeypatch.setattr(f'mllm_replica.tables.{module}.stale', lambda paper, records: {})
    for cached in (project_root, settings):
        cached.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for cached in (project_root, settings):
        cached.cache_clear()


def with_chapter(monkeypatch, **given):
    "A chapter that gives this and nothing else, in place of every paper's."
    chapter = Chapter(**dict.fromkeys(('rows', 'tables', 'recipe', 'build', 'measure')) | given)
    monkeypatch.setattr('mllm_replica.core.registry.recipes_of', lambda paper: chapter)
    return chapter


@pytest.fixture
def recipes(monkeypatch):
    "A chapter of which two tables can run."

    def rows(table, scale):
        return (
            dict(cabs_144=None, linear_144='a linear projector keeps every token')
            if table in ('3', '8')
            else dict(cabs_144='no task yet')
        )

    return with_chapter(monkeypatch, tables=lambda scale: ['3', '8'] if scale != 'paper' else [], rows=rows)


@pytest.fixture
def imagined(project):
    "Results in which the C-Abstractor is far ahead on the spatial task."
    from mllm_replica.tables.results import Record, write_results

    write_results(
        'honeybee',
        '3',
        'tiny',
        [
            Record(**RECORD, row=row, metric=metric, seed=seed, value=value + seed / 100)
            for row, score in dict(resampler_144=0.35, cabs_144=0.62).items()
            for seed in (10, 11, 12)
            for metric, value in (('spatial', score), ('control', 0.97))
        ],
    )


# --- looking ----------------------------------------------------------------------------------------------------------------------------
def test_papers_and_tables():
    assert all(key in call('papers').output for key in PAPERS)
    data = json.loads(call('tables', 'mm1', '--json').output)
    assert [t['key'] for t in data['mm1']] == tables_of('mm1')
    rows = data['mm1'][0]['rows']
    assert rows and set(rows[0]) >= {'key', 'label', 'params', 'values'}


@pytest.mark.parametrize('paper', PAPERS)
def test_every_table_can_be_shown(paper):
    for table in tables_of(paper):
        result, t = call('show', paper, table), load_table(paper, table)
        assert result.exit_code == 0, result.output
        assert all(claim.id in result.output for claim in t.claims) and t.rows[0].key in result.output


@pytest.mark.parametrize(
    'words, message',
    [
        (['show', 'honeybe', '3'], 'Did you mean honeybee?'),
        (['show', 'honeybee', '55'], "no table of Honeybee '55'"),
        (['tables', 'llava'], 'There are: owl2, honeybee'),
        (['report', 'honeybee', 'x'], 'no table of Honeybee'),
        (['report', '--scale', 'tyni'], 'Did you mean tiny'),
    ],
)
def test_unknown_names_are_answered_with_near_ones(words, message):
    result = call(*words)
    assert result.exit_code == 2 and message in said(result)


def test_a_process_prints_plain_text_off_a_terminal_and_reads_no_settings_for_it(project):
    (project / 'settings.ini').write_text('[replication]\nscale = tinny\n')
    command = [sys.executable, '-c', 'from mllm_replica.cli import app; app()', 'papers']
    shown = subprocess.run(command, capture_output=True, cwd=project, text=True, check=True)
    assert '\x1b' not in shown.stdout and not shown.stderr and all(key in shown.stdout for key in PAPERS)
    assert (
        'doctor'
        in subprocess.run([*command[:-1], '--help'], capture_output=True, cwd=project, text=True, check=True).stdout
    )


def found_sets(exit_code):
    "A search that tried two sets."
    from mllm_replica.running.study import ROUNDS, Study

    frame = pd.DataFrame(
        [(0, '', 'clip', 'mean', 0.5, 0.4, 0.6, 2, True), (1, 'sam', 'clip, sam', 'mean', 0.7, 0.6, 0.8, 2, True)],
        columns=ROUNDS,
    )
    return Study('search by mean', 'mean', frame, [SimpleNamespace(exit_code=exit_code)], Path('search.csv'))


def test_search_starts_from_development_seeds_and_prints_its_rounds(monkeypatch):
    asked = []

    def find(search, scale, **options):
        asked.append((search, scale, options))
        return found_sets(exit_code=3)

    monkeypatch.setattr('mllm_replica.running.study.run_search', find)
    search = Search(start=('clip',), candidates=('sam',), recipe_of=None, metric='mean')
    with_chapter(monkeypatch, search=search)
    result = call('search', 'eagle', '--rounds', '1')
    assert result.exit_code == 3 and 'clip, sam' in said(result) and 'See search.csv' in said(result)
    call('search', 'eagle', '--seeds', '5,6', '--scale', 'smoke', '--metric', 'letter')
    (first, _, usual), (second, scale, told) = asked
    assert first is second is search and search.seeds == (0, 1, 2) and scale == 'smoke'
    assert (usual['seeds'], usual['metric'], usual['rounds']) == (None, None, 1)  # the search's own seeds and metric
    assert (told['seeds'], told['metric'], told['rounds']) == ((5, 6), 'letter', None)
    with_chapter(monkeypatch)
    refused = call('search', 'honeybee')
    assert refused.exit_code == 2 and 'nothing is searched for in Honeybee' in said(refused)


# --- running ----------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def runs(monkeypatch, recipes):
    "Every call of the runner, which ends as `runs.outcomes` says."
    from mllm_replica.running import runner
    from mllm_replica.running.worker import Outcome

    seen = SimpleNamespace(
        calls=[], outcomes=[Outcome(label='honeybee/3/cabs_144/tiny/10', unit_key='k', status='finished')]
    )

    def run_tables(paper, tables, scale, **options):
        seen.calls.append((paper, list(tables), scale, options))
        plan = runner.Plan(
            paper,
            scale,
            list(tables),
            places={'k': []},
            not_run={'3/linear_144': 'a linear projector keeps every token'},
        )
        return runner.Summary(plan, outcomes=seen.outcomes)

    monkeypatch.setattr(runner, 'run_tables', run_tables)
    return seen


def test_run_passes_on_what_it_was_told(runs):
    result = call(
        'run', 'honeybee', '3', '--scale', 'tiny', '--row', 'cabs_144', '--seeds', '10-12,20', '--workers', '1'
    )
    assert result.exit_code == 0, result.output
    paper, tables, scale, options = runs.calls[0]
    assert (paper, tables, scale, options['rows'], options['seeds'], options['workers'], options['engine']) == (
        'honeybee',
        ['3'],
        'tiny',
        ['cabs_144'],
        (10, 11, 12, 20),
        1,
        'local',
    )
    assert 'not run: 3/linear_144: a linear projector keeps every token' in result.output


def test_run_without_a_table_runs_all_that_can(runs):
    assert call('run', 'honeybee', '--scale', 'smoke').exit_code == 0
    assert runs.calls[0][1] == ['3', '8'] and runs.calls[0][3]['seeds'] is None


def test_run_without_a_table_searches_where_the_paper_does(runs, recipes, monkeypatch):
    asked = []

    def find(search, scale, **options):
        asked.append((search.metric, scale, options['seeds']))
        return found_sets(exit_code=3)

    monkeypatch.setattr('mllm_replica.running.study.run_search', find)
    search = Search(start=(), candidates=('sam',), recipe_of=None, metric='mean')
    with_chapter(monkeypatch, tables=recipes.tables, rows=recipes.rows, search=search)
    result = call('run', 'honeybee', '--scale', 'smoke', '--seeds', '10,11')
    assert result.exit_code == 3 and asked == [('mean', 'smoke', (10, 11))] and 'See search.csv' in said(result)
    assert call('run', 'honeybee', '3', '--scale', 'smoke').exit_code == 0 and len(asked) == 1


def test_a_failed_unit_is_told_and_ends_non_zero(runs):
    from mllm_replica.running.worker import Outcome

    runs.outcomes = [
        Outcome(
            label='honeybee/3/cabs_144/tiny/10', unit_key='k', status='failed', reason='cell 3 raised ZeroDivisionError'
        )
    ]
    result = call('run', 'honeybee', '3')
    assert result.exit_code == 1 and 'honeybee/3/cabs_144/tiny/10: cell 3 raised ZeroDivisionError' in result.output


@pytest.mark.parametrize(
    'words, message',
    [
        (['3', '--row', 'cabs'], 'Did you mean cabs_144'),
        (['3', '--row', 'linear_144'], 'keeps every token'),
        (['3', '--seeds', '1x'], 'like 10,11,12 or 10-14'),
        (['3', '--seeds', '14-10'], 'a range is empty'),
        (['3', '--workers', '0'], 'greater than or equal to 1'),
        (['--row', 'cabs_144'], '--row needs a TABLE'),
        (['3', '--engine', 'slurm'], 'There are: local, ray'),
        (['--scale', 'paper'], 'no table of Honeybee has a row'),
    ],
)
def test_nothing_starts_on_wrong_arguments(runs, words, message):
    result = call('run', 'honeybee', *words)
    assert result.exit_code == 2 and message in said(result) and not runs.calls


# --- reporting --------------------------------------------------------------------------------------------------------------------------
def test_report_without_results(project):
    result = call('report', 'honeybee')
    assert result.exit_code == 0 and result.output.startswith('Honeybee: not run: 1, 2, 3,')


def test_report_shows_both_sides_the_verdict_and_where_it_comes_from(imagined):
    result = call('report', 'honeybee', '3')
    assert result.exit_code == 0, result.output
    text = said(result)
    for part in (
        'published: AvgN',
        'replicated at tiny',
        '53.5',
        '0.730 [0.705, 0.755]',
        'resampler-weak-144',
        'supported',
        'not run',
        'verdict at tiny',
        'scale tiny; 1 units, seeds 10, 11, 12, 1000 questions per value',
        'commit abc123; locked after the results',
    ):
        assert part in text, part


def test_report_as_json(imagined):
    data = json.loads(call('report', 'honeybee', '3', '--json').output)
    table = data['honeybee']['tables']['3']
    assert table['replicated']['tiny']['cells']['cabs_144']['spatial']['n'] == 3
    assert {c['id']: c['verdicts']['tiny']['verdict'] for c in table['claims']}['resampler-weak-144'] == 'supported'
    assert (
        table['rows'][2]['values']['avg_n'] == 53.5
        and table['replicated']['tiny']['provenance'][0]['commit'] == 'abc123'
    )
    only = {
        scale: json.loads(call('report', 'honeybee', '3', '--json', '--scale', scale).output)
        for scale in ('tiny', 'smoke')
    }
    smoke = only['smoke']['honeybee']['tables']['3']
    assert only['tiny'] == data and not smoke['replicated'] and not any(c['verdicts'] for c in smoke['claims'])


# --- the machine ------------------------------------------------------------------------------------------------------------------------
def test_doctor_tells_what_is_wrong_and_ends_non_zero(project, monkeypatch):
    monkeypatch.setattr('mllm_replica.planning.doctor.versions', lambda: [])
    well = call('doctor')
    assert well.exit_code == 0 and 'all well' in well.output, well.output
    (project / 'runs').rmdir()
    (project / 'runs').write_text('in the way')
    ill = call('doctor')
    assert ill.exit_code == 1 and 'MLLM_REPLICA_RUNS' in ill.output


@pytest.mark.parametrize(
    'line, message',
    [
        ('scale = tinny', "scale = tinny: Input should be 'smoke', 'tiny', 'sighted', 'small' or 'paper'"),
        ('scale', 'parsing errors'),
        ('', 'scale is missing'),
        ('scale = tiny\nseeds = ten', 'seeds and workers are whole numbers'),
    ],
)
def test_wrong_settings_are_told_by_every_command_that_reads_them(project, line, message):
    seeds = '' if 'seeds' in line else 'seeds = 10\n'
    (project / 'settings.ini').write_text(f'[replication]\nworkers = 2\n{seeds}{line}\n')
    settings.cache_clear()
    for words in ['run', 'honeybee', '3'], ['effects', 'honeybee', '3'], ['ui']:
        result = call(*words)
        assert result.exit_code and message in said(result) and isinstance(result.exception, SystemExit), (
            words,
            result.output,
        )
    assert len(call('run', 'honeybee', '3').output.splitlines()) == 1
    ill = call('doctor')
    assert ill.exit_code == 1 and message in said(ill) and '1 failed' in ill.output
    assert call('run', '--help').exit_code == 0 and call('show', 'honeybee', '3').exit_code == 0


def test_doctor_names_a_missing_requirement(monkeypatch):
    from mllm_replica.planning import doctor

    monkeypatch.setattr(
        doctor.importlib.metadata,
        'requires',
        lambda name: ['no-such-package>=1', 'typer>=99', 'pytest>=1; extra == "dev"'],
    )
    found = {f.topic: f for f in doctor.versions()}
    assert (found['no-such-package'].state, found['typer'].state, found['pytest'].state) == ('fail', 'fail', 'ok')
    assert 'needs >=99' in found['typer'].advice


def test_ui_before_anything_has_run(project):
    result = call('ui')
    assert result.exit_code == 2 and 'nothing has been run' in said(result)
