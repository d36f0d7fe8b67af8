"Effects of finished tables, ablations and searches: what differs, what runs, what is shared, and what a kill leaves."

import csv, json, os, signal, statistics, subprocess, sys

import pytest
from typer.testing import CliRunner

from mllm_replica.core.recipe import Recipe
from mllm_replica.core.registry import CHAPTERS, recipes_of
from mllm_replica.core.settings import project_root
from mllm_replica.core.variation import row_name, split_row, value_at, vary
from mllm_replica.running.engine import read_result
from mllm_replica.running.runner import make_plan, run_tables
from mllm_replica.running.study import ablation, greedy_search, run_ablation
from mllm_replica.tables.effects import differences, effects, effects_figure, effects_table, pairs
from mllm_replica.tables.published import load_table
from mllm_replica.tables.results import results_path
from test_runner import with_chapter
from toyproject import PARAMETERS, until, write_notebook

FINISHED = sorted(
    (path.parts[-3], path.name.split('.')[0]) for path in (project_root() / 'papers').glob('*/results/*.tiny.csv')
)
PARTS = """from pathlib import Path
import os, time
from mllm_replica.core.recipe import Recipe
from mllm_replica.core.writing import write_atomic
from mllm_replica.running.engine import Metric, Result
recipe = Recipe.model_validate_json((Path(out_dir)/'recipe.json').read_bytes())
parts = recipe.model['row'].split('-')
if 'broken' in parts and Path(os.environ['TOY_FAULTS']).exists(): 1/0
if recipe.model['row'] == os.environ.get('TOY_HANGS'): time.sleep(600)
worth = dict(wide=0.5, good=0.1, bad=-0.1, broken=0.05)
metrics = dict(toy=sum(worth[part] for part in parts) + recipe.stages[0].lr + seed / 100 * len(parts), size=float(len(parts)))
numbers = dict(steps=1, train_seconds=1.0, seconds=1.0, peak_memory_mb=1.0, versions={})
result = Result(label=recipe.label, digest=recipe.digest(), metrics={k: Metric(value=v) for k, v in metrics.items()}, **numbers)
write_atomic(Path(out_dir)/'result.json', result.model_dump_json())"""
SEARCH = """import sys
from mllm_replica.core import registry
registry.CHAPTERS['mm1'] = 'toychapter'
from mllm_replica.core.variation import vary
from mllm_replica.running.study import greedy_search
base = registry.recipes_of('mm1').recipe('second', 'wide', 'smoke', 10)
found = greedy_search(['bad', 'good'], ['wide'], lambda parts: vary(base, {'model.row': '-'.join(parts)}), 'toy', seeds=[10], workers=1,
                      pipeline=sys.argv[1])
print(found.frame[found.frame['chosen']]['set'].tolist(), found.exit_code)"""


@pytest.fixture
def unit(project):
    "A pipeline whose score follows from the recipe."
    return write_notebook(project.root / 'parts.ipynb', PARAMETERS, PARTS)


@pytest.fixture
def base(project):
    return recipes_of('mm1').recipe('second', 'wide', 'smoke', 10)


def started(project):
    return [row for _, row in project.events('started')]


# --- finished tables --------------------------------------------------------------------------------------------------------------------
def values_of(paper, table):
    "(row, metric, seed) -> value, as the file has them."
    with open(results_path(paper, table, 'tiny'), newline='') as file:
        return {(line['row'], line['metric'], int(line['seed'])): float(line['value']) for line in csv.DictReader(file)}


def check_effect(line, params, values, metric):
    "A line compares rows that differ in one factor, which may be several inseparable settings, by the differences of seeds."
    a, b = line['before'], line['after']
    differ = {k for k in params[a].keys() | params[b].keys() if params[a].get(k) != params[b].get(k)} - {'default'}
    assert differ and all(setting in line['factor'] for setting in differ), line
    assert len(differ) == 1 or '(with ' in line['factor'], line
    pairs = [((a, metric, seed), (b, metric, seed)) for row, name, seed in values if (row, name) == (a, metric)]
    by_seed = [values[after] - values[before] for before, after in pairs if after in values]
    assert (line['seeds'], line['mean']) == (len(by_seed), pytest.approx(statistics.fmean(by_seed))), line
    assert line['low'] <= line['mean'] <= line['high'], line


