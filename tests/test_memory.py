"What the plan counts is what the loop switches on: bytes of weights, gradients and moments in two processes, and what a step keeps."

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_sharding import launch_script, samples_of
from toys import model_of
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from mllm_replica.core.machine import Machine
from mllm_replica.core.recipe import Stage
from mllm_replica.core.registry import PAPERS, recipes_of
from mllm_replica.data.packing import collate
from mllm_replica.planning.memory import LIBRARIES, memory_on_device
from mllm_replica.planning.plan import plan, stage_cost
from mllm_replica.training import loop

MACHINES = {
    'fsdp': Machine(devices=2, shard='fsdp', micro_batch=1),
    'recomputed': Machine(devices=2, shard='fsdp', micro_batch=1, checkpointing=True),
    'none': Machine(devices=2, micro_batch=1),
    'hsdp': Machine(devices=1, nodes=2, shard='hsdp', micro_batch=1),
}


def stages_of(model, precision):
    "First the connector, then that and the language model; the encoder never."
    how = dict(mixture={'a': 1.0}, batch_size=4, lr=1e-3, steps=1, precision=precision, accumulate=2)
    connector = rf'^{model.connector_name}'
    return [
        Stage(name='align', trainable=(connector,), **how),
        Stage(name='tune', trainable=(connector, '^language_model'), **how),
    ]


def sample_of(model):
    "One with an image."
    return [sample for sample in samples_of(model) if sample.images][:1]


def own(tensors):
    "Bytes of this process's shares."
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in locals_)


@contextmanager
def watched(model, seen):
    "Note at each step what is held, and what its last forward kept beside the weights."
    kept, clip, forward = {}, loop.clip, SimpleNamespace(running=False)

    def pack(tensor):
        weights = {p.untyped_storage()._cdata for p in model.parameters() if not isinstance(p, DTensor)}
        storage = tensor.untyped_storage()
        if forward.running and storage._cdata not in weights:
            kept[storage._cdata] = (storage, storage.nbytes())  # held, so that no number is given twice
        return tensor

    def clipped(parameters, largest):
        seen.append(
            {'weights': own(model.parameters()), 'gradients': own(p.grad for p in parameters if p.grad is not None)}
        )
        return clip(parameters, largest)

    def stepped(optimizer, *_):
        moments = [state[name] for state in optimizer.state.values() for name in ('exp_avg', 'exp_avg_sq')]
        seen[-1] |= {'optimizer': own(moments), 'activations': sum(size for _, size in kept.values())}

    def begun(*_):
        kept.clear()
        forward.running = True

    def ended(*_):
        forward.running = False

    before, after = model.register_forward_pre_hook(begun), model.register_forward_hook(ended)
    hooks = [register_optimizer_step_post_hook(stepped), before, after]
    loop.clip = clipped
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        loop.clip = clip
        for hook in hooks:
            hook.remove()


def train(paper, machine, precision, folder):
    "What this process held, by stage."
    model, seen = model_of(paper), []
    samples = sample_of(model) * 8
    with watched(model, seen):
        loop.train(
            model,
            stages_of(model, precision),
            {'a': samples},
            lambda batch: collate(batch, 0),
            folder,
            3,
            machine=machine,
        )
    return seen


PARAMETERS = [pytest.param(paper, marks=[pytest.mark.nightly] * (paper != 'honeybee')) for paper in PAPERS]


@pytest.fixture(scope='module')
def held(tmp_path_factory):
    "What the first of two processes held in training a paper's model."

    @cache
    def of(paper):
        folder = tmp_path_factory.mktemp(paper)
        launch_script([__file__, str(folder), paper])
        return lambda kind, precision: json.loads((folder / f'{kind}-{precision}.json').read_text())

    return of


def planned(paper, machine, stages, stage, length):
    "Bytes that the plan says, one layer's activations, and the loss' gradient of the output matrix."
    with torch.device('meta'):
        model = model_of(paper)
    plain, again, _ = stage_cost(lambda: model_of(paper), stage, length, 1, machine.checkpointing)
    found = memory_on_device(model, stages, stage, machine, again.activations)
    made = 4 * model.get_output_embeddings().weight.numel() if stage.name == 'tune' else 0
    layers = len(model.get_decoder().layers)
    return {name: round(size * 1e9) for name, size in found.items()}, plain.activations / layers, made


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('kind', MACHINES)
@pytest.mark.parametrize('paper', PARAMETERS)
def test_a_process_holds_what_the_plan_says(paper, kind, precision, held):
    model, machine = model_of(paper), MACHINES[kind]
    stages, length = stages_of(model, precision), len(sample_of(model)[0].input_ids)
    for stage, real in zip(stages, held(paper)(kind, precision), strict=True):
        found, layer, made = planned(paper, machine, stages, stage, length)
        assert {name: found[name] for name in ('weights', 'gradients', 'optimizer')} == {
            name: real[name] for name in ('weights', 'gradients', 'optimizer')
        }
        kept, spare = real['activations'] - made, layer if machine.checkpointing else 0
        if kind == 'none' and precision == 'bf16':  # with the weights that autocast copies
            assert found['activations'] < kept <= found['activations'] + found['buffers']
        else:
            assert 0.98 * kept <= found['activations'] <= 1.12 * kept + spare


