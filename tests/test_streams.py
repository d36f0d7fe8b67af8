"""Shards that are read as they lie: each sample once, by one reader, resumed exactly. Run as a program this file is the process that dies."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_training import collate, llama, same_bits

from mllm_replica.core.machine import Machine
from mllm_replica.core.recipe import Source, Stage
from mllm_replica.core.registry import recipes_of
from mllm_replica.core.settings import settings
from mllm_replica.data.encoded import Encoded
from mllm_replica.data.mixture import Mixture
from mllm_replica.data.sources import load_source
from mllm_replica.data.streams import Reader, first_of, resumed
from mllm_replica.planning.doctor import stored_data
from mllm_replica.planning.plan import measured_lengths
from mllm_replica.running import unit
from mllm_replica.running.runner import run_tables
from mllm_replica.training.checkpoint import load_latest
from mllm_replica.training.loading import Steps, read_ahead
from mllm_replica.training.loop import train

torch.set_num_threads(1)
KINDS = ('tar', 'parquet')
SIZES = {'one shard': [7], 'two': [4, 5], 'many, some empty': [3, 0, 5, 1, 0, 4, 2], 'as many as readers': [2] * 6}


def record(name, **more):
    turns = [{'from': 'human', 'value': 'say'}, {'from': 'gpt', 'value': name}]
    return dict(id=name, images=[], conversations=turns) | more


def write_shard(path, records):
    "A tar or parquet file; a record that is bytes is broken JSON."
    if path.suffix == '.parquet':
        import pyarrow as pa
        import pyarrow.parquet as pq

        turn = pa.struct(dict.fromkeys(('from', 'value'), pa.string()))
        image = pa.struct({'bytes': pa.binary(), 'path': pa.string()})
        form = pa.schema({'id': pa.string(), 'images': pa.list_(image), 'conversations': pa.list_(turn)})
        return pq.write_table(pa.Table.from_pylist(records, form), path, row_group_size=4)
    with tarfile.open(path, 'w') as file:
        for number, content in enumerate(records):
            content = dict(content) if isinstance(content, dict) else content
            images = content.pop('images') if isinstance(content, dict) else []
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            for ending, data in [('json', data), *((f'{n}.png', image['bytes']) for n, image in enumerate(images))]:
                member = tarfile.TarInfo(f'{number:04}.{ending}')
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


def source_of(folder, kind, shards, **options):
    "A streamed source of these shards: lists of records, or numbers of records."
    (folder / 'big').mkdir(exist_ok=True)
    for number, records in enumerate(shards):
        if isinstance(records, int):
            records = [record(f'{number}-{n}') for n in range(records)]
        write_shard(folder / 'big' / f'train-{number:03}.{kind}', records)
    return Source(kind=kind, name='big', options=dict(stream=True) | options)


def encode(sample):
    words = [3 + ord(letter) % 13 for letter in sample['id']]
    return Encoded(sample['id'], [1, *words], [-100, *words], images=[], image_spans=[])


def stream_of(folder, kind, shards, **options):
    return load_source(source_of(folder, kind, shards, **options), 0, folder).encoded(encode, 16)


def epochs_of(reader, count):
    "The names of each of the first epochs; a reader may have none in one."
    found = [[] for _ in range(count)]
    while (name := next(reader).id) and reader.epoch < count:
        found[reader.epoch].append(name)
    return found


# --- every sample once ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('buffer', [1, 4, 1000])
def test_every_sample_has_one_reader_in_an_epoch(tmp_path, kind, sizes, buffer):
    stream = stream_of(tmp_path, kind, sizes, buffer=buffer)
    expected = sorted(f'{shard}-{n}' for shard, size in enumerate(sizes) for n in range(size))
    for readers in (1, 2, 3, 4, 6):  # 1 to 3 processes with 0 to 2 loaders
        parts = [epochs_of(Reader(stream, 5, number, readers), 3) for number in range(readers)]
        for epoch in range(3):
            assert sorted(name for part in parts for name in part[epoch]) == expected
        if len(set(sizes)) == 1 and not sizes[0] * len(sizes) % readers:
            assert {len(part[0]) for part in parts} <= {len(expected) // readers + d for d in (-1, 0, 1)}
    orders = {tuple(epochs_of(Reader(stream, seed, 0, 1), 2)[epoch]) for seed in (5, 6) for epoch in (0, 1)}
    assert len(orders) == 4 or buffer == 1


def test_nothing_moves_further_than_the_buffer(tmp_path):
    (given,) = epochs_of(Reader(stream_of(tmp_path, 'tar', [60], buffer=8), 0, 0, 1), 1)
    moved = [abs(place - int(name[2:])) for place, name in enumerate(given)]
    assert 3 <= max(moved) <= 8


def steps_of(stream, process=0, processes=1, loaders=0, begun={}, steps=12):
    order = Mixture({'big': None}, {'big': 1.0}, 3)
    return Steps(order, {'big': stream}, collate, steps, 6, 2, process, processes, loaders, 5, begun)


def names_of(steps, first=0, count=100):
    return [names for names, _ in islice(read_ahead(steps, first), count)]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('loaders', [0, 1, 2])
@pytest.mark.parametrize('processes', [1, 2, 3])
def test_steps_give_the_samples_of_their_readers(tmp_path, kind, loaders, processes):
    stream, lanes = stream_of(tmp_path, kind, [3, 0, 5, 4], buffer=3), max(1, loaders)
    readers = [Reader(stream, 5, number, lanes * processes) for number in range(lanes * processes)]
    for process in range(processes):
        for step, shares in enumerate(names_of(steps_of(stream, process, processes, loaders))):
            reader = readers[process * lanes + step % lanes]
            assert [name for share in shares for name in share] == [next(reader).id for _ in range(6 // processes)]


# --- going on -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('loaders', [0, 1, 2])
@pytest.mark.parametrize('stop', [1, 2, 5, 11])
def test_a_loader_goes_on_at_any_step(tmp_path, kind, loaders, stop):
    stream = stream_of(tmp_path, kind, [3, 0, 5, 4], buffer=5)
    straight = names_of(steps_of(stream, loaders=loaders))
    stopped = steps_of(stream, loaders=loaders)
    assert names_of(stopped, count=stop) == straight[:stop]
    where = json.loads(json.dumps(stopped.where()))
    for _ in range(2):  # and again, after a few more steps
        again = steps_of(stream, loaders=loaders, begun=where)
        assert names_of(again, stop) == straight[stop:]
        later = steps_of(stream, loaders=loaders, begun=where)
        names_of(later, stop, 3)
        where, stop = json.loads(json.dumps(later.where())), min(12, stop + 3)


@pytest.mark.parametrize('before, after', [(1, 3), (3, 2), (4, 4), (2, 5), (6, 1)])
@pytest.mark.parametrize('sizes', [[40], [9] * 7, [30, 2, 0, 25]], ids=str)
@pytest.mark.parametrize('taken', [0, 4, 25])
def test_other_readers_have_what_is_left(tmp_path, before, after, sizes, taken):
    "Twice another number of readers; a sample comes again only out of a buffer, and none is lost."
    stream, buffer, had, where = stream_of(tmp_path, 'tar', sizes, buffer=4), 4, [], None
    for readers in (before, after, before):
        where = resumed(where, readers)
        working = [Reader(stream, 5, n, readers, state, where['passed']) for n, state in enumerate(where['readers'])]
        for reader in working:
            for _ in range(taken // 3):
                name = next(reader).id
                had.append((reader.epoch, name))
        where = json.loads(json.dumps(dict(passed=where['passed'], readers=[r.state() for r in working])))
    where = resumed(where, 7)
    first = where['readers'][0]['epoch']
    for number in range(7):
        parts = epochs_of(Reader(stream, 5, number, 7, where['readers'][number], where['passed']), first + 3)
        had += [(epoch, name) for epoch, part in enumerate(parts) for name in part]
    expected = {f'{shard}-{n}' for shard, size in enumerate(sizes) for n in range(size)}
    for epoch in range(first + 3):
        names = [name for when, name in had if when == epoch]
        assert set(names) == expected
        assert len(names) - len(expected) <= (before + after + before) * buffer


def test_an_earlier_shard_is_not_opened_again(tmp_path):
    stream = stream_of(tmp_path, 'tar', [8] * 6, buffer=1)
    one = Reader(stream, 5, 0, 1)
    had = [next(one).id for _ in range(33)]
    where = resumed(dict(passed=[], readers=[one.state()]), 2)
    for path in stream.files:
        if sum(name.startswith(f'{int(path.stem[6:])}-') for name in had) == 8:
            path.write_bytes(b'')  # damaged, so that reading it is an error
    second = Reader(stream, 5, 1, 2, where['readers'][1], where['passed'])  # of the last three shards
    left = [next(second).id for _ in range(15)]
    assert sorted(had + left) == sorted(f'{s}-{n}' for s in range(6) for n in range(8))


# --- training -------------------------------------------------------------------------------------------------------------
HOW = dict(trainable=('.*',), steps=7, batch_size=4, lr=5e-3, checkpoint_every=3, mixture={'big': 2.0, 'few': 1.0})
STAGES = [Stage(name='first', **HOW), Stage(name='second', **HOW)]
FEW = [Encoded(f'few-{n}', [1, n, n + 1], [-100, n, n + 1]) for n in range(3, 9)]


def run(folder, loaders=0, progress=None, shard='none'):
    source = Source(kind='tar', name='big', options=dict(stream=True, buffer=4))
    stream = load_source(source, 0, folder.parent).encoded(encode, 16)
    model, machine = llama(), Machine(loaders=loaders, devices=int(os.environ.get('WORLD_SIZE', 1)), shard=shard)
    return model, train(model, STAGES, dict(big=stream, few=FEW), collate, folder, 3, progress, machine=machine)


def launch(folder, at, loaders, processes=1, shard='none'):
    "Train in processes of their own, which die at a step (0: they do not)."
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)] * (processes > 1)
    return subprocess.run(
        [sys.executable, *launcher, __file__, str(folder), str(at), str(loaders), shard],
        env=os.environ | {'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    'loaders, at',
    [(0, 11), (2, 5), *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((0, 5), (1, 11), (2, 11)))],
)
def test_killed_in_a_stage_it_ends_in_the_same_bits(tmp_path, loaders, at):
    source_of(tmp_path, 'tar', [5, 0, 9, 3])
    model, straight = run(tmp_path / 'straight', loaders)
    killed = launch(tmp_path / 'killed', at, loaders)
    assert killed.returncode == -signal.SIGKILL, killed.stdout[-2000:]
    assert load_latest(tmp_path / 'killed/checkpoints').step == {5: 3, 11: 10}[at]
    again, history = run(tmp_path / 'killed', loaders)
    assert same_bits(again, model) and history.points == straight.points and history.notes == ()


def test_interrupted_at_any_step_it_ends_in_the_same_bits(tmp_path):
    source_of(tmp_path, 'tar', [5, 0, 9, 3])
    model, straight = run(tmp_path / 'straight')
    for step in (1, 2, 6, 7, 8, 13):

        def interrupt(done, *_):
            if done == step:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f'at-{step}', progress=interrupt)
        again, history = run(tmp_path / f'at-{step}')
        assert same_bits(again, model) and history.points == straight.points


@pytest.mark.nightly
def test_in_shares_the_same_samples_give_the_same_losses(tmp_path):
    source_of(tmp_path, 'tar', [5, 0, 9, 3])
    for name, at, shard in (('whole', 0, 'none'), ('shares', 11, 'fsdp')):
        done = launch(tmp_path / name, at, 1, 2, shard)
        assert bool(done.returncode) == bool(at), done.stdout[-2000:]
    assert load_latest(tmp_path / 'shares/checkpoints').state['streams']['big']['passed'] == []
    launch(tmp_path / 'shares', 0, 1, 2, 'fsdp')
    whole, shares = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('whole', 'shares'))
    assert shares['losses'] == pytest.approx(whole['losses'], rel=1e-5) and shares['notes'] == []


def test_two_processes_go_on_exactly_and_others_say_that_they_do_not(tmp_path):
    source_of(tmp_path, 'tar', [5, 0, 9, 3])
    for name, at in (('straight', 0), ('killed', 5)):
        done = launch(tmp_path / name, at, 1, 2)
        assert bool(done.returncode) == bool(at), done.stdout[-2000:]
    shutil.copytree(tmp_path / 'killed', tmp_path / 'other')
    launch(tmp_path / 'killed', 0, 1, 2)
    straight, killed = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('straight', 'killed'))
    assert killed == straight and straight['notes'] == []
    history = run(tmp_path / 'other')[1]
    assert history.steps == 14 and 'readers: 2 → 1: not bit-exact' in history.notes[0]
    states = load_latest(tmp_path / 'straight/checkpoints').state['streams']['big']
    assert len(states['readers']) == 2 and states['passed'] == []


def test_a_run_without_streams_writes_what_it_wrote(tmp_path):
    stage = STAGES[0].model_copy(update=dict(mixture={'few': 1.0}))
    train(llama(), [stage], dict(few=FEW), collate, tmp_path, 3)
    state = load_latest(tmp_path / 'checkpoints').state
    assert state.keys() == {'config', 'environment', 'seconds', 'notes'} and 'readers' not in state['environment']


def test_other_shards_are_another_run(tmp_path):
    source_of(tmp_path, 'tar', [5, 3])
    run(tmp_path / 'run')
    source_of(tmp_path, 'tar', [5, 30])
    with pytest.raises(ValueError, match='changed: data.big'):
        run(tmp_path / 'run')


# --- what is broken -------------------------------------------------------------------------------------------------------
BROKEN = {
    'json': ('tar', b'{"id": ', r'train-001.tar: 0002.json: broken JSON'),
    'an object': ('tar', b'[]', r'train-001.tar: 0002.json: expected an object'),
    'turns': ('tar', record('x', conversations=[]), r"train-001.tar: 0002: sample 'x': has neither"),
    'columns': ('parquet', record('x', conversations=None), r"train-001.parquet: row 2: sample 'x': has neither"),
    'path': (
        'parquet',
        record('x', images=[{'bytes': None, 'path': '../secret.png'}])
        | dict(conversations=[{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': 'x'}]),
        r"train-001.parquet: row 2: sample 'x': .*secret.png",
    ),
    'id': ('tar', record('x', id=''), r'train-001.tar: 0002: id is missing'),
}


@pytest.mark.parametrize('kind, content, said', BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_named_or_left_out(tmp_path, kind, content, said):
    (tmp_path / 'secret.png').write_bytes(b'x')
    shards = [3, [record('a'), record('b'), content, record('c')], 2]
    with pytest.raises(ValueError, match=said):
        epochs_of(Reader(stream_of(tmp_path, kind, shards), 0, 0, 1), 1)
    stream = stream_of(tmp_path, kind, shards, skip=1, buffer=3)
    with pytest.warns(UserWarning, match=said):
        parts = epochs_of(Reader(stream, 0, 0, 1), 3)  # one in each epoch
    assert all(sorted(part) == sorted(['0-0', '0-1', '0-2', '2-0', '2-1', 'a', 'b', 'c']) for part in parts)


@pytest.mark.filterwarnings('ignore:source')
def test_one_broken_record_too_many_also_after_a_pause(tmp_path):
    shards = [[record('a'), b'{', record('b'), record('c'), b'[', record('d')]]
    for pause in range(4):
        reader = Reader(stream_of(tmp_path, 'tar', shards, skip=1, buffer=2), 0, 0, 1)
        for _ in range(pause):
            next(reader)
        reader = Reader(reader.stream, 0, 0, 1, reader.state())
        with pytest.raises(ValueError, match='2 bad records, 1 may be left out by each reader'):
            epochs_of(reader, 1)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('part', ['half', 'end', 'all'])
def test_a_truncated_shard_is_named_and_not_left_out(tmp_path, kind, part):
    stream = stream_of(tmp_path, kind, [6, 6, 6], skip=100)
    shard = tmp_path / 'big' / f'train-001.{kind}'
    size = {'half': shard.stat().st_size // 2, 'end': 6 * 1024 if kind == 'tar' else -8, 'all': 0}[part]
    shard.write_bytes(shard.read_bytes()[:size])  # at the end: between two members
    with pytest.raises(ValueError, match=rf'train-001.{kind}: damaged {kind} file'):
        epochs_of(Reader(stream, 0, 0, 1), 1)


@pytest.mark.parametrize('kind', KINDS)
def test_without_a_record_there_is_no_stream(tmp_path, kind):
    with pytest.raises(ValueError, match=r"source 'big' \(train\) has no samples"):
        stream_of(tmp_path, kind, [0, 0])


@pytest.mark.filterwarnings('ignore:source')
def test_a_reader_does_not_wait_for_ever(tmp_path):
    with pytest.raises(ValueError, match='reader 0 of 1 found no good sample in 100 epochs'):
        next(Reader(stream_of(tmp_path, 'tar', [[b'{', b'[']], skip=5), 0, 0, 1))
    few = stream_of(tmp_path, 'tar', [1])
    assert [next(Reader(few, 0, number, 5)).id for number in range(5)] == ['0-0'] * 5


REFUSED = {
    'folder': (dict(kind='folder'), "kind 'folder' cannot be streamed"),
    'world': (dict(kind='world'), "kind 'world' cannot be streamed"),
    'size': (dict(size=2), 'is streamed and size is 2'),
    'no truth': (dict(options=dict(stream=1)), 'stream is 1; expected true or false'),
    'buffer of nothing': (dict(options=dict(buffer=5)), r"does not know the options \['buffer'\]"),
    'buffer': (dict(options=dict(stream=True, buffer=True)), 'buffer is True'),
    'skip': (dict(options=dict(stream=True, skip='x')), "skip is 'x'"),
}


@pytest.mark.parametrize('change, said', REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together(tmp_path, change, said):
    source = source_of(tmp_path, 'tar', [2])
    with pytest.raises(ValueError, match=said):
        load_source(source.model_copy(update=change), 0, tmp_path)


# --- memory ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', KINDS)
def test_memory_does_not_grow_with_the_shards(tmp_path, kind):
    turns = [{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': 'x'}]
    for number in range(30):  # 8 MB each
        shard = [
            record(f'{number}-{n}', conversations=turns, images=[{'bytes': os.urandom(2**20), 'path': None}])
            for n in range(8)
        ]
        source = source_of(tmp_path, kind, [shard], buffer=8)
        (tmp_path / f'big/train-000.{kind}').rename(tmp_path / f'big/train-x{number:02}.{kind}')
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), source.model_dump_json()], capture_output=True, text=True
    )
    early, late, samples = map(int, done.stdout.split())
    assert samples == 240 and late - early < 40_000, done.stderr  # kB, of 240 MB


# --- a unit ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def streamed(project, monkeypatch):
    "The toy's recipe with its training source as shards."
    from toychapter import recipes

    recipe, root = recipes.recipe('first', 'wide', 'smoke', 10), project.root / 'data'
    (root / 'big').mkdir(parents=True)
    samples = load_source(recipe.sources['train'], 10)
    for number in range(3):
        samples.shard(3, number).to_parquet(root / 'big' / f'train-{number}.parquet')
    source = Source(kind='parquet', name='big', options=dict(stream=True, buffer=4))
    recipe = recipe.model_copy(update=dict(sources=recipe.sources | {'train': source}))
    monkeypatch.setattr(recipes, 'recipe', lambda *_: recipe)
    return recipe, root


@pytest.mark.parametrize('loaders', [0, 2])
def test_a_unit_trains_on_a_stream(streamed, project, monkeypatch, loaders):
    monkeypatch.setenv('MLLM_REPLICA_MACHINE', json.dumps(dict(loaders=loaders)))
    settings.cache_clear()
    result = unit.run_unit(streamed[0], project.runs / 'unit')
    assert result.steps == 3 and result.metrics and not [*(project.runs / 'data').glob('big*')]


def test_the_notebook_of_a_unit_shows_a_stream(streamed, project, inline, capsys):
    assert run_tables('mm1', ['first'], 'smoke', rows=['wide'], seeds=[10], report=False).exit_code == 0
    assert 'train: a stream of samples' in capsys.readouterr().out


def test_a_benchmark_and_packing_need_all(streamed, tmp_path):
    recipe, _ = streamed
    asked = recipe.model_copy(update=dict(sources=dict.fromkeys(recipe.sources, recipe.sources['train'])))
    with pytest.raises(ValueError, match='benchmark .* needs all samples of source .*, which is streamed'):
        unit.load(unit.Unit(asked, tmp_path))
    packed = recipe.model_copy(update=dict(stages=(recipe.stages[0].model_copy(update=dict(pack=True)),)))
    opened = unit.Unit(packed, tmp_path)
    unit.load(opened)
    with pytest.raises(ValueError, match="source 'big' is streamed: it has no length"):
        unit.encode(opened)


def test_plan_and_doctor_know_streams(streamed):
    recipe, root = streamed
    found = list(stored_data([recipe]))
    assert [f.state for f in found] == ['ok'] and found[0].found.startswith('3 files')
    stream = load_source(recipe.sources['train'], 10, root)
    assert len(first_of(stream, 5)) == 5
    shutil.copytree(root / 'big', settings().run_folder / 'data' / 'big')  # where a plan looks
    lengths = measured_lengths(recipe, recipes_of('mm1').build(recipe)[1], 4)
    assert lengths['train'] > 4


if __name__ == '__main__':
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        import resource

        folder, source = Path(sys.argv[1]), Source.model_validate_json(sys.argv[2])
        reader = Reader(load_source(source, 0, folder).encoded(encode, 99), 0, 0, 1)
        for count in range(1, 1000):
            next(reader)
            if count == 24:
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            if reader.epoch:
                break
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, count - 1)
    else:
        folder, at, loaders = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

        def die(done, *_):
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)

        history = run(folder, loaders, die, sys.argv[4])[1]
        if not int(os.environ.get('RANK', 0)):
            found = dict(losses=history.losses, notes=history.notes)
            folder.with_suffix('.json').write_text(json.dumps(found))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
