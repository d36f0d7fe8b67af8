"""Reading, checking, mixing, packing and collating conversations and documents."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mllm_replica.core.recipe import Source
from mllm_replica.data.encoded import Encoded
from mllm_replica.data.images import ImageError, encode_png, open_image
from mllm_replica.data.mixture import Mixture, sampling_weights
from mllm_replica.data.packing import collate, encode_document, pack, segment_mask, truncate, truncate_all
from mllm_replica.data.samples import COLUMNS, as_sample, check_sample
from mllm_replica.data.sources import check_images, load_source
from PIL import Image

torch.set_num_threads(1)
RED = encode_png(Image.new('RGB', (5, 4), 'red'))


@pytest.fixture(autouse=True)
def run_folder(tmp_path, monkeypatch):
    from mllm_replica.core.settings import settings

    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path / 'runs'))
    settings.cache_clear()
    yield tmp_path / 'runs'
    settings.cache_clear()


def turns(*texts):
    return [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(texts)]


def record(id='a', image='red.png', conversations=None, **more):
    given = dict(id=id, conversations=conversations or turns('<image>\nwhat ?', 'red'), **more)
    return given | ({'image': image} if image else {})


def folder(tmp_path, records, name='train.jsonl', raw=None):
    root = tmp_path / 'data' / 'set'
    root.mkdir(parents=True, exist_ok=True)
    (root / 'red.png').write_bytes(RED)
    (root / 'blue.png').write_bytes(encode_png(Image.new('RGB', (5, 4), 'blue')))
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    content = raw if raw is not None else ('\n'.join(lines) if name.endswith('l') else f'[{",".join(lines)}]').encode()
    (root / name).write_bytes(content)
    return tmp_path / 'data'


def load(root, kind='folder', name='set', seed=0, **options):
    return load_source(Source(kind=kind, name=name, **options), seed, root)


# --- reading ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['train.jsonl', 'train.json', 'train-00.jsonl'])
def test_folder_of_llava_records(tmp_path, name):
    several = record(
        'b',
        ['red.png', 'blue.png'],
        turns('first <image> then', 'ok', 'and <image> ?', 'blue'),
        options=['red', 'blue'],
        model='gpt',
    )
    data = load(folder(tmp_path, [record(), several, record('t', None, turns('hi', 'hello'))], name))
    assert data.column_names == list(COLUMNS) and data['id'][:] == ['a', 'b', 't']
    assert [open_image(i).getpixel((0, 0)) for i in data[1]['images']] == [(255, 0, 0), (0, 0, 255)]
    assert all(i['bytes'] is None for i in data[1]['images'])  # undecoded, unread
    assert (data[1]['answer'], data[2]['images'], json.loads(data[1]['meta'])) == ('blue', [], {'model': 'gpt'})


def tar_of(path, members):
    with tarfile.open(path, 'w') as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))


def test_tar_shards_with_varying_images(tmp_path):
    blue = encode_png(Image.new('RGB', (2, 2), 'blue'))
    two = json.dumps(dict(conversations=turns('<image> and <image>', 'ok'))).encode()
    none = json.dumps(dict(conversations=turns('hi', 'hello'))).encode()
    tar_of(tmp_path / 'train-000.tar', [('x/k1.0.png', RED), ('x/k1.1.png', blue), ('x/k1.json', two)])
    one = json.dumps(dict(conversations=turns('<image>', 'ok'))).encode()
    tar_of(tmp_path / 'train-001.tar', [('k2.json', none), ('k3.json', one), ('k3.jpg', RED)])
    data = load(tmp_path, 'tar', '.')
    assert data['id'][:] == ['k1', 'k2', 'k3'] and [len(i) for i in data['images']] == [2, 0, 1]
    assert data[0]['images'][1] == {'bytes': blue, 'path': 'k1.1.png'}


def test_samples_of_several_folders_of_a_shard_are_not_joined(tmp_path):
    sample = json.dumps(dict(conversations=turns('<image>', 'ok'))).encode()
    shard = [(f'{folder}/{name}', content) for folder in 'ab' for name, content in (('1.json', sample), ('1.png', RED))]
    tar_of(tmp_path / 'a.tar', shard[:2] + [(name.replace('1.', '2.'), content) for name, content in shard[2:]])
    assert load(tmp_path, 'tar', 'a.tar')['id'][:] == ['1', '2']
    tar_of(tmp_path / 'b.tar', shard)
    with pytest.raises(ValueError, match="id '1' is already used"):
        load(tmp_path, 'tar', 'b.tar')


def test_tar_faults_name_the_member(tmp_path):
    tar_of(tmp_path / 'a.tar', [('k1.png', RED)])
    with pytest.raises(ValueError, match=r'a.tar: k1.json is missing'):
        load(tmp_path, 'tar', 'a.tar')
    tar_of(tmp_path / 'b.tar', [('k1.json', b'{')])
    with pytest.raises(ValueError, match=r'b.tar: k1.json: broken JSON'):
        load(tmp_path, 'tar', 'b.tar')


@pytest.mark.parametrize('content', [b'not a tar file', b''])
def test_a_damaged_tar_file_is_called_by_its_name(tmp_path, content):
    (tmp_path / 'a.tar').write_bytes(content)
    with pytest.raises(ValueError, match='(?s)a.tar: damaged tar file: .*; fetch or pack it again'):
        load(tmp_path, 'tar', 'a.tar')


def test_a_cut_tar_file_is_called_by_its_name(tmp_path):
    sample = json.dumps(dict(conversations=turns('<image>', 'ok'))).encode()
    tar_of(tmp_path / 'a.tar', [('k.json', sample), ('k.png', RED * 100)])
    (tmp_path / 'a.tar').write_bytes((tmp_path / 'a.tar').read_bytes()[:2000])
    with pytest.raises(ValueError, match='a.tar: damaged tar file'):
        load(tmp_path, 'tar', 'a.tar')
    tar_of(tmp_path / 'b.tar', [('k.json', b'[1]')])
    with pytest.raises(ValueError, match='b.tar: k.json: expected an object, found list'):
        load(tmp_path, 'tar', 'b.tar')


def test_a_damaged_parquet_file_is_called_by_its_name(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.Table.from_pylist([dict(id=f'p{i}', conversations=turns('hi', f'yes {i}' * 99)) for i in range(9)]),
        tmp_path / 'a.parquet',
    )
    whole = (tmp_path / 'a.parquet').read_bytes()
    for content in (whole[:-100], b'not parquet', whole[:40] + b'\xff' * 200 + whole[240:]):
        (tmp_path / 'a.parquet').write_bytes(content)
        with pytest.raises(
            ValueError, match='a.parquet: damaged parquet file after row 0: .*; fetch or write it again'
        ):
            load(tmp_path, 'parquet', 'a.parquet')


def test_parquet_with_bytes_and_with_paths(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = folder(tmp_path, [record()])
    rows = [
        dict(id='p', image={'bytes': RED, 'path': None}, conversations=turns('<image>', 'red')),
        dict(id='q', image={'bytes': None, 'path': 'red.png'}, conversations=turns('<image>', 'red')),
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / 'set' / 'train.parquet')
    assert [open_image(i[0]).size for i in load(root, 'parquet')['images']] == [(5, 4)] * 2
    rows[1]['image']['path'] = '../../../etc/passwd'
    pq.write_table(pa.Table.from_pylist(rows), root / 'set' / 'train.parquet')
    with pytest.raises(ImageError, match=r"row 1: sample 'q'.*contains '\.\.'"):
        load(root, 'parquet')


def test_interleaved_documents(tmp_path):
    listed = dict(id='d', images=['red.png', 'blue.png'], document=['first', 1, 'then', 0, 'and again', 1])
    parallel = dict(id='e', texts=['A cat.', None, 'The end.'], images=[None, 'red.png', None])
    data = load(folder(tmp_path, [listed, parallel]))
    assert data['document'][:] == ['first <image> then <image> and again <image>', 'A cat. <image> The end.']
    assert [[Path(i['path']).name for i in images] for images in data['images']] == [
        ['blue.png', 'red.png', 'blue.png'],
        ['red.png'],
    ]
    with pytest.raises(ValueError, match='contains <image> literally'):
        load(folder(tmp_path, [listed | {'document': ['an <image> tag', 0]}]))


@pytest.mark.parametrize(
    'line, message',
    [
        (b'{"id": "b", ', r'train.jsonl:3: broken JSON line'),
        (b'\xff\xfe', r'train.jsonl:3: broken JSON line'),
        (b'[1, 2]', r'train.jsonl:3: expected an object'),
        (b'{"id": "b", "conversations": "hi"}', r"train.jsonl:3: conversations is 'hi'; expected a list"),
        (
            b'{"id": "b", "conversations": ["hi"]}',
            r"train.jsonl:3: conversations contains 'hi'; expected an object with 'from' and 'value'",
        ),
        (b'{"id": "b", "document": 7}', r'train.jsonl:3: document is 7; expected text or a list'),
        (b'{"id": "b", "texts": {"0": "x"}}', r"train.jsonl:3: texts is \{'0': 'x'\}; expected a list"),
        (b'{"id": "b", "document": "x", "options": [1, 2]}', r'train.jsonl:3: options contains 1; expected text'),
        (b'{"id": "b", "document": "x", "task": ["y"]}', r"train.jsonl:3: task is \['y'\]; expected text"),
        (b'{"id": "b", "document": "x", "meta": "{"}', r"train.jsonl:3: meta is '\{'; expected an object or its JSON"),
        (b'{"id": "b", "document": "x", "image": 7}', r'train.jsonl:3: sample .b.: 1 images but 0'),
        (
            b'{"id": "b", "conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}',
            r"train.jsonl:3: sample 'b': turn 0 has value None",
        ),
        (b'{"conversations": []}', r'train.jsonl:3: id is missing'),
        (b'{"id": null, "conversations": []}', r'train.jsonl:3: id is missing'),
        (
            b'{"id": "b", "document": ""}',
            r"train.jsonl:3: sample 'b': has neither conversations nor a document with text",
        ),
    ],
)
def test_bad_lines_are_called_by_their_number(tmp_path, line, message):
    good = json.dumps(record()).encode()
    with pytest.raises(ValueError, match=message):
        load(folder(tmp_path, [], raw=good + b'\n\n' + line + b'\n'))


def test_byte_order_mark_mixed_line_ends_and_non_ascii(tmp_path):
    lines = [
        json.dumps(record(f'ü{i}', None, turns('grüß Gott', '你好')), ensure_ascii=False).encode() for i in range(3)
    ]
    data = load(folder(tmp_path, [], raw=b'\xef\xbb\xbf' + lines[0] + b'\r\n' + lines[1] + b'\n' + lines[2]))
    assert data['id'][:] == ['ü0', 'ü1', 'ü2'] and data[2]['answer'] == '你好'


@pytest.mark.parametrize(
    'given, message',
    [
        (record(conversations=turns('<image> <image>', 'x')), '1 images but 2 <image> placeholders'),
        (record(conversations=turns('no picture', 'x')), '1 images but 0 <image> placeholders'),
        (record(conversations=turns('<image>', 'see <image>')), 'answer in turn 1 contains <image>'),
        (record(conversations=turns('<image>', ' \n')), 'answer in turn 1 is empty'),
        (record(conversations=turns('<image>', 'a', 'b')), 'the roles are'),
        (record(conversations=turns('<image>', 'a')[::-1]), 'the roles are'),
        (record(options=['blue', 'green']), "'red' is not among the options"),
        (record(image='none.png'), "'none.png' does not exist"),
        (record(image='../red.png'), r"contains '\.\.'"),
        (record(image=7), 'expected a path or bytes, found 7'),
        (dict(id='d', images=['red.png'], document=[0]), 'no text'),
        (
            dict(id='d', images=['red.png'], document=['a', 0], conversations=turns('a', 'b')),
            'both document and conversations',
        ),
        (dict(id='d', images=['red.png'], document=['a', 1]), 'neither text nor the number'),
    ],
)
def test_bad_samples_are_named(tmp_path, given, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(folder(tmp_path, [given]))
    assert 'train.jsonl:1' in str(caught.value)
    assert not list((tmp_path / 'runs').rglob('*.arrow')) and not list((tmp_path / 'runs').rglob('*.tmp'))


def test_duplicate_ids_and_empty_sources(tmp_path):
    with pytest.raises(ValueError, match=r"train.jsonl:2: id 'a' is already used in train.jsonl:1"):
        load(folder(tmp_path, [record(), record()]))
    with pytest.raises(ValueError, match='has no samples'):
        load(folder(tmp_path, []))


def test_source_names_stay_under_the_data_root(tmp_path):
    root = folder(tmp_path, [record()])
    with pytest.raises(ValueError, match='leads outside the data root'):
        load(root / 'set', name='../..')
    with pytest.raises(FileNotFoundError, match=r"no test\*.jsonl or .json .*'train.jsonl'"):
        load(root, split='test')
    with pytest.raises(ValueError, match="does not know the options \\['turns'\\]"):
        load(root, options={'turns': 2})
    with pytest.raises(ValueError, match='needs data_root'):
        load_source(Source(kind='tar', name='x'), 0)


def test_changed_files_are_read_again(tmp_path):
    root = folder(tmp_path, [record('a')])
    assert load(root)['id'][:] == ['a']
    folder(tmp_path, [record('a'), record('b')])
    assert load(root)['id'][:] == ['a', 'b']


def test_size_is_a_seeded_choice_in_stable_order(tmp_path):
    root = folder(tmp_path, [record(f'{i:03}') for i in range(100)])
    first, again, other = (load(root, seed=seed, size=30)['id'][:] for seed in (0, 0, 1))
    assert first == again == sorted(first) and first != other and len(set(first)) == 30


def test_corrupt_images_are_found_up_front(tmp_path):
    root = folder(tmp_path, [record('a'), record('b', 'blue.png'), record('c')])
    (root / 'set' / 'blue.png').write_bytes(encode_png(Image.effect_noise((50, 50), 90).convert('RGB'))[:1500])
    data = load(root)
    with pytest.raises(
        ImageError, match=r"1 of 3 samples .* 0 may be left out:\nsample 'b': .*blue.png: damaged or truncated"
    ):
        check_images(data)
    left, messages = check_images(data, allowed=1)
    assert left['id'][:] == ['a', 'c'] and len(messages) == 1
    os.remove(root / 'set' / 'red.png')
    with pytest.raises(ImageError, match='3 of 3 samples'):
        check_images(data, allowed=2)


# --- mixing ----------------------------------------------------------------------------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'honeybee' / 'sampling_weights.json').read_text())


@pytest.mark.parametrize('case', GOLDEN, ids=lambda case: str(case['sampling_weights']))
def test_sampling_weights_equal_the_official_ones(case):
    assert sampling_weights(case['lengths'], case['sampling_weights']) == pytest.approx(case['normalised'], abs=1e-12)


def test_per_sample_100k_caps_large_sets():
    assert sampling_weights([1_000_000, 50_000, 100_000], 'per_sample_100k') == pytest.approx([0.4, 0.2, 0.4])


def test_mixture_follows_its_weights_and_needs_no_state():
    mixture = Mixture({'a': 50, 'b': 7, 'unused': 3}, {'a': 1, 'b': 3}, seed=5)
    drawn = [pair for step in range(400) for pair in mixture.indices(step, 16)]
    share = np.mean([name == 'b' for name, _ in drawn])
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / len(drawn))
    assert {i for name, i in drawn if name == 'b'} == set(range(7)) and {i for name, i in drawn if name == 'a'} == set(
        range(50)
    )
    assert Mixture({'a': 50, 'b': 7}, {'a': 1, 'b': 3}, seed=5).indices(399, 16) == drawn[-16:]  # any step alone
    assert (
        mixture.indices(1, 16)
        != mixture.indices(2, 16)
        != Mixture({'a': 50, 'b': 7}, {'a': 1, 'b': 3}, seed=6).indices(2, 16)
    )


def test_saved_order_is_checked(tmp_path):
    mixture = Mixture({'a': 50}, {'a': 1.0}, seed=1)
    mixture.save(tmp_path / 'order.json', steps=20, batch_size=4)
    assert Mixture.load(tmp_path / 'order.json').digest(20, 4) == mixture.digest(20, 4)
    content = json.loads((tmp_path / 'order.json').read_text())
    (tmp_path / 'order.json').write_text(json.dumps(content | {'sizes': {'a': 51}}))
    with pytest.raises(ValueError, match='the recorded order is'):
        Mixture.load(tmp_path / 'order.json')


# --- truncation, packing, collation ------------------------------------------------------------------------------------------------------------


def sample(id, length, images=(), vocabulary=50, seed=0):
    "Random tokens; every span of `images` is a run of id 49; half of the rest is supervised."
    rng = np.random.default_rng([seed, *id.encode()])
    ids = rng.integers(3, vocabulary - 1, size=length)
    labels = np.where(rng.random(length) < 0.5, ids, -100)
    labels[-1] = ids[-1]
    for start, stop in images:
        ids[start:stop], labels[start:stop] = 49, -100
    return Encoded(
        id, ids.tolist(), labels.tolist(), [f'{id}{i}' for i in range(len(images))], [None] * len(images), list(images)
    )


@pytest.mark.parametrize('limit', range(1, 21))
def test_truncation_never_cuts_an_image(limit):
    full = Encoded('s', list(range(20)), list(range(20)), ['p', 'q'], ['p', 'q'], [(3, 8), (9, 14)])
    cut = truncate(full, limit)
    assert len(cut) <= limit and cut.input_ids == full.input_ids[: len(cut)]
    assert cut.image_spans == [s for s in full.image_spans if s[1] <= len(cut)] and len(cut.images) == len(
        cut.image_ids
    ) == len(cut.image_spans)
    assert not any(start < len(cut) < stop for start, stop in full.image_spans)
    assert len(cut) == limit or any(
        start == len(cut) for start, stop in full.image_spans
    )  # no more is dropped than needed


def test_truncation_faults_name_the_sample():
    unsupervised = Encoded('s', list(range(10)), [-100] * 9 + [9])
    with pytest.raises(ValueError, match="sample 's' has 10 positions; cut to 9"):
        truncate(unsupervised, 9)
    with pytest.raises(ValueError, match='1 images but 0 image spans'):
        Encoded('s', [1] * 9, [1] * 9, image_ids=['x'])


FIXED_LENGTHS = [24 + int(1000 * ((i * 0.6180339887498949) % 1) ** 3) for i in range(2000)]


def test_packing_fills_rows_and_loses_nothing():
    samples = [Encoded(str(i), [1] * n, [1] * n) for i, n in enumerate(FIXED_LENGTHS)]
    rows = pack(samples, 1024)
    assert sorted(int(s.id) for row in rows for s in row) == list(range(2000))
    assert max(sum(map(len, row)) for row in rows) <= 1024
    assert sum(FIXED_LENGTHS) / (1024 * len(rows)) >= 0.98
    assert [[s.id for s in row] for row in pack(samples, 1024)] == [[s.id for s in row] for row in rows]


def test_packing_takes_the_fullest_row_with_room():
    lengths = dict(a=7, b=6, c=3, d=2, e=2)
    assert [''.join(s.id for s in row) for row in pack([sample(i, n) for i, n in lengths.items()], 10)] == ['ac', 'bde']


def tiny_llama(attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def token_losses(model, batch):
    "Loss of every supervised token, [B, T-1]; 0 elsewhere."
    names = ('input_ids', 'attention_mask', 'position_ids')
    logits = model(**{name: batch[name] for name in names if name in batch}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch['labels'][:, 1:], ignore_index=-100, reduction='none'
    )


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_packed_samples_do_not_see_each_other(attention):
    model, samples = tiny_llama(attention), [sample(name, n) for name, n in dict(a=9, b=14, c=5, d=11, e=7).items()]
    packed = collate(samples, 0, packed=True, length=24)
    assert packed['input_ids'].shape[0] == 2 and sorted(packed['ids']) == list('abcde')
    with torch.no_grad():
        losses = token_losses(model, packed)
    found, rows = {}, pack(samples, 24)
    for row, members in enumerate(rows):
        start = 0
        for member in members:
            found[member.id] = losses[row, start : start + len(member) - 1]
            start += len(member)
    for s in samples:
        with torch.no_grad():
            alone = token_losses(model, collate([s], 0))[0]
        torch.testing.assert_close(found[s.id], alone, atol=2e-5, rtol=1e-5)
        assert alone.count_nonzero() > 0


def test_the_leakage_test_can_fail():
    model, samples = tiny_llama('sdpa'), [sample('a', 9), sample('b', 14)]
    packed = collate(samples, 0, packed=True, length=23)
    open_mask = dict(packed, attention_mask=segment_mask(torch.zeros_like(packed['input_ids'])))
    with torch.no_grad():
        assert (token_losses(model, packed) - token_losses(model, open_mask)).abs().max() > 1e-3


def test_first_token_of_a_packed_sample_is_never_a_target():
    supervised = [Encoded(i, [5, 6, 7], [5, 6, 7]) for i in 'ab']
    assert collate(supervised, 0, packed=True, length=6)['labels'].tolist() == [[-100, 6, 7, -100, 6, 7]]


def test_collation_pads_masks_and_orders_images():
    samples = [sample('a', 6, [(1, 3)]), sample('b', 9, [(0, 2), (4, 6)]), sample('c', 4)]
    cache = {'a0': 0.0, 'b0': 1.0, 'b1': 2.0}

    class Features:
        def __getitem__(self, names):
            return torch.tensor([[[cache[n]]] for n in names])

    right, left = collate(samples, 0, features=Features()), collate(samples, 0, 'left', features=Features())
    assert right['attention_mask'].sum(1).tolist() == left['attention_mask'].sum(1).tolist() == [6, 9, 4]
    assert (
        right['input_ids'][2].tolist() == samples[2].input_ids + [0] * 5
        and left['input_ids'][2].tolist() == [0] * 5 + samples[2].input_ids
    )
    assert right['labels'][2, 4:].tolist() == [-100] * 5
    assert right['image_features'].flatten().tolist() == [0, 1, 2] and 'image_features' not in collate(
        [samples[2]], 0, features=Features()
    )
    packed = collate(samples, 0, packed=True, length=13, features=Features())
    assert packed['image_features'].flatten().tolist() == [1, 2, 0] and packed['ids'] == ['b', 'c', 'a']


def test_a_batch_without_supervision_names_its_samples():
    blind = [Encoded(i, [1, 2, 3], [-100] * 3) for i in 'xy']
    with pytest.raises(ValueError, match=r"no token of this batch is supervised; samples: \['x', 'y'\]"):
        collate(blind, 0)
    with pytest.raises(ValueError, match='supervised'):
        collate(blind, 0, packed=True)
    collate(blind + [sample('z', 4)], 0)
    collate(blind, 0, 'left')  # prompts for generation


def test_documents_encode_like_conversations():
    document = as_sample(
        dict(id='d', images=['x', 'y'], document=['ab', 0, 'c', 1]), 'f', lambda i: {'bytes': None, 'path': i}
    )
    encoded = encode_document(document, lambda text: list(text.replace(' ', '').encode()), 1, 2, 9, lambda image: 2)
    assert encoded.input_ids == [1, 97, 98, 9, 9, 99, 9, 9, 2] and encoded.image_spans == [(3, 5), (6, 8)]
    assert [i for i, label in enumerate(encoded.labels) if label != -100] == [1, 2, 5, 8]
    check_sample(document)


# --- records that are odd, damaged or bad ----------------------------------------------------------------------------------------------------


def test_further_fields_of_a_turn_are_left_out(tmp_path):
    odd = [turn | {'weight': 0, 'markdown': None, 'value2': ['x']} for turn in turns('<image>\nwhat ?', 'red')]
    data = load(folder(tmp_path, [record(conversations=odd), record('b')]))
    assert data[0]['conversations'] == turns('<image>\nwhat ?', 'red') and len(data) == 2


DEEP = b'[' * 100_000
DAMAGED = [
    b'{"id": "b", "conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "x"}]}',
    b'{"id": "\\udfff", "document": "x"}',
    b'{"id": "b", "document": "x", "image": "\\ud800.png"}',
    b'{"id": "b", "document": "x", "task": "\\ud83d"}',
    b'{"id": "b", "document": "x <image>", "image": "a\\u0000.png"}',
    DEEP,
    b'{"id": "b", "document": ' + DEEP + b']' * 100_000 + b'}',
    b'{"id": "b", "document": "x", "meta": "' + DEEP + b'"}',
    b'{"id": "b", "document": "x", "more": ' + b'[' * 900 + b']' * 900 + b', "meta": "{"}',
    '{"id": "grün", "document": "x"}'.encode('latin-1'),
    b'\xff\xfe{\x00',
]


@pytest.mark.parametrize('line', DAMAGED, ids=lambda line: repr(line[:40]))
def test_damaged_records_are_refused_by_file_and_line(tmp_path, line):
    good = json.dumps(record()).encode()
    with pytest.raises(ValueError, match='train.jsonl:2'):
        load(folder(tmp_path, [], raw=good + b'\n' + line + b'\n'))
    assert not list((tmp_path / 'runs').rglob('*.arrow'))


def test_damaged_json_in_a_list_and_in_a_shard(tmp_path):
    for raw in (DEEP, b'[{"id": "\xff"}]'):
        with pytest.raises(ValueError, match='train.json: not valid JSON'):
            load(folder(tmp_path, [], 'train.json', raw))
    tar_of(tmp_path / 'a.tar', [('k1.json', DEEP)])
    with pytest.raises(ValueError, match='a.tar: k1.json: broken JSON: brackets are nested too deeply'):
        load(tmp_path, 'tar', 'a.tar')


BAD = [
    record('a', None, turns('again', 'x')),
    record('c', None, turns('x', 'y')[::-1]),
    record('d', None, [{'from': 'system', 'value': 'be kind'}, *turns('hi', 'x')]),
    record('e', 'none.png'),
    dict(id='f'),
]


def test_bad_records_are_left_out_up_to_a_limit_and_listed(tmp_path):
    root = folder(tmp_path, [record(), *BAD, record('z')])
    for _ in range(2):  # read, and from the cache
        with pytest.warns(
            UserWarning, match='(?s)set.*5 bad records, 5 may be left out:.*train.jsonl:2: id .a. is already'
        ):
            data = load(root, options={'skip': 5})
        assert data['id'][:] == ['a', 'z']
    kept = json.loads(next((tmp_path / 'runs').rglob('*.skipped.json')).read_text())
    assert [text.split(': ')[0] for text in kept] == [f'train.jsonl:{n}' for n in range(2, 7)]
    with pytest.raises(ValueError, match='(?s)5 bad records, 4 may be left out:.*train.jsonl:6'):
        load(root, options={'skip': 4})
    with pytest.raises(ValueError, match='^train.jsonl:2: id .a. is already used'):
        load(root)


def test_a_broken_line_and_a_broken_member_are_left_out_too(tmp_path):
    root = folder(tmp_path, [], raw=json.dumps(record()).encode() + b'\n{"id": \n' + DEEP + b'\n')
    with pytest.warns(UserWarning, match='2 bad records'):
        assert load(root, options={'skip': 2})['id'][:] == ['a']
    none = json.dumps(dict(conversations=turns('hi', 'hello'))).encode()
    tar_of(tmp_path / 'a.tar', [('k1.json', b'{'), ('k2.json', none), ('k3.png', RED)])
    with pytest.warns(UserWarning, match='2 bad records'):
        assert load(tmp_path, 'tar', 'a.tar', options={'skip': 2})['id'][:] == ['k2']


@pytest.mark.parametrize('limit', [-1, 1.5, '3', True])
def test_the_limit_is_a_number_of_records(tmp_path, limit):
    with pytest.raises(ValueError, match='skip is'):
        load(folder(tmp_path, [record()]), options={'skip': limit})


def test_overlong_samples_are_left_out_up_to_a_limit():
    short, long = Encoded('short', [1, 2], [-100, 2]), Encoded('long', [1] * 9, [-100] * 8 + [1])
    with pytest.warns(UserWarning, match="(?s)max_length 4: 1 bad records, 1 may be left out:.*sample 'long' has 9"):
        assert truncate_all([short, long, short], 4, skip=1) == [short, short]
    for skip, many in ((0, [long]), (1, [long, long])):
        with pytest.raises(ValueError, match=f"(?s){skip} may be left out:.*sample 'long' has 9 positions"):
            truncate_all(many, 4, skip)