@pytest.mark.parametrize('paper', dict.fromkeys(paper for paper, _ in FINISHED))
def test_effects_of_every_finished_table(paper):
    for table in [table for name, table in FINISHED if name == paper]:
        params, values = {row.key: row.params for row in load_table(paper, table).rows}, values_of(paper, table)
        for metric in dict.fromkeys(metric for _, metric, _ in values):
            frame = effects(paper, table, 'tiny', metric)
            assert len(effects_table(frame)) == len(frame)
            for line in frame[frame['before'] != ''].to_dict('records'):
                check_effect(line, params, values, metric)


def test_pairs_of_known_tables():
    def found(paper, table):
        return {(p.factor, p.before, p.after) for p in pairs({r.key: r.params for r in load_table(paper, table).rows})}

    assert found('owl3', '10') == {
        ('adaptive_gate', 'base', 'gate'),
        ('shared_norm', 'gate', 'gate_norm'),
        ('mi_rope', 'gate_norm', 'full'),
    }
    assert ('pos_emb', 'resampler', 'resampler_pos') in found('honeybee', '9') and (
        'v_pooled_q',
        'dabs_no_vpool',
        'dabs',
    ) in found('honeybee', '9')
    assert {(a, b) for f, a, b in found('owl2', '8')} == {('r224', 'r336'), ('r336', 'r448')}  # neighbours
    fig4 = pairs({r.key: r.params for r in load_table('mm1', 'fig4').rows})
    assert {factor: sum(p.factor == factor for p in fig4) for factor in ('connector', 'res', 'tokens')} == dict(
        connector=12, res=6, tokens=6
    )


def test_a_step_is_left_out_only_where_its_halves_are_there():
    rows = {f'{kind}{n}': dict(kind=kind, n=n) for kind, n in [('a', 1), ('a', 2), ('a', 3), ('b', 1), ('b', 3)]}
    assert [(p.before, p.after) for p in pairs(rows) if p.factor == 'n'] == [('a1', 'a2'), ('b1', 'b3'), ('a2', 'a3')]


def test_differences_are_paired_by_seed():
    rows = pairs({'off': dict(on=False), 'on': dict(on=True)})
    noisy = {'off': {10: 1.0, 11: 5.0, 12: 9.0}, 'on': {12: 9.5, 10: 1.5, 13: 100.0}}
    line = differences(rows, 'm', noisy).iloc[0]
    assert (line['mean'], line['low'], line['high'], line['seeds']) == (0.5, 0.5, 0.5, 2)


def test_effects_name_what_is_wrong():
    with pytest.raises(KeyError, match='it has .*spatial'):
        effects('honeybee', '8', 'tiny', 'acc')
    with pytest.raises(ValueError, match='owl2 table 15 has no results'):
        effects('owl2', '15', 'tiny')
    with pytest.raises(ValueError, match='one metric, the frame has'):
        effects_figure(effects('honeybee', '8', 'tiny'))


# --- varied rows ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('paper', CHAPTERS)
def test_every_field_of_a_real_recipe_can_be_named_changed_and_made_again(paper):
    recipes = recipes_of(paper)
    table = recipes.tables('tiny')[0]
    row = next(row for row, reason in recipes.rows(table, 'tiny').items() if reason is None)
    made, fields = recipes.recipe(table, row, 'tiny', 10), []

    def walk(value, path):
        if path.count('.') and all(part.replace('_', '').replace('-', '').isalnum() for part in path.split('.')):
            fields.append(path)
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in inside:
            walk(inner, f'{path}.{key}')

    for name in ('model', 'sources', 'stages', 'benchmarks'):
        walk(made.model_dump(mode='json')[name], name)
    assert 'stages.0.lr' in fields and len(fields) > 50
    for path in fields:
        again = recipes.recipe(table, row_name(row, {path: value_at(made, path)}), 'tiny', 10)
        assert again.digest() == made.digest() and split_row(again.row) == (row, {path: value_at(made, path)})
    varied = vary(made, {'stages.0.lr': 0.5})
    assert recipes.recipe(table, varied.row, 'tiny', 10) == varied and varied.stages[0].lr == 0.5


