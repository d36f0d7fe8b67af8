"What may happen to a checkpoint on disk: cut, altered, half-written, no room."

import errno
import json
import shutil
from collections import namedtuple

import pytest
import torch
from torch import nn

from mllm_replica.models.official import weight_files
from mllm_replica.training import checkpoint
from mllm_replica.training.checkpoint import (
    CheckpointError,
    Curve,
    Point,
    load_checkpoint,
    load_latest,
    pack_state,
    read_curve,
    save_checkpoint,
    unpack_state,
)


def save(folder, step):
    return save_checkpoint(folder, step, {'model.weight': torch.full((64,), float(step))}, {'note': step})


@pytest.fixture
def two(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    return tmp_path


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize('file', ['tensors.safetensors', 'state.json'])
@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty', 'missing'])
def test_damage_is_named_and_the_checkpoint_before_is_taken(two, file, damage):
    path = two / 'step-00000020' / file
    if damage == 'flip':
        flip(path, path.stat().st_size // 2)
    elif damage == 'missing':
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == 'cut' else b'')
    with pytest.raises(CheckpointError, match=f'step-00000020/{file}'):
        load_checkpoint(path.parent)
    with pytest.warns(UserWarning, match=f'{file}.*falling back'):
        found = load_latest(two)
    assert found.step == 10 and found.tensors['model.weight'][0] == 10


def test_every_byte_of_the_record_counts(two):
    path = two / 'step-00000020' / 'state.json'
    content = json.loads(path.read_text())
    content['body']['state']['note'] = 21
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match='state.json was altered'):
        load_checkpoint(path.parent)


def test_nothing_intact_means_a_fresh_start_with_warnings(two):
    for path in two.glob('*/state.json'):
        path.unlink()
    with pytest.warns(UserWarning) as warned:
        assert load_latest(two) is None
    assert len(warned) == 2
    assert load_latest(two / 'absent') is None


def test_unfinished_checkpoint_is_ignored_and_swept(two):
    shutil.copytree(two / 'step-00000020', two / '.step-00000030.partial')
    with pytest.warns(UserWarning, match=r'\.step-00000030\.partial was never finished'):
        assert load_latest(two).step == 20
    save(two, 30)
    assert sorted(path.name for path in two.iterdir()) == ['step-00000020', 'step-00000030']


def test_saving_again_replaces_a_damaged_step(two):
    flip(two / 'step-00000020' / 'tensors.safetensors', -1)
    save(two, 20)
    assert load_latest(two).step == 20
    assert sorted(path.name for path in two.iterdir()) == ['step-00000010', 'step-00000020']


@pytest.mark.parametrize('moment', ['before', 'midway'])
def test_full_disk_keeps_the_old_files(two, monkeypatch, moment):
    before = {path: path.read_bytes() for path in two.rglob('*') if path.is_file()}
    if moment == 'before':
        usage = namedtuple('usage', 'total used free')
        monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda folder: usage(1000, 993, 7))
    else:

        def write_half(tensors, file):
            file.write_bytes(b'half')
            raise OSError(errno.ENOSPC, 'No space left on device')

        monkeypatch.setattr(checkpoint, 'save_file', write_half)
    with pytest.raises(OSError, match=r'step 30: [\d,]+ bytes are needed, [\d,]+ are free') as raised:
        save(two, 30)
    assert raised.value.errno == errno.ENOSPC
    assert {path: path.read_bytes() for path in two.rglob('*') if path.is_file()} == before
    assert not list(two.glob('.*'))


def test_another_error_while_writing_is_not_called_a_full_disk(two, monkeypatch):
    def refuse(tensors, file):
        raise PermissionError(errno.EACCES, 'not allowed')

    monkeypatch.setattr(checkpoint, 'save_file', refuse)
    with pytest.raises(PermissionError, match='not allowed'):
        save(two, 30)
    assert load_latest(two).step == 20


def test_tied_and_strided_parameters_survive(tmp_path):
    model = nn.ModuleDict({'embed': nn.Embedding(5, 3), 'head': nn.Linear(3, 5, bias=False)})
    model.head.weight = model.embed.weight
    model.conv = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
    names = [name for name, _ in model.named_parameters()]
    save_checkpoint(tmp_path, 1, pack_state(model, names), {})
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    unpack_state(load_latest(tmp_path).tensors, model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


# the curve and the index of a checkpoint

POINTS = [Point(step, 'joint, "a"', 1 / step, 1e-3, 0.5, 40) for step in range(1, 6)]


@pytest.fixture
def curve(tmp_path):
    made = Curve(tmp_path / 'curve.csv', 0)
    for point in POINTS:
        made.append(point)
    made.flush()
    return tmp_path / 'curve.csv'


def test_a_sound_curve_comes_back(curve):
    assert read_curve(curve) == POINTS and Curve(curve, 3).points == POINTS[:3]


@pytest.mark.parametrize(
    'old, new',
    [
        (b'\n3,', b'\n4,'),
        (b'\n3,', b'\n'),
        (b'\n3,', b'\nx,'),
        (b'0.5', b'nan'),
        (b'0.25', b'0.2\xff5'),
        (b'0.001', b'0.0\x0001'),
        (b'stage', b'phase'),
        (b'0.5,40', b'0.5'),
        (b'0.5,40', b'0.5,40,40'),
        (b'\n2,"', b'\n2,'),
    ],
)
def test_a_damaged_curve_is_named_with_its_line(curve, old, new):
    content = curve.read_bytes()
    assert old in content
    curve.write_bytes(content.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=r'curve.csv line \d is damaged'):
        read_curve(curve)


def test_a_line_that_is_gone_is_missed(curve):
    lines = curve.read_text().splitlines(keepends=True)
    curve.write_text(''.join(lines[:3] + lines[4:]))
    with pytest.raises(CheckpointError, match='line 4 is damaged: .*expected step 3'):
        read_curve(curve)
    curve.write_text(''.join(lines[:3]))
    with pytest.raises(CheckpointError, match='curve.csv ends at step 2, its checkpoint is of step 4'):
        Curve(curve, 4)


@pytest.mark.parametrize(
    'content',
    [b'', b'{', b'[' * 100_000, b'\xff', b'[]', b'7', b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}', b'{}'],
)
@pytest.mark.parametrize('name', ['model.safetensors.index.json', 'pytorch_model.bin.index.json'])
def test_a_damaged_index_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f'{name} is damaged'):
        weight_files(tmp_path)


@pytest.mark.parametrize('content', [b'[' * 100_000, b'\xff', b'[]', b'{"body": 3}'])
def test_a_damaged_record_of_a_checkpoint_is_named(two, content):
    (two / 'step-00000020' / 'state.json').write_bytes(content)
    with pytest.raises(CheckpointError, match='state.json'):
        load_checkpoint(two / 'step-00000020')
