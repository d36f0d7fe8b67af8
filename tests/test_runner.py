"Tables from plan to report: equal units run once, finished tables cost nothing, and the executed notebooks show what was done."

import json, subprocess, sys, threading

import pytest

from mllm_replica.core.recipe import Recipe
from mllm_replica.core.settings import settings
from mllm_replica.running import engines, journal, runner, worker
from mllm_replica.running.engine import notebook_parameters, read_result
from mllm_replica.running.journal import Journal, git_commit
from mllm_replica.running.runner import make_plan, run_tables
from mllm_replica.tables.reporting import report_folder
from mllm_replica.tables.results import read_results, results_path
from toyproject import FAULT, PARAMETERS, PIPELINES, RESULT, with_chapter, write_notebook


def texts(notebook):
    "All that the cells of an executed notebook printed or returned as text or HTML."
    outputs = [o for c in json.loads(notebook.read_text())['cells'] for o in c.get('outputs', ())]
    data = [o.get('data', {}) for o in outputs]
    parts = [
        part
        for o, d in zip(outputs, data)
        for part in (o.get('text', ''), d.get('text/plain', ''), d.get('text/html', ''))
    ]
    return ' '.join(''.join(part) for part in parts), outputs


def test_pipelines_keep_their_typed_parameters():
    names = dict(paper='str', table='str', row='str', scale='str', seed='int', out_dir='str')
    assert notebook_parameters(PIPELINES / 'replicate_row.ipynb') == names
    assert notebook_parameters(PIPELINES / 'teach_start.ipynb') == names | {'start': 'str'}
    assert notebook_parameters(PIPELINES / 'report_table.ipynb') == {
        k: v for k, v in names.items() if k not in ('row', 'seed')
    }


def test_a_real_unit_is_shown_tracked_and_reported(project):
    summary = run_tables('mm1', ['second'], rows=['wide'], seeds=[10], pipeline=with_chapter(project))
    assert summary.exit_code == 0, str(summary)
    unit = project.runs / 'units' / summary.outcomes[0].unit_key
    recipe = Recipe.model_validate_json((unit / 'recipe.json').read_bytes())
    result = read_result(unit, recipe.digest())
    assert set(result.metrics) == {'toy', 'size'} and result.metrics['toy'].n == 6 and result.steps == 3
    assert (
        len((unit / 'curve.csv').read_text().splitlines()) == 4
        and len((unit / 'predictions' / 'toy.jsonl').read_text().splitlines()) == 6
    )
    said, outputs = texts(unit / 'notebook.ipynb')
    for part in ('mm1/second/wide/smoke/10', 'background:#a6e3a1', 'train: 12 samples', 'toy', 'size'):
        assert part in said, part
    assert sum('image/png' in o.get('data', {}) for o in outputs) == 3  # samples, curve, predictions
    assert (unit / 'notebook.ipynb').stat().st_size < 300_000

    folder = report_folder('mm1', 'second', 'smoke')
    assert {p.name for p in folder.iterdir()} >= {
        'figure.png',
        'table.md',
        'table.json',
        'report.json',
        'notebook.ipynb',
        'seal.json',
    }
    said, outputs = texts(folder / 'notebook.ipynb')
    assert (
        'replicated at scale smoke' in said
        and 'not testable at this scale' in said
        and any('image/png' in o.get('data', {}) for o in outputs)
    )
    records = read_results('mm1', 'second', 'smoke')
    assert {(r.row, r.seed, r.metric, r.unit, r.digest) for r in records} == {
        ('wide', 10, m, unit.name, recipe.digest()) for m in ('toy', 'size')
    }
    status, numbers, tags = project.tracked()['table']
    assert status == 'FINISHED' and tags['verdict.order'] == 'not testable at this scale'
    assert {'replicated/wide/toy', 'published/wide/acc'} <= set(numbers) and 'difference/wide/acc' not in numbers


def test_equal_units_run_once_and_serve_both_tables(project, inline):
    def run():
        return run_tables('mm1', ['first', 'second'], seeds=[10], pipeline=project.pipeline)

    summary = run()
    assert summary.exit_code == 0, str(summary)
    assert summary.plan.not_run == {'first/other': 'needs a telescope'}
    assert sorted(row for _, row in project.events('started')) == ['deep', 'narrow', 'wide']
    shared = [{r.unit for r in read_results('mm1', table, 'smoke') if r.row == 'wide'} for table in ('first', 'second')]
    assert shared[0] == shared[1] and len(shared[0]) == 1
    assert run().outcomes == []

    (project.root / 'papers' / 'mm1' / 'tables' / 'table_second.yaml').open('a').write(
        'notes: a printed cell was corrected\n'
    )
    seals = [report_folder('mm1', table, 'smoke') / 'seal.json' for table in ('first', 'second')]
    before = [seal.stat().st_mtime_ns for seal in seals]
    assert run().exit_code == 0
    assert [seal.stat().st_mtime_ns != old for seal, old in zip(seals, before)] == [
        False,
        True,
    ]  # only the changed table is reported again