def test_a_varied_row_runs_in_the_real_notebook_and_in_no_report(project, base, inline):
    varied = vary(base, {'stages.0.lr': 0.01, 'stages.0.trainable': [r"(connector|isn't)\."]})
    summary = run_tables('mm1', ['second'], rows=[varied.row], seeds=[10], pipeline=with_chapter(project))
    assert summary.exit_code == 0, str(summary)
    folder = project.runs / 'units' / summary.outcomes[0].unit_key
    assert Recipe.model_validate_json((folder / 'recipe.json').read_bytes()) == varied
    assert read_result(folder, varied.digest()).steps == 3
    assert project.tracked()[varied.row][0] == 'FINISHED'
    assert not results_path('mm1', 'second', 'smoke').exists() and not summary.problems
    with pytest.raises(KeyError, match="no rows .'wider.stages.0.lr=1'"):
        make_plan('mm1', ['second'], 'smoke', rows=['wider+stages.0.lr=1'])


# --- ablations --------------------------------------------------------------------------------------------------------------------------
def test_an_ablation_shares_units_is_tracked_and_goes_on(project, unit, base, inline):
    assert run_tables('mm1', ['second'], rows=['wide'], seeds=[10, 11], pipeline=unit, report=False).exit_code == 0
    project.faults.touch()

    def run():
        return run_ablation(
            base, {'stages.0.lr': [1e-3, 0.1], 'model.row': ['wide-broken']}, 'toy', [10, 11], pipeline=unit
        )

    first = run()
    assert first.exit_code == 1 and first.summaries[0].skipped == 2 and len(first.summaries[0].failed) == 2
    assert 'mm1/second/wide+model.row=wide-broken/smoke/10: ' in str(first) and 'ZeroDivisionError' in str(first)
    assert set(first.frame['change']) == {'0.001 → 0.1'}

    project.faults.unlink()
    done = run()
    assert (done.exit_code, done.summaries[0].skipped, len(done.summaries[0].outcomes)) == (0, 4, 2)
    toy = done.frame[done.frame['metric'] == 'toy'].set_index('change')
    assert toy['mean'].round(6).to_dict() == {'0.001 → 0.1': 0.099, 'wide → wide-broken': 0.155}
    assert toy.loc['wide → wide-broken', 'high'] > 0.2  # the seeds differ by 0.01
    assert [len(toy), len(done.frame)] == [2, 4] and done.file.with_suffix('.png').stat().st_size > 1000
    with open(done.file, newline='') as file:
        assert len(list(csv.DictReader(file))) == 4

    from mllm_replica.running.tracking import Tracker

    client = Tracker(f'sqlite:///{project.runs}/mlflow.db', project.runs).client
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [r for r in runs if r.data.tags['kind'] == 'study']
    children = [r for r in runs if r.data.tags.get('mlflow.parentRunId') == parent.info.run_id]
    assert (parent.info.run_name, parent.info.status) == (f'{done.name} · smoke', 'FINISHED')
    assert len(children) == 6 and {r.info.status for r in children} == {'FINISHED'}
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} == {
        done.file.name,
        done.file.with_suffix('.png').name,
    }
    before = len(started(project))
    assert run().summaries[0].outcomes == [] and len(started(project)) == before


