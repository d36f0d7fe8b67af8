"What all tests share: a run folder of the worker's own, and where the timings stay."

import atexit
import gc
import os
import shutil
import tempfile

import pytest

# Set before the package reads its settings. Workers share nothing, and an earlier session leaves nothing to be found.
os.environ['MLLM_REPLICA_RUNS'] = tempfile.mkdtemp(prefix='mllm-replica-')
os.environ.setdefault('OMP_NUM_THREADS', '1')
atexit.register(shutil.rmtree, os.environ['MLLM_REPLICA_RUNS'], ignore_errors=True)


def pytest_ignore_collect(collection_path, config):
    "Timings run where they are asked for: `make bench`."
    if collection_path.name == 'benchmarks' and not any('benchmarks' in given for given in config.args):
        return True


@pytest.fixture(autouse=True, scope='module')
def few_objects():
    "Training collects garbage after each stage; what was imported so far is left out of the search."
    gc.collect()
    gc.freeze()


@pytest.fixture
def project(tmp_path, monkeypatch):
    "The project of `toyproject`, with this process working in it."
    import toyproject
    from mllm_replica.core import registry
    from mllm_replica.core.settings import project_root, settings

    monkeypatch.syspath_prepend(str(toyproject.HERE))
    made = toyproject.make_project(tmp_path / 'project')
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('MLLM_REPLICA_RUNS', raising=False)
    monkeypatch.setitem(registry.CHAPTERS, 'mm1', 'toychapter')
    for cached in project_root, settings:
        cached.cache_clear()
    yield made
    for cached in project_root, settings:
        cached.cache_clear()


@pytest.fixture
def unrun(tmp_path, monkeypatch):
    "A copy of the published tables without results, and without recipes to be compared with."
    from mllm_replica.core.settings import project_root, settings

    unwanted = shutil.ignore_patterns('results', 'verified.csv', 'blind.csv')
    shutil.copytree(project_root() / 'papers', tmp_path / 'papers', ignore=unwanted)
    shutil.copy(project_root() / 'settings.ini', tmp_path)
    monkeypatch.setenv('MLLM_REPLICA_ROOT', str(tmp_path))
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path / 'runs'))
    for module in ('report', 'plain', 'readme'):
        monkeypatch.setattr(f'mllm_replica.tables.{module}.stale', lambda paper, records: {})
    for cached in project_root, settings:
        cached.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for cached in project_root, settings:
        cached.cache_clear()


@pytest.fixture
def inline(monkeypatch):
    "Notebooks are executed in this process: for what is run and kept, not for how processes end."
    from mllm_replica.running import publish, worker
    from toyproject import Inline

    for module in (worker, publish):
        monkeypatch.setattr(module, 'start_job', Inline)
