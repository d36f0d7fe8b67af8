"A row of each paper at its own scale, shortened, on stand-ins: the command, two processes, a kill, a tracked result and a folder."

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from mlflow.tracking import MlflowClient
from standins import write_backbones, write_data
from transformers import AutoModelForImageTextToText, AutoProcessor

import mllm_replica.auto  # noqa: F401  the Auto classes know our models
from mllm_replica.core.registry import PAPERS, recipes_of
from mllm_replica.core.settings import project_root
from mllm_replica.training.checkpoint import read_curve

ROWS = {
    'owl2': ('2', 'owl2'),
    'honeybee': ('6', 'honeybee_c_7b'),
    'mm1': ('4', 'mm1_3b_chat'),
    'eagle': ('4', 'chan_concat_2'),
    'owl3': ('4', 'owl3'),
}
SHORT = dict(steps=4, batch_size=4, accumulate=1, warmup_steps=1, checkpoint_every=1)


def short_row(recipe):
    "The row's name with changes that make each stage four steps of four samples."
    changes = [f'stages.{n}.{name}={value}' for n in range(len(recipe.stages)) for name, value in SHORT.items()]
    return '+'.join([recipe.row, *changes])


def project_of(paper, recipe, root):
    "A project with a paper's stand-ins and data."
    for name in ('papers', 'nbs'):
        (root / name).symlink_to(project_root() / name, target_is_directory=True)
    found = write_backbones(paper, root / 'backbones')
    lines = '\n'.join(f'{name} = {folder}' for name, folder in found.items())
    (root / 'settings.ini').write_text(f'{(project_root() / "settings.ini").read_text()}\n{lines}\n')
    write_data(recipe, root / 'data', samples=400 if paper == 'mm1' else 8)


def start(root, paper, table, row):
    "The command, as a user gives it."
    command = [sys.executable, '-c', 'from mllm_replica.cli import app; app()', 'run', paper, table]
    more = ['--row', row, '--scale', 'paper', '--devices', '2', '--shard', 'fsdp', '--seeds', '10', '--workers', '1']
    places = {'MLLM_REPLICA_ROOT': str(root), 'MLLM_REPLICA_RUNS': str(root / 'runs')}
    environment = {
        **os.environ,
        **places,
        'HF_HUB_OFFLINE': '1',
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(project_root()),
    }
    with (root / 'said').open('w') as said:
        return subprocess.Popen([*command, *more], cwd=root, env=environment, stdout=said, stderr=subprocess.STDOUT)


def wait_for(pattern, root, process, seconds=240):
    "Until a file is there."
    end = time.monotonic() + seconds
    while not list(root.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end, (root / 'said').read_text()
        time.sleep(0.1)


@pytest.mark.nightly
@pytest.mark.parametrize('paper', PAPERS)
def test_a_row_of_the_paper_runs_on_two_processes_killed_once(paper, tmp_path):
    table, row = ROWS[paper]
    recipe = recipes_of(paper).recipe(table, row, 'paper', 10)
    project_of(paper, recipe, tmp_path)
    first = start(tmp_path, paper, table, short_row(recipe))
    wait_for('runs/units/*/checkpoints/step-*', tmp_path, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list(tmp_path.glob('runs/units/*/result.json'))
    again = start(tmp_path, paper, table, short_row(recipe))
    assert again.wait(420) == 0, (tmp_path / 'said').read_text()

    (unit,) = tmp_path.glob('runs/units/*')
    result, steps = json.loads((unit / 'result.json').read_text()), 4 * len(recipe.stages)
    assert result['machine']['devices'] == 2 and result['machine']['shard'] == 'fsdp'
    assert result['steps'] == steps == len(read_curve(unit / 'curve.csv'))
    assert {benchmark.name for benchmark in recipe.benchmarks} <= set(result['metrics'])
    for stage in recipe.stages:
        model = AutoModelForImageTextToText.from_pretrained(unit / 'model' / stage.name)
        processor = AutoProcessor.from_pretrained(unit / 'model' / stage.name)
    assert len(processor.tokenizer) <= model.get_input_embeddings().weight.shape[0] + 1

    client = MlflowClient(f'sqlite:///{tmp_path}/runs/mlflow.db')
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.kind = 'unit'")
    assert [run.info.status for run in runs] == ['FINISHED']
    losses = client.get_metric_history(runs[0].info.run_id, 'loss')
    assert sorted({point.step for point in losses}) == list(range(1, steps + 1)) and len(losses) == steps