def test_what_units_start_from_is_taught_first_and_once(project, monkeypatch, inline):
    from toychapter import recipes

    monkeypatch.setattr(
        recipes, 'starts', lambda recipe: ['eye', 'ear'] if recipe.row == 'wide' else ['eye'], raising=False
    )
    monkeypatch.setattr(recipes, 'teach', lambda recipe, start: None, raising=False)
    write_notebook(
        project.root / 'nbs' / 'pipelines' / 'teach_start.ipynb',
        f"{PARAMETERS}\nstart: str = ''",
        FAULT,
        "if start == 'ear': 1/0",
        RESULT,
    )
    assert (
        run_tables(
            'mm1', ['first'], rows=['wide', 'narrow'], seeds=[10], pipeline=project.pipeline, report=False
        ).exit_code
        == 0
    )
    told = [
        (e['event'], e['label'].removeprefix('mm1/'))
        for e in Journal(project.runs).read()[0]
        if e['event'] != 'started'
    ]
    starts, units = told[:2], told[2:]
    assert sorted(starts) == [
        ('failed', 'start ear/smoke/10'),
        ('finished', 'start eye/smoke/10'),
    ]  # units whose start failed try it themselves
    assert sorted(units) == [('finished', 'first/narrow/smoke/10'), ('finished', 'first/wide/smoke/10')]
    assert (
        run_tables('mm1', ['second'], rows=['deep'], seeds=[10], pipeline=project.pipeline, report=False).exit_code == 0
    )
    assert project.events('started').count(('started', 'smoke')) == 2  # no start again


