"Who runs where: GPUs of a worker's own, what a Ray task asks for, and a table on a Ray cluster that loses a process."

import json, os, signal, subprocess, sys, threading, time
from concurrent.futures import Future
from importlib.util import find_spec
from types import ModuleType

import psutil
import pytest
from typer.testing import CliRunner

from mllm_replica.cli import app
from mllm_replica.core.machine import VARIABLE
from mllm_replica.core.settings import Trouble, settings
from mllm_replica.running import devices, engines, worker
from mllm_replica.running.journal import Journal
from mllm_replica.running.publish import write_records
from mllm_replica.running.runner import make_plan, run_tables
from mllm_replica.tables.results import read_results
from toyproject import PARAMETERS, RESULT, until, with_chapter, write_notebook


@pytest.fixture
def on(project, monkeypatch):
    "This machine has GPUs and settings of the test's choice."

    def have(gpus, visible=None, **machine):
        monkeypatch.setattr(engines, 'visible_gpus', lambda: devices.visible_gpus(shown, lambda: gpus))
        shown = {} if visible is None else {devices.VISIBLE: visible}
        monkeypatch.setenv(VARIABLE, json.dumps(machine))
        settings.cache_clear()
        return project

    return have


def orders_of(project, table='faults'):
    plan = make_plan('mm1', [table], 'smoke')
    return [
        worker.Order(
            recipe=r[0], unit_key=key, notebook=project.pipeline, run_folder=settings().run_folder, timeout=None
        )
        for key, r in plan.places.items()
    ]


# --- GPUs of this machine ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'said, files, count',
    [
        ('GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g.18gb Device 0: (UUID: MIG-2)\nGPU 1: NVIDIA H200\n', 0, 2),
        ('NVIDIA-SMI has failed because it could not communicate with the driver', 3, 0),
        (None, 3, 3),
        (None, 0, 0),
    ],
)
def test_gpus_are_counted_by_the_drivers_tool_else_by_their_files(said, files, count, tmp_path, monkeypatch):
    for number in range(files):
        (tmp_path / f'nvidia{number}').touch()
    (tmp_path / 'nvidiactl').touch()
    monkeypatch.setattr(devices, 'Path', lambda place: tmp_path)
    monkeypatch.setattr(devices.shutil, 'which', lambda name: said and name)
    monkeypatch.setattr(devices.subprocess, 'run', lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout=said))
    assert devices.installed_gpus.__wrapped__() == count


@pytest.mark.parametrize(
    'gpus, visible, shown',
    [(4, None, {'0,1', '2,3'}), (8, 'GPU-a, GPU-b,GPU-c,GPU-d', {'GPU-a,GPU-b', 'GPU-c,GPU-d'}), (0, '0,1', {None})],
)
def test_units_side_by_side_share_no_gpu(gpus, visible, shown, on, monkeypatch):
    project, busy, seen, lock = on(gpus, visible, devices=2), [], [], threading.Lock()

    def pretend(order, stop):
        with lock:
            assert order.gpus is None or order.gpus not in busy
            busy.append(order.gpus)
            seen.append(order.gpus)
        with lock:
            busy.remove(order.gpus)
        if order.recipe.row == 'raises':
            raise OSError('the disk is full')
        return worker.Outcome(label=order.label, unit_key=order.unit_key, status='failed')

    monkeypatch.setattr(engines, 'supervise', pretend)
    orders, ended = orders_of(project), []
    engines.run_orders(orders, 'local', 9, lambda order: None, lambda order, outcome: ended.append(order.unit_key))
    assert sorted(ended) == sorted(order.unit_key for order in orders)
    assert set(seen) == shown and len(seen) == len(orders)


@pytest.mark.slow
def test_a_unit_sees_its_gpus_and_leaves_no_process(on, monkeypatch):
    monkeypatch.setenv(devices.VISIBLE, '2,3')
    project = on(8, '2,3')
    look = f"""import os, signal, subprocess, sys, time
from pathlib import Path
left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
(Path(out_dir) / 'seen').write_text(f"{{os.environ['{devices.VISIBLE}']}} {{left.pid}}")
time.sleep(2)
if seed == 10: os.kill(os.getpid(), signal.SIGKILL)"""
    pipeline = write_notebook(project.root / 'look.ipynb', PARAMETERS, look, RESULT)
    summary = run_tables('mm1', ['faults'], rows=['good'], seeds=[10, 11], workers=5, pipeline=pipeline, report=False)
    assert {o.status for o in summary.outcomes} == {'finished', 'failed'}, str(summary)
    seen = [(project.runs / 'units' / o.unit_key / 'seen').read_text().split() for o in summary.outcomes]
    assert {gpus for gpus, _ in seen} == {'2', '3'}
    for _, pid in seen:  # one unit's kernel was killed, the other's ended
        assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_what_does_not_fit_is_said_before_anything_starts(on, capsys, monkeypatch):
    project = on(2, devices=4)
    with pytest.raises(Trouble, match=r'wants 4 GPUs .* shows 2 \(0, 1\): at most --devices 2 fits'):
        run_tables('mm1', ['faults'], rows=['good'], pipeline=project.pipeline)
    assert not (project.runs / 'mlflow.db').exists() and not project.events()
    on(3, devices=3)
    monkeypatch.setattr(engines, 'supervise', lambda order, stop: pytest.fail('ended here'))
    run_tables('mm1', ['faults'], rows=['good'], workers=2, pipeline=project.pipeline, report=False)
    said = capsys.readouterr().out
    assert said.startswith('workers   1 instead of 2: a unit takes 3 of 3 GPUs (0, 1, 2)')


