"Several processes with a share of the model each: the numbers of one process, whoever has the images."

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import batch_of, model_of
from transformers import AutoModelForImageTextToText

from mllm_replica.core.machine import Machine
from mllm_replica.core.recipe import Stage
from mllm_replica.core.registry import PAPERS, recipes_of
from mllm_replica.core.settings import settings
from mllm_replica.data.encoded import Encoded
from mllm_replica.data.packing import collate
from mllm_replica.running import unit
from mllm_replica.running.unit import run_unit
from mllm_replica.training import checkpoint, sharded_checkpoint
from mllm_replica.training.checkpoint import load_latest, read_curve, summed
from mllm_replica.training.loop import train
from mllm_replica.training.sharded_checkpoint import restore
from mllm_replica.training.sharding import mesh_of, shard

torch.set_num_threads(1)
CONNECTOR = {'owl2': r'^vision2text|abstractor', 'honeybee': 'abstractor'}


def samples_of(model, count=14):
    "Conversations of different lengths, every third without an image, the last four all without."
    image, size = batch_of(model)['input_ids'][1], model.config.vision_config.image_size
    words = {1, 10, 11, 12, 13, 21, 0}
    marks = getattr(model.config, 'placeholder_ids', None) or [i for i in image.tolist() if i not in words]
    samples = []
    for n in range(count):
        pictured = n % 3 != 2 and n < count - 4
        ids = [1, *(marks if pictured else []), *(20 + (7 * n + k) % 90 for k in range(3 + n % 4))]
        span = [(1, 1 + len(marks))] if pictured else []
        labels = [-100] * (len(ids) - 3) + ids[-3:]
        pixels = torch.randn(3, size, size, generator=torch.Generator().manual_seed(n))
        samples.append(Encoded(id=f's{n}', input_ids=ids, labels=labels, images=[pixels] * pictured, image_spans=span))
    return samples


def stages_of(model):
    "First the connector, then everything."
    name = model.connector_name
    how = dict(mixture={'a': 1.0}, batch_size=4, lr=2e-3, accumulate=2, weight_decay=0.1, checkpoint_every=2)
    return [
        Stage(name='align', trainable=(rf'^{name}',), steps=4, **how),
        Stage(name='tune', trainable=('.*',), steps=5, **how),
    ]


def run(paper, folder, machine=Machine(), progress=None):
    model = model_of(paper)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    history = train(
        model,
        stages_of(model),
        {'a': samples_of(model)},
        lambda batch: collate(batch, 0),
        Path(folder),
        seed=3,
        machine=machine,
        progress=progress,
        exports=Path(folder) / 'model',
    )
    return model, history


def launch(mode, folder, processes=2, papers=PAPERS, fails=False):
    return launch_script([__file__, mode, str(folder), ','.join(papers)], processes, fails)


def launch_script(script, processes=2, fails=False):
    "A file of tests as several processes; script: its path and arguments."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
    done = subprocess.run(
        [*command, *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=300,
    )
    assert bool(done.returncode) == fails, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sharded')
    launch('train', folder)
    return folder


@pytest.mark.parametrize('paper', PAPERS)
def test_two_sharded_processes_give_the_losses_of_one(paper, sharded, tmp_path):
    model, history = run(paper, tmp_path)
    found = json.loads((sharded / f'{paper}.json').read_text())
    torch.testing.assert_close(torch.tensor(found['losses']), torch.tensor(history.losses), rtol=1e-5, atol=1e-6)
    assert found['tokens'] == [point.tokens for point in history.points]
    again = model_of(paper)
    restore(load_latest(sharded / paper / 'checkpoints'), again)
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('paper', PAPERS)
def test_every_stage_leaves_a_folder_that_the_auto_classes_load(paper, sharded):
    trained = model_of(paper)
    restore(load_latest(sharded / paper / 'checkpoints'), trained)
    aligned, tuned = (
        AutoModelForImageTextToText.from_pretrained(sharded / paper / 'model' / stage) for stage in ('align', 'tune')
    )
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], tensor), name
    moved = [model.get_output_embeddings().weight for model in (aligned, tuned)]
    assert type(tuned) is type(trained) and not torch.equal(*moved)


