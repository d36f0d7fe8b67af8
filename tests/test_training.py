"""Training that is killed, starved or fed with nonsense. Run as a program (`test_training.py MODE FOLDER`) this file is the process that dies."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_replica.core.machine import Machine
from mllm_replica.core.recipe import Stage
from mllm_replica.data.encoded import Encoded
from mllm_replica.training import checkpoint
from mllm_replica.training.checkpoint import CheckpointError, load_latest
from mllm_replica.training.loop import supervised, train
from mllm_replica.training.optimiser import lr_at

JOINT = Stage(
    name='joint',
    trainable=('.*',),
    mixture={'long': 1.0, 'short': 2.0},
    steps=14,
    batch_size=6,
    lr=5e-3,
    warmup_steps=2,
    weight_decay=0.1,
    checkpoint_every=4,
)
STAGES = [
    Stage(
        name='head', trainable=('lm_head',), mixture={'short': 1.0}, steps=6, batch_size=4, lr=1e-2, checkpoint_every=4
    ),
    JOINT,
]


def samples(name, count, longest):
    draw = random.Random(name)
    made = []
    for number in range(count):
        length = draw.randrange(3, longest)
        ids = [draw.randrange(1, 16) for _ in range(length)]
        asked = draw.randrange(1, length)
        made.append(Encoded(f'{name}-{number}', ids, [-100] * asked + ids[asked:]))
    return made


DATA = {'long': samples('long', 20, 12), 'short': samples('short', 30, 6)}


def collate(batch):
    longest = max(len(sample.input_ids) for sample in batch)

    def pad(ids, fill):
        return [*ids, *[fill] * (longest - len(ids))]

    return {
        'input_ids': torch.tensor([pad(s.input_ids, 0) for s in batch]),
        'labels': torch.tensor([pad(s.labels, -100) for s in batch]),
        'ids': [s.id for s in batch],
    }


def llama(dropout=0.2):
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=dropout,
        )
    )


def run(folder, stages=STAGES, model=None, data=DATA, seed=3, **options):
    model = llama() if model is None else model
    return model, train(model, stages, data, collate, Path(folder), seed, **options)


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module', autouse=True)
def ctrl_c():
    "Interrupts, also where the tests are a background job, which a shell lets ignore Ctrl-C."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "The folder of a run to the end; to be copied."
    return tmp_path_factory.mktemp('finished')


@pytest.fixture(scope='module')
def straight(finished):
    return (*run(finished), (finished / 'curve.csv').read_bytes())


@pytest.fixture
def trained(tmp_path, finished, straight):
    "A copy of the finished run."
    return shutil.copytree(finished, tmp_path / 'trained')


def child(*arguments, launcher=()):
    return subprocess.run(
        [sys.executable, *launcher, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'},
    )


# The step


def test_gradients_are_clipped_and_logged_as_they_were(tmp_path):
    moved = {}
    for clip in (1e-3, 1e6):
        model = llama(dropout=0.0)
        before = [weight.detach().clone() for weight in model.parameters()]
        stage = JOINT.model_copy(
            update=dict(steps=1, warmup_steps=0, lr=1.0, weight_decay=0.0, eps=1.0, clip=clip)
        )  # so large an eps: the step is the gradient
        _, history = run(tmp_path / f'{clip}', [stage], model)
        moved[clip] = (
            torch.cat([(weight - old).flatten() for weight, old in zip(model.parameters(), before)]).norm().item()
        )
    assert moved[1e-3] == pytest.approx(1e-3, rel=0.01) and moved[1e6] > 0.01 and history.points[0].grad_norm > 0.01


# Killed and continued


def test_kill_9_in_training_and_in_a_checkpoint_ends_bit_identical(tmp_path, straight):
    model, history, curve = straight
    assert child('kill-at-step-9', tmp_path).returncode == -signal.SIGKILL
    assert load_latest(tmp_path / 'checkpoints').step == 6
    assert child('kill-in-checkpoint-14', tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / 'checkpoints' / '.step-00000014.partial' / 'tensors.safetensors').exists()
    with pytest.warns(UserWarning, match='was never finished'):
        resumed, continued = run(tmp_path)
    assert same_bits(resumed, model) and continued.points == history.points and not continued.notes
    assert (tmp_path / 'curve.csv').read_bytes() == curve


@pytest.mark.parametrize('step', [1, 5, 20])
def test_interrupt_at_any_step_ends_bit_identical(tmp_path, straight, step):
    def interrupt(done, total, loss):
        if done == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed, continued = run(tmp_path)
    assert same_bits(resumed, straight[0]) and continued.points == straight[1].points


def test_no_process_that_reads_ahead_outlives_its_stage_or_an_error(tmp_path):
    def fail(done, *_):
        assert len(multiprocessing.active_children()) == 1
        if done == STAGES[0].steps + 1:
            raise RuntimeError('an error')

    with pytest.raises(RuntimeError, match='an error') as kept:
        run(tmp_path, progress=fail, machine=Machine(loaders=1))
    assert kept.tb and not multiprocessing.active_children()  # although the error's frames are still there


def test_a_long_step_is_given_up_between_its_micro_batches_and_done_again(tmp_path):
    "Who warns a process waits for a micro-batch, not for the hundreds of a step."
    stages, seen = [STAGES[0].model_copy(update=dict(accumulate=4, batch_size=8, steps=3))], []

    def listen(model, *_):
        seen.append(model.training)
        if len(seen) == 6:  # the second of the second step
            signal.raise_signal(signal.SIGTERM)

    model = llama()
    model.register_forward_pre_hook(listen)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt, match='stopped in step 2 of 3'):
            run(tmp_path / 'a', stages, model)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(seen) == 6 and [p.name for p in (tmp_path / 'a' / 'checkpoints').iterdir()] == ['step-00000001']
    (resumed, history), (straight, whole) = (run(tmp_path / name, stages) for name in 'ab')
    assert same_bits(resumed, straight) and history.points == whole.points


def test_damaged_newest_checkpoint_costs_only_time(trained, straight):
    newest = trained / 'checkpoints' / 'step-00000020' / 'tensors.safetensors'
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.warns(UserWarning, match='step-00000020/tensors.safetensors is missing, altered or cut'):
        resumed, _ = run(trained)
    assert same_bits(resumed, straight[0])


def test_full_disk_stops_and_the_next_run_continues(tmp_path, straight, monkeypatch):
    def write(tensors, file, kept=checkpoint.save_file):
        kept(tensors, file)
        if 'step-00000014' in str(file):
            raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, 'save_file', write)
        with pytest.raises(OSError, match='bytes are needed'):
            run(tmp_path)
    assert load_latest(tmp_path / 'checkpoints').step == 10
    assert same_bits(run(tmp_path)[0], straight[0])


def test_training_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = llama()
    torch.manual_seed(5)
    run(tmp_path, [STAGES[0]], model)
    assert torch.equal(torch.rand(3), expected)


# Refused and noted


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(seed=4), r'changed: seed: 3 → 4'),
        (dict(stages=[STAGES[0], JOINT.model_copy(update={'lr': 1e-3})]), r'changed: stages\[1\]\.lr: 0\.005 → 0\.001'),
        (dict(data={**DATA, 'long': DATA['long'][1:]}), r'changed: data\.long'),
        (
            dict(
                model=LlamaForCausalLM(
                    LlamaConfig(
                        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
                    )
                )
            ),
            r'parameters\.model\.layers\.0\.mlp\.down_proj\.weight\[1\]: 24 → 32',
        ),
    ],
)
def test_changed_configuration_is_refused_by_name(trained, change, message):
    with pytest.raises(CheckpointError, match=message):
        run(trained, **change)


def test_other_thread_count_is_allowed_and_noted(tmp_path, monkeypatch):
    def interrupt(done, total, loss):
        if done == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=interrupt)
    with monkeypatch.context() as patched:
        patched.setattr(torch, 'get_num_threads', lambda: 2)  # not set: threads that wait for a busy core take seconds
        _, history = run(tmp_path)
    assert history.steps == 20 and 'resumed at step 6 with threads: 1 → 2' in history.notes[0]
    assert run(tmp_path)[1].notes[0] == history.notes[0]


@pytest.mark.parametrize(
    'change, message',
    [
        ({'trainable': ('lm_heed',)}, "'lm_heed' matches no parameter; similar names: lm_head"),
        ({'trainable': ()}, 'nothing is trainable'),
        ({'lr_scale': {'vision': 0.1}}, "'vision' matches no parameter"),
        ({'layer_decay': 0.5}, 'sets only one of layer_decay'),
        ({'mixture': {'tall': 1.0}}, r"mixes \['tall'\]; the data sets given are \['long', 'short'\]"),
        ({'accumulate': 7}, 'batch_size 6 cannot be cut into 1 processes × 7 micro-batches'),
    ],
)
def test_faults_in_a_later_stage_are_found_before_the_first_step(tmp_path, change, message):
    steps = []
    stages = [STAGES[0], JOINT.model_copy(update=change)]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, stages, progress=lambda *point: steps.append(point))
    assert not steps


# Not finite


def test_nan_loss_stops_with_step_and_samples_and_keeps_the_last_good_state(tmp_path):
    calls = []

    def poisoned(batch):
        calls.append([sample.id for sample in batch])
        made = collate(batch)
        if len(calls) == 14:
            made['input_ids'] = None
            made['inputs_embeds'] = torch.full((*made['labels'].shape, 16), float('nan'))
        return made

    stage = JOINT.model_copy(update={'accumulate': 2, 'checkpoint_every': None})
    model = llama()
    with pytest.raises(FloatingPointError, match=r"stage 'joint', step 7: loss nan") as raised:
        train(model, [stage], DATA, poisoned, tmp_path, 3)
    named = set(re.findall(r'(?:long|short)-\d+', str(raised.value)))
    assert named == set(calls[13]) != set(calls[12])
    saved = load_latest(tmp_path / 'checkpoints')
    assert saved.step == 6 and all(tensor.isfinite().all() for tensor in saved.tensors.values())
    resumed = train(llama(), [stage], DATA, collate, tmp_path, 3)
    assert resumed.steps == 14 and not resumed.notes


class InfiniteSlope(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, labels):
        loss = self.scale.abs().sqrt()
        return type('Output', (), {'loss': loss})()


def test_infinite_gradient_of_a_finite_loss_stops_too(tmp_path):
    model = InfiniteSlope()
    message = r'step 1: loss 0\.0, gradient norm (inf|nan), with the samples (long|short)-'
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, [JOINT], model)
    assert model.scale == 0


# What a step does


def test_schedule_is_honeybees():
    for case in json.loads((Path(__file__).parent / 'golden/honeybee/lr_schedule.json').read_text()):
        for step, value in case['values']:
            assert lr_at(step, case['lr'], case['min_lr'], case['warmup_steps'], case['total_steps']) == value


@pytest.mark.parametrize('accumulate', [2, 3, 6])
def test_accumulation_equals_the_full_batch(tmp_path, accumulate):
    tokens = []

    def counted(batch):
        made = collate(batch)
        tokens.append(supervised(made['labels']))
        return made

    expected, whole = run(tmp_path / 'whole', [JOINT], llama(dropout=0))
    model = llama(dropout=0)
    parts = train(model, [JOINT.model_copy(update={'accumulate': accumulate})], DATA, counted, tmp_path / 'parts', 3)
    assert len(set(tokens[:accumulate])) > 1, 'the micro-batches must differ for this test to mean something'
    for a, b in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [p.tokens for p in parts.points] == [p.tokens for p in whole.points]
    for a, b in zip(parts.points, whole.points):
        assert abs(a.loss - b.loss) < 1e-5 and abs(a.grad_norm - b.grad_norm) < 1e-4


def test_first_update_shows_scale_decay_and_frozen_parts(tmp_path):
    stage = Stage(
        name='one',
        trainable=('layers', 'lm_head'),
        mixture={'long': 1.0},
        steps=1,
        batch_size=8,
        lr=1e-3,
        eps=1e-12,
        weight_decay=0.5,
        lr_scale={'lm_head': 3.0},
        layer_decay=0.1,
        decayed_layers=r'layers\.(\d+)\.',
    )
    before, model = dict(llama().named_parameters()), run(tmp_path, [stage])[0]
    moved = {
        name: (p - before[name] * (1 - step * (0.5 if p.dim() > 1 else 0))).abs().median().item() / 1e-3
        for name, p in model.named_parameters()
        for step in [1e-3 * (3.0 if 'lm_head' in name else 0.1 if 'layers.0.' in name else 1.0)]
        if 'layers' in name or 'lm_head' in name
    }
    for name, factor in {
        'lm_head.weight': 3.0,
        'model.layers.0.mlp.up_proj.weight': 0.1,
        'model.layers.1.mlp.up_proj.weight': 1.0,
        'model.layers.1.input_layernorm.weight': 1.0,
    }.items():
        assert moved[name] == pytest.approx(factor, rel=2e-2), name
    assert torch.equal(model.model.embed_tokens.weight, before['model.embed_tokens.weight'])


class WithEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Embedding(16, 8), nn.Flatten(0, 1), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head, self.seen = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5)), []

    def forward(self, input_ids, labels):
        self.seen.append([module.training for module in (*self.encoder, *self.head)])
        features = self.encoder(input_ids)
        assert not features.requires_grad
        kept = labels.flatten() != -100
        return type(
            'Output', (), {'loss': nn.functional.cross_entropy(self.head(features)[kept], labels.flatten()[kept])}
        )()


def test_frozen_encoder_neither_drops_nor_moves(tmp_path):
    model = WithEncoder()
    statistics = model.encoder[2].running_mean.clone()
    run(tmp_path, [JOINT.model_copy(update={'trainable': ('head',)})], model)
    assert set(map(tuple, model.seen)) == {(False, False, False, False, True, True)}
    assert torch.equal(model.encoder[2].running_mean, statistics)


def test_bf16_keeps_fp32_weights_and_nearly_the_same_losses(tmp_path):
    _, full = run(tmp_path / 'fp32', [JOINT], llama(dropout=0))
    model, half = run(tmp_path / 'bf16', [JOINT.model_copy(update={'precision': 'bf16'})], llama(dropout=0))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert half.losses != full.losses
    for a, b in zip(half.losses, full.losses):
        assert abs(a - b) < 0.05


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    done = child(
        'two', tmp_path / 'two', launcher=('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected, history = run(tmp_path / 'one', model=llama(dropout=0))
    tensors = load_latest(tmp_path / 'two' / 'checkpoints').tensors
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(tensors[f'model.{name}'], parameter.data, rtol=1e-4, atol=1e-5)
    lines = (tmp_path / 'two' / 'curve.csv').read_text().splitlines()[1:]
    assert [int(line.split(',')[-1]) for line in lines] == [point.tokens for point in history.points]


if __name__ == '__main__':
    mode, folder = sys.argv[1:]
    torch.set_num_threads(1)
    if mode == 'two':
        from accelerate import PartialState

        run(folder, model=llama(dropout=0))
        assert PartialState().num_processes == 2
    elif mode == 'kill-at-step-9':
        run(folder, progress=lambda done, total, loss: die() if done == 9 else None)
    elif mode == 'kill-in-checkpoint-14':

        def write_half(tensors, file, kept=checkpoint.save_file):
            kept(tensors, file)
            if '00000014' in str(file):
                file.write_bytes(file.read_bytes()[:500])
                die()

        checkpoint.save_file = write_half
        run(folder)