# --- Ray, pretended ---------------------------------------------------------------------------------------------------------------------
class Ref:
    "What a task returns."

    def __init__(self, value):
        self.value = value

    def future(self):
        done = Future()
        done.set_result(self.value)
        return done


@pytest.fixture
def ray(monkeypatch):
    "A stand-in: carries tasks out at once, notes what they ask for."
    made = ModuleType('ray')
    made.asked, made.joined, made.found = [], [], [{'CPU': 4.0}]

    class Task:
        def __init__(self, function):
            self.function = function

        def options(self, name, **asked):
            made.asked.append(asked)
            return self

        def remote(self, *given):
            return Ref(self.function(*given))

    made.is_initialized = lambda: bool(made.joined)
    made.init = lambda *given, **named: made.joined.append((given, named))
    made.nodes = lambda: (
        [dict(Alive=True, Resources=r) for r in made.found] + [dict(Alive=False, Resources={'CPU': 999.0, 'GPU': 99.0})]
    )
    made.remote = lambda **options: Task
    monkeypatch.setitem(sys.modules, 'ray', made)
    return made


@pytest.mark.parametrize(
    'nodes, machine, asked',
    [
        ([{'CPU': 2.0}], {}, dict(num_cpus=1, num_gpus=0)),
        ([{'CPU': 2.0}, {'CPU': 16.0, 'GPU': 4.0}], dict(devices=4, loaders=3), dict(num_cpus=16, num_gpus=4)),
        ([{'CPU': 8.0, 'GPU': 0.0}], dict(devices=2), dict(num_cpus=2, num_gpus=0)),
    ],
)
def test_a_ray_task_asks_for_what_the_machine_says(nodes, machine, asked, ray, on, monkeypatch):
    project, seen = on(0, **machine), []
    monkeypatch.setattr(
        engines,
        'supervise',
        lambda order: (
            seen.append((order.gpus, os.environ[VARIABLE], os.getcwd()))
            or worker.Outcome(label=order.label, unit_key=order.unit_key, status='failed')
        ),
    )
    monkeypatch.chdir(project.root.parent)
    ray.found = nodes
    orders = orders_of(project)
    engines.run_orders(orders, 'ray', 1, lambda order: None, lambda order, outcome: None)
    assert ray.asked == [asked] * len(orders) and ray.joined == [
        ((), {})
    ]  # without an address: RAY_ADDRESS, or a new cluster
    assert {gpus for gpus, _, _ in seen} == {None} and {folder for _, _, folder in seen} == {str(project.root)}
    assert json.loads(seen[0][1]).items() >= machine.items()


@pytest.mark.parametrize(
    'nodes, machine, error, says',
    [
        ([{'CPU': 64.0, 'GPU': 4.0}] * 2, dict(devices=8), Trouble, '8 CPUs and 8 GPUs .*64 CPUs, 4 GPUs; 64 CPUs'),
        ([{'CPU': 64.0}, {'CPU': 1.0, 'GPU': 8.0}], dict(devices=8), Trouble, '8 CPUs and 8 GPUs'),
        ([{'CPU': 2.0}], dict(loaders=2), Trouble, '3 CPUs and 0 GPUs'),
        ([], {}, Trouble, 'no node is alive'),
        ([{'CPU': 64.0, 'GPU': 8.0}] * 2, dict(devices=8, nodes=2), NotImplementedError, 'mllm-replica slurm'),
    ],
)
def test_what_no_ray_node_has_is_refused_at_once(nodes, machine, error, says, ray, on):
    project, ray.found = on(0, **machine), nodes
    with pytest.raises(error, match=says):
        run_tables('mm1', ['faults'], rows=['good'], engine='ray', pipeline=project.pipeline)
    assert not ray.asked and not (project.runs / 'mlflow.db').exists()


def test_a_cluster_that_does_not_answer_is_named(ray, on, monkeypatch):
    project = on(0)
    monkeypatch.setenv('RAY_ADDRESS', 'head:6379')

    def silent():
        raise ConnectionError('Failed to connect')

    ray.init = silent
    with pytest.raises(Trouble, match='RAY_ADDRESS names head:6379, where no Ray cluster lets us in: Failed'):
        run_tables('mm1', ['faults'], rows=['good'], engine='ray', pipeline=project.pipeline)