def test_a_unit_trains_on_the_devices_of_its_machine(tmp_path, monkeypatch):
    "The kernel starts a process for each device, reads what they leave, and evaluates."
    recipe = recipes_of('honeybee').recipe('3', 'cabs_144', 'smoke', 10)
    alone = run_unit(recipe, tmp_path / 'alone')
    machine = Machine(devices=2, shard='fsdp')
    monkeypatch.setattr(unit, 'settings', lambda: settings().model_copy(update={'machine': machine}))
    together = run_unit(recipe, tmp_path / 'together')
    assert together.machine == {'devices': 2, 'shard': 'fsdp'} and together.steps == alone.steps
    losses = [[point.loss for point in read_curve(tmp_path / run / 'curve.csv')] for run in ('alone', 'together')]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=1e-6)
    assert together.metrics.keys() == alone.metrics.keys()


def test_the_machine_changes_how_and_not_what(tmp_path):
    "Layers recomputed, another kernel, other micro-batches, processes that read ahead: the losses stay."
    _, plain = run('honeybee', tmp_path / 'plain')
    other = Machine(checkpointing=True, attention='eager', micro_batch=1, loaders=1, save_every=3, keep=1)
    model, history = run('honeybee', tmp_path / 'other', other)
    torch.testing.assert_close(torch.tensor(history.losses), torch.tensor(plain.losses), rtol=1e-5, atol=1e-6)
    assert model.is_activation_checkpointing and steps_of(tmp_path / 'other') == [9]
    assert model.config.text_config._attn_implementation == 'eager'


def steps_of(folder):
    return sorted(int(path.name[5:]) for path in (folder / 'checkpoints').glob('step-*'))


@pytest.mark.parametrize('processes', [2, pytest.param(1, marks=pytest.mark.nightly)])
def test_killed_in_a_stage_it_goes_on_with_any_number_of_processes(processes, sharded, tmp_path):
    launch('kill', tmp_path, papers=['honeybee'], fails=True)
    assert steps_of(tmp_path / 'honeybee') == [4, 6] and not (tmp_path / 'honeybee.json').exists()
    launch('train', tmp_path, processes, papers=['honeybee'])
    found, straight = (json.loads((folder / 'honeybee.json').read_text()) for folder in (tmp_path, sharded))
    torch.testing.assert_close(torch.tensor(found['losses']), torch.tensor(straight['losses']), rtol=1e-5, atol=1e-6)
    assert bool(found['notes']) == (processes == 1)  # said to be not bit-exact


@pytest.mark.nightly
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_from_the_cluster_leaves_a_checkpoint(number, tmp_path):
    launch(f'signal {number.value}', tmp_path, papers=['owl3'], fails=True)
    assert steps_of(tmp_path / 'owl3')[-1] == 6  # the seventh is given up
    launch('train', tmp_path, papers=['owl3'])
    assert len(json.loads((tmp_path / 'owl3.json').read_text())['losses']) == 9


def test_a_checkpoint_that_cannot_be_begun_or_written_stops_every_process(tmp_path):
    "No process waits for one that failed, and older checkpoints stay."
    for mode, said in (('no room', 'no room for the checkpoint of step 6'), ('torn', 'a disk that tears')):
        (tmp_path / mode).mkdir()
        text = launch(mode, tmp_path / mode, papers=['honeybee'], fails=True)
        assert said in text and 'its own error says why' in text
        assert steps_of(tmp_path / mode / 'honeybee')[-1] == 4