def test_an_ablation_refuses_what_it_cannot_run(project, unit, base):
    with pytest.raises(KeyError, match='stages.0 has name, trainable, .*lr, min_lr'):
        run_ablation(base, {'stages.0.rate': [1]}, 'toy', pipeline=unit)
    with pytest.raises(ValueError, match='no value of stages.0.lr differs'):
        ablation(base, {'stages.0.lr': [0.001]})
    with pytest.raises(ValueError, match='makes another recipe of this name'):
        run_ablation(base.model_copy(update={'model': {'row': 'narrow'}}), {'stages.0.lr': [1.0]}, 'toy', pipeline=unit)
    with pytest.raises(ValueError, match='needs a telescope'):
        run_ablation(
            recipes_of('mm1').recipe('first', 'other', 'smoke', 10), {'stages.0.lr': [1.0]}, 'toy', pipeline=unit
        )
    assert not started(project)


def test_ablate_on_the_command_line(project, unit, inline):
    from mllm_replica.cli import app

    (project.root / 'nbs' / 'pipelines' / 'replicate_row.ipynb').write_text(unit.read_text())

    def call(*more):
        return CliRunner().invoke(app, ['ablate', 'mm1', 'second', 'wide', '--scale', 'smoke', '--seeds', '10', *more])

    result = call('--vary', 'stages.0.lr=1e-3,0.1', '--metric', 'toy')
    assert result.exit_code == 0, result.output
    text = ' '.join(result.output.replace('│', ' ').split())
    assert (
        'stages.0.lr 0.001 → 0.1 toy +0.099 (one seed) 1' in text and '2 units finished, 0 were finished before' in text
    )
    assert call('--vary', 'stages.0.lr=0.1', '--metric', 'speed').output.count(
        'the finished units of wide have toy, size'
    )
    for words, message in [
        (['--vary', 'stages.0.lr'], 'write PATH=VALUE,VALUE'),
        (['--vary', 'stages.0.lr=high'], 'Input should be a valid number'),
        (['--vary', 'stages.7.lr=1'], 'stages has 0'),
    ]:
        result = call(*words, '--metric', 'toy')
        assert result.exit_code == 2 and message in ' '.join(result.output.replace('│', ' ').split())


# --- searches ---------------------------------------------------------------------------------------------------------------------------
def test_a_search_killed_between_rounds_goes_on(project, unit):
    script = project.root / 'search.py'
    script.write_text(SEARCH)

    def run(**more):
        return subprocess.Popen(
            [sys.executable, script, unit],
            env=os.environ | project.environment | more,
            cwd=project.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    process, last = run(TOY_HANGS='wide-good-bad'), 'wide+model.row=wide-good-bad'
    until(lambda: last in started(project) or process.poll() is not None)
    os.kill(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    done = ['wide+model.row=wide', 'wide+model.row=wide-bad', 'wide+model.row=wide-good']
    assert started(project) == [*done, last], output
    again = run()
    output, _ = again.communicate()
    assert again.returncode == 0 and "['wide', 'wide, good', 'wide, good, bad'] 0" in output, output
    assert started(project) == [*done, last, last]  # only the one that was killed


def test_an_undecided_round_ends_the_search(project, unit, base, inline):
    project.faults.touch()

    def search(**how):
        return greedy_search(
            ['broken', 'good'],
            ['wide'],
            lambda parts: vary(base, {'model.row': '-'.join(parts)}),
            'toy',
            seeds=[10],
            pipeline=unit,
            **how,
        )

    stopped = search()
    assert stopped.exit_code == 1 and 'wide-broken' in str(stopped)
    assert stopped.frame[['round', 'set', 'chosen']].values.tolist() == [[0, 'wide', True], [1, 'wide, good', False]]
    project.faults.unlink()
    found = search(better='lower', rounds=1)
    assert found.frame[found.frame['chosen']]['set'].tolist() == ['wide', 'wide, broken'] and found.exit_code == 0
    assert json.loads(found.frame.to_json(orient='records'))[1]['seeds'] == 1