def test_a_finished_table_reaches_for_no_cluster(ray, on, inline):
    project = on(0)
    assert run_tables('mm1', ['second'], rows=['deep'], seeds=[10], pipeline=project.pipeline).exit_code == 0
    assert (
        run_tables('mm1', ['second'], rows=['deep'], seeds=[10], pipeline=project.pipeline, engine='ray').skipped == 1
    )
    assert not ray.joined


# --- Ray ----------------------------------------------------------------------------------------------------------------------------------
START = """import ray
print(ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=10**8).address_info['gcs_address'])
input()"""


@pytest.fixture
def cluster(project, monkeypatch):
    "The address of a Ray cluster of this machine with two CPUs, started by somebody else."
    if find_spec('ray') is None:
        pytest.skip("Ray is not installed: pip install -e '.[ray]', as `make nightly` does")
    monkeypatch.setenv('RAY_USAGE_STATS_ENABLED', '0')
    monkeypatch.setenv('RAY_AUTH_MODE', 'disabled')  # else Ray leaves a token in the home folder
    others = {name: value for name, value in os.environ.items() if not name.startswith('MLLM_REPLICA_')}
    command = [sys.executable, '-u', '-c', START]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command, env=others, cwd='/', **pipes) as started:
        monkeypatch.setenv('RAY_ADDRESS', started.stdout.readline().strip())
        yield
        import ray

        ray.shutdown()
        started.stdin.close()


def numbers(runs):
    "What the table's results say of each unit, and each unit's curve."
    records = read_results('mm1', 'second', 'smoke')
    curves = {r.unit: (runs / 'units' / r.unit / 'curve.csv').read_text() for r in records}
    return {(r.row, r.seed, r.metric, r.value, r.n_eval, r.unit, r.digest, r.code) for r in records}, curves


@pytest.mark.nightly
def test_a_table_on_ray_that_loses_a_process_is_the_local_one(project, monkeypatch, cluster):
    gate = project.root / 'gate'
    wait = f'import time\nfrom pathlib import Path\nwhile Path({str(gate)!r}).exists(): time.sleep(0.1)'
    pipeline = with_chapter(project, after_training=wait)

    def run(engine):
        "Results of the table, run in a folder of its own."
        monkeypatch.setenv('MLLM_REPLICA_RUNS', str(project.root / engine))
        settings.cache_clear()
        summary = run_tables('mm1', ['second'], engine=engine, pipeline=pipeline, report=False)
        assert summary.exit_code == 0, str(summary)
        write_records('mm1', 'second', 'smoke', [(order.recipe, order) for order in orders_of(project, 'second')])
        return numbers(project.root / engine)

    local, runs = run('local'), project.root / 'ray'
    gate.touch()

    def kill():
        "When a unit has trained, its Ray worker goes, by the hardest of signals."
        until(lambda: list(runs.glob('units/*/curve.csv')))
        trained = next(runs.glob('units/*/curve.csv')).parent.name
        events = Journal(runs).read()[0]
        pid = next(e['process']['pid'] for e in events if e['unit_key'] == trained)
        assert psutil.Process(pid).name().startswith('ray::')
        os.kill(pid, signal.SIGKILL)
        killed.append(trained)
        gate.unlink()

    killed, killer = [], threading.Thread(target=kill, daemon=True)
    killer.start()
    assert run('ray') == local
    killer.join()
    events = [(e['unit_key'] in killed, e['event']) for e in Journal(runs).read()[0]]
    assert sorted(events) == [(False, 'finished'), (False, 'started')] + [(True, 'finished')] + [(True, 'started')] * 2


def test_the_batch_file_warns_training_and_is_queued_again(tmp_path):
    "In a shell without Slurm, with stand-ins of its commands."
    file = CliRunner().invoke(app, ['slurm', 'honeybee', '3', '--nodes', '2', '--scale', 'smoke']).output
    (tmp_path / 'job.sh').write_text(file)
    commands = {
        'mllm-replica': 'echo $$ > started; trap "exit 0" TERM; sleep 60 & wait',
        'pkill': 'echo "$@" > warned; kill $(cat started)',
        'scontrol': 'echo "$@" > queued',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{text}\n')
        (tmp_path / name).chmod(0o755)
    places = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7'}
    job = subprocess.Popen(['bash', 'job.sh'], cwd=tmp_path, env=places)
    while not (tmp_path / 'started').exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@120` does
    job.wait(30)
    assert (tmp_path / 'warned').read_text().strip() == '-TERM -f mllm_replica.running.trainer'
    assert (tmp_path / 'queued').read_text().strip() == 'requeue 7'
    assert '#SBATCH --signal=B:USR1@120' in file and '#SBATCH --requeue' in file and '#SBATCH --nodes=2' in file
