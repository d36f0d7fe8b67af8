"Several processes with a share of the model each: the numbers of one process, whoever has the images."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import batch_of, model_of

from mllm_replica.core.machine import Machine
from mllm_replica.core.recipe import Stage
from mllm_replica.core.registry import PAPERS
from mllm_replica.data.encoded import Encoded
from mllm_replica.data.packing import collate
from mllm_replica.training.checkpoint import load_latest
from mllm_replica.training.loop import train
from mllm_replica.training.sharded_checkpoint import restore

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
    )
    return model, history


def launch(mode, folder, processes=2, papers=PAPERS, wait=True):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
    started = subprocess.Popen(
        [*command, __file__, mode, str(folder), ','.join(papers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    if not wait:
        return started
    out, _ = started.communicate(timeout=300)
    assert started.returncode == 0, out[-3000:]
    return out


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


if __name__ == '__main__':
    mode, folder, papers = sys.argv[1:]
    torch.set_num_threads(1)
    for paper in papers.split(','):
        model, history = run(paper, Path(folder) / paper, Machine(devices=2, shard='fsdp'))
        if torch.distributed.get_rank() == 0:
            found = dict(losses=history.losses, tokens=[point.tokens for point in history.points], notes=history.notes)
            (Path(folder) / f'{paper}.json').write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