def test_recomputing_layers_needs_less_in_every_stage(held):
    for precision in ('fp32', 'bf16'):
        kinds = [held('honeybee')(kind, precision) for kind in ('recomputed', 'fsdp')]
        assert all(less['activations'] < 0.8 * more['activations'] for less, more in zip(*kinds))


LARGE = """
import json, re, sys
from functools import partial
from pathlib import Path
from PIL import Image
from mllm_replica.core.recipe import Source
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.data.mixture import Mixture
from mllm_replica.data.packing import EncodedLater, collate
from mllm_replica.data.sources import load_source
from mllm_replica.honeybee.model import HoneybeeProcessor
from mllm_replica.models.image_processing import VisionLanguageImageProcessor
from mllm_replica.training.loading import Steps, read_ahead
import psutil, torch

def own(process=psutil.Process()):
    return int(re.search(r'RssAnon:\\s+(\\d+)', open(f'/proc/{process.pid}/status').read())[1]) / 1024

folder, count = Path(sys.argv[1]), 665_000
(folder / 'large').mkdir()
Image.new('RGB', (48, 40), 'red').save(folder / 'large' / 'a.jpg')
turns = [{'from': 'human', 'value': '<image>\\nWhat is to be seen here, and where is it?'}, {'from': 'gpt', 'value': 'A square. ' * 20}]
with open(folder / 'large' / 'train.jsonl', 'w') as file:
    for n in range(count):
        file.write(json.dumps({'id': str(n), 'images': ['a.jpg'], 'conversations': turns}) + '\\n')
processor = HoneybeeProcessor(VisionLanguageImageProcessor(32), byte_tokenizer(), 16)
before = own()
source = load_source(Source(kind='folder', name='large'), 0, folder)
read = own() - before
encoded = {'a': EncodedLater(source, processor.encode, 512)}
together = partial(collate, pad_token_id=0, image_tensor=processor.image_tensor)
steps = Steps(Mixture({'a': count}, {'a': 1.0}, 0), encoded, together, 60, 32, loaders=2)
for _ in read_ahead(steps):
    peak = [own() - before, *(own(child) for child in psutil.Process().children())]
print('FOUND', len(source), read, *peak)
"""


@pytest.mark.nightly
def test_a_process_with_665_thousand_samples_holds_less_than_a_gigabyte_of_them(tmp_path):
    "Written down once, mapped, encoded on the way; with the processes that read ahead."
    places = os.environ | {'MLLM_REPLICA_RUNS': str(tmp_path / 'runs'), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', LARGE, tmp_path], capture_output=True, text=True, env=places)
    assert done.returncode == 0, done.stderr[-3000:]
    count, read, own, *loaders = map(float, done.stdout.split('FOUND')[1].split())
    assert count == 665_000 and read < 1000 and own < 1000 and len(loaders) == 2, (read, own, loaders)  # MB


@pytest.mark.nightly
@pytest.mark.timeout(3600)  # Eagle and MM1 have many stages
@pytest.mark.parametrize('paper', PAPERS)
def test_every_stage_of_every_paper_fits_a_node_or_the_plan_says_what_to_change(paper):
    "Published sizes on 8 × 80 GB, in shares and with layers recomputed."
    found = plan(paper, scale='paper', machine=Machine(devices=8, shard='fsdp', checkpointing=True))
    assert found.units and {table.split('/')[1] for table in (unit.label for unit in found.units)} <= set(
        recipes_of(paper).tables('paper')
    )
    for unit in found.units:
        assert (unit.peak_gb + LIBRARIES <= 80) == (unit.fits_with == ''), unit.label


if __name__ == '__main__':
    folder, paper = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    for kind, machine in MACHINES.items():
        for precision in ('fp32', 'bf16'):
            found = train(paper, machine, precision, folder / f'{kind}-{precision}')
            if torch.distributed.get_rank() == 0:
                (folder / f'{kind}-{precision}.json').write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