@pytest.mark.nightly
def test_shares_within_a_node_give_the_losses_of_one(tmp_path):
    "Two nodes of two devices."
    launch('hsdp', tmp_path, 4, papers=['honeybee'])
    _, history = run('honeybee', tmp_path / 'one')
    found = json.loads((tmp_path / 'honeybee.json').read_text())
    torch.testing.assert_close(torch.tensor(found['losses']), torch.tensor(history.losses), rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize('mode', ['compiled', 'compiled alone'])
def test_compiled_layers_give_the_same_losses(mode, tmp_path):
    launch(mode, tmp_path, 1 + (mode == 'compiled'), papers=['honeybee'])
    _, history = run('honeybee', tmp_path / 'one')
    found = json.loads((tmp_path / 'honeybee.json').read_text())
    torch.testing.assert_close(torch.tensor(found['losses']), torch.tensor(history.losses), rtol=1e-4, atol=1e-5)


def test_shared_models_answer_as_whole_ones(sharded):
    "Also where one process says more words than the other."
    found = json.loads((sharded / 'answers.json').read_text())
    assert set(found) == set(PAPERS) and all(found[paper] == 2 * [[True, True]] for paper in PAPERS), found


@pytest.mark.nightly
def test_a_damaged_share_costs_only_time(sharded, tmp_path):
    launch('kill', tmp_path, papers=['mm1'], fails=True)
    share = next((tmp_path / 'mm1/checkpoints/step-00000006').glob('shard-00002*'))
    share.write_bytes(share.read_bytes()[:-9])
    launch('train', tmp_path, papers=['mm1'])
    found, straight = (json.loads((folder / 'mm1.json').read_text()) for folder in (tmp_path, sharded))
    torch.testing.assert_close(torch.tensor(found['losses']), torch.tensor(straight['losses']), rtol=1e-5, atol=1e-6)


def disturb(mode):
    "What happens to the run: nothing, a kill without a word after step 8, or a signal after step 6."

    def progress(done, *_):
        if done == 8 and mode == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if done == 6 and mode.startswith('signal') and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), int(mode.split()[1]))

    return progress


def break_disk(mode):
    "From step 6 on the disk has no room, or the second process cannot read what it wrote; or who is killed has waited."

    def full(folder):
        return shutil._ntuple_diskusage(1000, 1000, 0 if (folder / '.step-00000006.partial').exists() else 2**40)

    def torn(path):
        if 'step-00000006' in str(path) and torch.distributed.get_rank():
            raise OSError('a disk that tears')
        return summed(path)

    if mode == 'kill':  # what step 6 left is a checkpoint before step 8, however slow the disk is
        sharded_checkpoint.Writing.done = lambda writing: not writing.summed.exception()
    if mode == 'no room':
        checkpoint.shutil.disk_usage = full
    if mode == 'torn':
        sharded_checkpoint.summed = torn


def answers(paper):
    "Whether a model in shares says what it said before: as many words on each process, and other numbers of them."
    model = model_of(paper)
    batch, length, rank = batch_of(model), batch_of(model)['input_ids'].shape[1], torch.distributed.get_rank()
    whole = model.generate(**batch, max_new_tokens=5, do_sample=False)
    shard(model, mesh_of(MACHINES['train'], 'cpu', 2), stages_of(model))
    same = []
    for new in (5, 3 + 2 * rank):
        said = model.generate(**batch, max_new_tokens=new, do_sample=False, synced_gpus=True)
        same.append(torch.equal(said, whole[:, : length + new]))
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, same)
    return found


MACHINES = {
    'train': Machine(devices=2, shard='fsdp'),
    'hsdp': Machine(devices=2, nodes=2, shard='hsdp', micro_batch=1),
    'compiled': Machine(devices=2, shard='fsdp', compile=True),
    'compiled alone': Machine(compile=True),
}

if __name__ == '__main__':
    mode, folder, papers = sys.argv[1:]
    torch.set_num_threads(1)
    break_disk(mode)
    for paper in papers.split(','):
        machine = MACHINES.get(mode, MACHINES['train'])
        model, history = run(paper, Path(folder) / paper, machine, disturb(mode))
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            found = dict(losses=history.losses, tokens=[point.tokens for point in history.points], notes=history.notes)
            (Path(folder) / f'{paper}.json').write_text(json.dumps(found))
    if torch.distributed.is_initialized() and papers == ','.join(PAPERS):
        said = {paper: answers(paper) for paper in PAPERS}
        if torch.distributed.get_rank() == 0:
            (Path(folder) / 'answers.json').write_text(json.dumps(said))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
