"The tracker under several processes, over resumed runs, and as a web page."

import json, math, os, signal, socket, subprocess, sys, time, urllib.request

import pytest

from mllm_replica.core.recipe import Recipe
from mllm_replica.running.tracking import Tracker

RECIPE = Recipe(
    paper='mm1', table='3', row='wide', scale='smoke', seed=10, model={'width': 8}, sources={}, stages=(), benchmarks=()
)
WRITERS = """import os, sys
from mllm_replica.core.recipe import Recipe
from mllm_replica.running.tracking import Tracker
uri, folder = sys.argv[1:]

def write(seed):
    recipe = Recipe(paper='mm1', table='3', row='wide', scale='smoke', seed=seed, model={'width': 8}, sources={}, stages=(), benchmarks=())
    with Tracker(uri, folder) as tracker:
        parent = tracker.start_table('mm1', '3', 'smoke', 'code')
        run = tracker.start_unit(parent, recipe, f'key{seed}')
        tracker.metrics(run, {'replicated/toy': 0.5}, [('loss', step, 1 / step) for step in range(1, 301)])
        tracker.end(run, 'FINISHED')
        tracker.end(parent, 'FINISHED')

children = []
for seed in range(10, 14):   # what they import is imported once; each opens the database itself
    if not (child := os.fork()):
        write(seed)
        os._exit(0)   # an exception ends it with 1
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))"""


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "A database that four processes created and wrote at once."
    folder = tmp_path_factory.mktemp('store')
    uri = f'sqlite:///{folder}/mlflow.db'
    done = subprocess.run([sys.executable, '-c', WRITERS, uri, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return uri, folder


def test_parallel_writers_lose_nothing(store):
    tracker = Tracker(*store)
    runs = tracker.client.search_runs([tracker.experiment('mm1')])
    units = [r for r in runs if r.data.tags['kind'] == 'unit']
    assert sorted(r.data.tags['seed'] for r in units) == ['10', '11', '12', '13']
    assert {r.info.status for r in runs} == {'FINISHED'}
    for run in units:
        assert len(tracker.client.get_metric_history(run.info.run_id, 'loss')) == 300
    assert tracker.client.get_experiment(tracker.experiment('mm1')).name == 'MM1'


def test_a_resumed_run_goes_on_and_keeps_its_first_parameters(store):
    with Tracker(*store) as tracker:
        parent = tracker.start_table('mm1', '3', 'smoke', 'code of a second run')
        first = tracker.start_unit(parent, RECIPE, 'key')
        tracker.end(first, 'FAILED')
        assert tracker.start_unit(parent, RECIPE, 'key') == first
        assert tracker.start_unit(parent, RECIPE.model_copy(update={'model': {'width': 9, 'depth': 2}}), 'key') == first
        run = tracker.client.get_run(first)
        assert (run.info.status, run.data.params['model.width'], run.data.params['model.depth']) == (
            'RUNNING',
            '8',
            '2',
        )
        assert run.data.tags['changed.model.width'] == '9'
        with pytest.raises(ValueError, match='not finite'):
            tracker.metrics(first, {'good': 1.0}, [('loss', 3, math.nan)])
        assert tracker.client.get_run(first).data.metrics == {}
    assert tracker.client.get_run(first).info.status == 'FAILED'  # nobody ended it


def test_a_deleted_experiment_comes_back(store):
    tracker = Tracker(*store)
    old = tracker.experiment('eagle')
    tracker.client.delete_experiment(old)
    assert Tracker(*store).experiment('eagle') == old


@pytest.mark.slow
def test_the_page_shows_runs_and_artifacts(store, tmp_path):
    uri, folder = store
    with Tracker(uri, folder) as tracker:
        run = tracker.start_table('honeybee', '3', 'smoke', 'code')
        (tmp_path / 'table.md').write_text('| published | replicated |')
        tracker.finish_table(run, {'replicated/wide/toy': 0.5}, {'order': 'inconclusive'}, [tmp_path / 'table.md'])
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, '-c', f'from mllm_replica.running.tracking import serve; serve({uri!r}, {port})'],
        start_new_session=True,
    )
    try:

        def ask(path):
            return urllib.request.urlopen(f'http://127.0.0.1:{port}{path}', timeout=60).read().decode()

        page = None
        while page is None:  # the test's own limit ends it
            assert server.poll() is None
            try:
                page = ask('/')
            except OSError:
                time.sleep(0.5)
        assert '<title>MLflow</title>' in page
        assert json.loads(ask(f'/api/2.0/mlflow/runs/get?run_id={run}'))['run']['info']['status'] == 'FINISHED'
        assert ask(f'/get-artifact?path=table.md&run_uuid={run}') == '| published | replicated |'
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_settings_named_by_regular_expressions_are_tracked():
    from mllm_replica.owl2.recipes import recipe
    from mllm_replica.running.tracking import flat

    found = flat(recipe('6', 'unfrozen_llrd', 'tiny', 10).model_dump(mode='json'))
    assert not [name for name in found if not all(c.isalnum() or c in '_-. :/' for c in name)]
    assert (
        sum('lr_scale' in name and float(value) < 1 for name, value in found.items() if value not in ('{}',)) == 3
    )  # none lost