def test_a_finished_table_starts_no_kernel_and_imports_little(project, inline):
    assert run_tables('mm1', ['second'], seeds=[10], pipeline=project.pipeline).exit_code == 0
    log = project.events()
    script = (
        'import sys; from mllm_replica.core import registry\n'
        'registry.CHAPTERS["mm1"] = "toychapter"\n'
        'from mllm_replica.running.runner import run_tables\n'
        f'summary = run_tables("mm1", ["second"], seeds=[10], pipeline={str(project.pipeline)!r})\n'
        'heavy = [m for m in ("torch", "mlflow", "papermill", "pandas", "transformers") if m in sys.modules]\n'
        'print(summary.skipped, summary.exit_code, heavy)'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=project.root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == '2 0 []'
    assert project.events() == log


def test_a_failing_report_is_trouble_not_silence(project, inline):
    write_notebook(
        project.root / 'nbs' / 'pipelines' / 'report_table.ipynb',
        'paper: str = ""\ntable: str = ""\nscale: str = ""\nout_dir: str = ""',
        '1/0',
    )
    summary = run_tables('mm1', ['second'], rows=['deep'], pipeline=project.pipeline)
    assert summary.exit_code == 1 and not summary.failed and 'division by zero' in summary.problems[0]
    assert project.tracked()['table'][0] == 'FAILED'


def test_design_seeds_are_not_reported(project, inline):
    summary = run_tables('mm1', ['second'], 'tiny', rows=['deep'], seeds=[3], pipeline=project.pipeline)
    assert summary.exit_code == 0, str(summary)
    assert not results_path('mm1', 'second', 'tiny').exists()
    assert project.tracked()['deep'][0] == 'FINISHED'


def test_workers_are_bounded_and_single_threaded(project, monkeypatch):
    active, most, pair = [], [], threading.Barrier(2)

    def pretend(order, stop=None):
        active.append(order.unit_key)
        pair.wait(60)  # two are at work, or it fails
        most.append(len(active))
        pair.wait(60)
        active.remove(order.unit_key)
        return worker.Outcome(label=order.recipe.label, unit_key=order.unit_key, status='finished')

    monkeypatch.setattr(engines, 'supervise', pretend)
    orders = [
        worker.Order(recipe=r[0], unit_key=key, notebook=project.pipeline, run_folder=project.runs, timeout=None)
        for key, r in make_plan('mm1', ['faults'], 'smoke').places.items()
    ]
    ended = []
    engines.run_orders(orders, 'local', 2, lambda order: None, lambda order, outcome: ended.append(order.unit_key))
    assert max(most) == 2 and sorted(ended) == sorted(o.unit_key for o in orders)
    env = worker.environment(1, project.runs)
    assert {env[f'{name}_NUM_THREADS'] for name in ('OMP', 'MKL', 'OPENBLAS')} == {'1'}


def test_a_unit_is_offline_and_writes_below_the_run_folder_unless_the_user_says_otherwise(project, monkeypatch):
    defaults = dict(
        HF_HUB_OFFLINE='1',
        IPYTHONDIR=str(project.runs / 'ipython'),
        MPLCONFIGDIR=str(project.runs / 'matplotlib'),
        MALLOC_TRIM_THRESHOLD_=str(2**28),
        MALLOC_MMAP_THRESHOLD_=str(2**28),
    )
    for name in (*defaults, 'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    assert worker.environment(1, project.runs).items() >= defaults.items()
    own = dict.fromkeys(defaults, '0')
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    env = worker.environment(1, project.runs)
    assert env.items() >= own.items() and not {'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE'} & set(env)


def test_results_alone_do_not_mark_a_commit_as_changed(tmp_path, monkeypatch):
    files = [tmp_path / 'papers/x/results/3.tiny.csv', tmp_path / 'papers/x/paper.yaml']

    def git(*words):
        return subprocess.run(
            ['git', '-C', str(tmp_path), '-c', 'user.name=x', '-c', 'user.email=x@y', *words],
            check=True,
            capture_output=True,
        )

    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('before')
    for words in (['init'], ['add', '.'], ['commit', '-m', 'all']):
        git(*words)
    monkeypatch.setattr('mllm_replica.running.journal.project_root', lambda: tmp_path)
    clean = git_commit()
    assert len(clean) == 12
    files[0].unlink()
    assert git_commit() == clean
    files[1].write_text('after')
    assert git_commit() == clean + '+'


def test_the_key_names_the_folder_that_stands_for_a_backbone(project):
    plain = Recipe(
        paper='mm1', table='first', row='wide', scale='small', seed=10, model={}, sources={}, stages=(), benchmarks=()
    )
    recipe, before, keys = (
        plain.model_copy(update=dict(model={'backbones': {'vision': 'org/eye'}})),
        journal.data_hash(plain),
        [],
    )

    def key(folder):
        "The hash of the data with this line in settings.ini."
        (project.root / 'settings.ini').write_text(
            f'[replication]\nscale = smoke\nseeds = 10\nworkers = 2\n[backbones]\n{folder}\n'
        )
        settings.cache_clear()
        assert journal.data_hash(plain) == before
        keys.append(journal.data_hash(recipe))

    for name in 'one', 'other':
        (project.root / name).mkdir()
        (project.root / name / 'model.safetensors').write_text('weights')
    for folder in '', 'org/eye = one', 'org/eye = other':
        key(folder)
    (project.root / 'other' / 'model.safetensors').write_text('new weights')
    key('org/eye = other')
    assert len({*keys, before}) == 5
    key('org/eye = other')
    assert keys[-1] == keys[-2]


def test_a_journal_that_cannot_be_written_stops_no_unit(project, monkeypatch, inline):
    append, start = Journal.append, runner.Tracker.start_unit

    def full(self, event, **fields):
        "A disk that is full when the tracker's trouble is to be noted."
        if event == 'untracked':
            raise OSError(28, 'No space left on device')
        append(self, event, **fields)

    def broken(self, parent, recipe, key):
        "A tracker that fails for one unit."
        if recipe.row == 'good':
            raise OSError(28, 'No space left on device')
        return start(self, parent, recipe, key)

    monkeypatch.setattr(Journal, 'append', full)
    monkeypatch.setattr(runner.Tracker, 'start_unit', broken)
    summary = run_tables(
        'mm1', ['faults'], 'smoke', rows=['good', 'raises', 'late'], workers=2, pipeline=project.pipeline, report=False
    )
    assert [o.status for o in summary.outcomes] == ['finished'] * 3 and summary.exit_code == 1
    assert (
        'good/smoke/10 is not tracked' in summary.problems[0] and 'journal.jsonl is not written' in summary.problems[1]
    )


def test_ray_is_named_when_it_is_missing(project, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[ray\]'"):
        run_tables('mm1', ['faults'], 'smoke', rows=['good'], engine='ray', pipeline=project.pipeline)
    with pytest.raises(ValueError, match='unknown engine'):
        run_tables('mm1', ['faults'], 'smoke', rows=['good'], engine='slurm', pipeline=project.pipeline)
