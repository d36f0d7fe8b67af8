"""What people download is read as they mean it, and what is broken in it is found before a training run does."""

import datetime
import gzip
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from formats import JPG, LAYOUTS, SAMPLES, as_rows, put, shard_of, turns, write
from toys import model_of
from typer.testing import CliRunner

from mllm_replica.cli import app
from mllm_replica.core.recipe import Source, Stage
from mllm_replica.core.settings import settings
from mllm_replica.data.checking import check
from mllm_replica.data.guessing import look_at
from mllm_replica.data.images import open_image
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.data.packing import arrange
from mllm_replica.data.sources import load_source
from mllm_replica.data.streams import first_of

torch.set_num_threads(1)
COLOURS = {(254, 0, 0): 'red', (0, 128, 1): 'green', (0, 0, 254): 'blue'}  # as JPEG keeps them


@pytest.fixture(autouse=True)
def run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path / 'runs'))
    settings.cache_clear()
    yield
    settings.cache_clear()


def source_of(name, root, **options):
    "The source that a recipe would say."
    form, kind, file, pictures, *_ = LAYOUTS[name]
    folder = os.path.relpath((root / file).parent / pictures, root)
    more = {'video_frames': 2} if form == 'llava_video' else {}
    return Source(kind=kind, name=file, options={'format': form, 'image_folder': folder} | more | options)


def seen(sample):
    colours = [COLOURS[open_image(image).getpixel((5, 5))] for image in sample['images']]
    return colours, sample['document'] or sample['conversations']


# --- read as they are meant ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', LAYOUTS)
def test_a_format_gives_the_samples_that_it_means(tmp_path, name):
    write(name, tmp_path)
    data = load_source(source_of(name, tmp_path), 0, tmp_path)
    assert [seen(sample) for sample in data] == SAMPLES[name]
    assert len(set(data['id'])) == len(data)
    assert load_source(source_of(name, tmp_path), 0, tmp_path)['id'][:] == data['id'][:]  # from the cache


@pytest.mark.parametrize('name', ['shards', 'rows', 'obelics'])
def test_shards_are_streamed_in_their_format(tmp_path, name):
    write(name, tmp_path)
    stream = load_source(source_of(name, tmp_path, stream=True, buffer=2), 0, tmp_path)
    assert [seen(sample) for sample in first_of(stream, 9)] == SAMPLES[name]


def test_what_an_entry_says_besides_is_kept(tmp_path):
    write('665k', tmp_path)
    about = [json.loads(meta) for meta in load_source(source_of('665k', tmp_path), 0, tmp_path)['meta']]
    assert about == [{'id': '000000033471'}] * 2 + [{'id': 'wgByO4Y_0', 'model': ''}]
    write('sharegpt', tmp_path)
    about = [json.loads(meta) for meta in load_source(source_of('sharegpt', tmp_path), 0, tmp_path)['meta']]
    assert [entry.get('left_out') for entry in about] == [None, ['gpt', 'human'], ['system', 'human']]


def test_documents_lose_what_is_not_there_if_they_may(tmp_path):
    write('mmc4', tmp_path)
    (tmp_path / 'mmc4/images/db1c21bc8474.jpg').unlink()
    with pytest.raises(ValueError, match='docs_no_face_shard_0_v2.jsonl:1: .*db1c21bc8474.jpg. does not exist'):
        load_source(source_of('mmc4', tmp_path), 0, tmp_path)
    (left,) = load_source(source_of('mmc4', tmp_path, drop_absent=True), 0, tmp_path)
    assert seen(left) == (['blue'], 'Lock the door. All of them. <image> And the tailgate.')
    assert json.loads(left['meta'])['absent'] == 1
    write('obelics', tmp_path)
    (tmp_path / 'obelics/images/00000/000000002.jpg').unlink()
    rows = [*LAYOUTS['obelics'][4], {'images': ['http://a.b/../c.jpg', None], 'texts': [None, 'c']}]
    as_rows(tmp_path / LAYOUTS['obelics'][2], rows)
    data = load_source(source_of('obelics', tmp_path, drop_absent=True), 0, tmp_path)
    assert [seen(sample)[0] for sample in data] == [['red'], ['red'], []]
    put(tmp_path, 'obelics/images/00001.parquet', b'x')
    assert '00001.parquet is damaged' in report_on(tmp_path / 'obelics' / 'data').said[0]


def test_rows_with_pictures_in_them(tmp_path):
    "OBELICS whose URLs became bytes, and LLaVA's conversations as parquet with an image column."
    row = {'images': [JPG['red'], None], 'texts': [None, 'Red.']}
    write('obelics', tmp_path, [row])
    (sample,) = load_source(source_of('obelics', tmp_path), 0, tmp_path)
    assert seen(sample) == (['red'], '<image> Red.')
    said = turns('<image>\nWhat?', 'blue')
    as_rows(
        tmp_path / 'llava.parquet', [{'id': '1', 'image': {'bytes': JPG['blue'], 'path': None}, 'conversations': said}]
    )
    (sample,) = load_source(Source(kind='parquet', name='llava.parquet', options={'format': 'llava'}), 0, tmp_path)
    assert seen(sample) == (['blue'], said)


def test_a_video_file_is_no_training_data_and_says_what_is(tmp_path):
    put(tmp_path, 'video/v_2.mp4', b'...')
    write('video', tmp_path, [{'id': 'v', 'video': 'v_2.mp4', 'conversations': turns('<image>\nWhat?', 'red')}])
    with pytest.raises(NotImplementedError, match='entry 0: .*v_2.mp4. is a file, .* ffmpeg -i v_2.mp4'):
        load_source(source_of('video', tmp_path, skip=9), 0, tmp_path)


@pytest.mark.parametrize(
    'options,message',
    [
        ({'format': 'lava'}, "format is 'lava'; expected one of llava, "),
        ({'drop_absent': 1}, 'drop_absent is 1; expected true or false'),
        ({'video_frames': 0}, 'video_frames is 0; expected a number'),
        ({'image_folder': '../..'}, r"image_folder '../..' contains '\.\.'"),
        ({'image_folder': '/etc'}, "image_folder '/etc' is absolute"),
        ({'pictures': 'x'}, r"does not know the options \['pictures'\]"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    write('558k', tmp_path)
    with pytest.raises(ValueError, match=message):
        load_source(source_of('558k', tmp_path, **options), 0, tmp_path)
    with pytest.raises(FileNotFoundError, match='image_folder .* is no folder'):
        load_source(source_of('558k', tmp_path, image_folder='nowhere'), 0, tmp_path)


# --- trained on ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('paper,name', [('honeybee', '665k'), ('mm1', 'obelics')])
def test_two_steps_on_a_conversation_and_on_a_document(tmp_path, paper, name):
    from mllm_replica.honeybee.model import HoneybeeProcessor
    from mllm_replica.mm1.model import MM1Processor
    from mllm_replica.training.loop import train

    write(name, tmp_path)
    model = model_of(paper)
    kind = {'honeybee': HoneybeeProcessor, 'mm1': MM1Processor}[paper]
    processor = kind.from_config(model.config, byte_tokenizer())
    encoded = [processor.encode(sample) for sample in load_source(source_of(name, tmp_path), 0, tmp_path)]
    stage = Stage(name='all', trainable=('.*',), mixture={'a': 1.0}, steps=2, batch_size=2, lr=1e-3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    how = arrange([stage], {'a': encoded}, pad_token_id=0, image_tensor=processor.image_tensor)
    losses = []
    train(model, [stage], **how, out_dir=tmp_path / 'out', seed=0, progress=lambda done, of, loss: losses.append(loss))
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())


# --- checked -------------------------------------------------------------------------------------------------------------
def report_on(path, **how):
    return check(look_at(path, **how))


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_format_is_told_by_its_content_and_nothing_is_wrong(tmp_path, name):
    form, kind, file, pictures, *_ = LAYOUTS[name]
    path = write(name, tmp_path)
    found = report_on(path)
    assert (found.look.format, found.look.kind, found.said, found.samples) == (form, kind, [], len(SAMPLES[name]))
    if name != 'video':
        assert sum(count * n for count, n in found.images.items()) == sum(len(images) for images, _ in SAMPLES[name])
    assert report_on(path.parent).samples == found.samples
    assert found.failed == (1 if form == 'captions' else None)


def test_what_is_counted(tmp_path):
    found = report_on(write('665k', tmp_path)).plain()
    counts = {
        name: found[name] for name in ('samples', 'with_image', 'text_only', 'several_images', 'documents', 'bad')
    }
    assert counts == dict(samples=3, with_image=2, text_only=1, several_images=0, documents=0, bad=0)
    assert found['length'] == {'min': 3, 'median': 4, 'p95': 9, 'max': 9} and found['length_unit'] == 'words'
    assert found['length_histogram'] == [(16, 3)]
    assert found['shorter_side'] == {'min': 8, 'median': 8, 'p95': 8, 'max': 8}
    assert (
        found['repeated_ids'] == 1
        and 'entry 1' in found['repeated_ids_first'][0]
        and 'entry 0' in found['repeated_ids_first'][0]
    )
    found = report_on(write('sharegpt', tmp_path / 'x')).plain()
    assert found['turns_left_out'] == 4 and found['text_only'] == 3
    found = report_on(write('mmc4', tmp_path / 'y')).plain()
    assert (found['documents'], found['several_images'], found['images_per_sample']['max']) == (1, 1, 2)


IMAGE = {  # where an entry of a format names a picture
    '558k': lambda entry, name: entry | {'image': name},
    'm4': lambda entry, name: entry | {'image': [name, *entry['image'][1:]]},
    'obelics': lambda entry, name: entry | {'images': [name, *entry['images'][1:]]},
    'mmc4': lambda entry, name: entry | {'image_info': [entry['image_info'][0] | {'image_name': name}]},
    'video': lambda entry, name: entry | {'video': name},
}
PATHS = {
    'missing': ('gone.jpg', 'does not exist'),
    'absolute': ('/etc/passwd', 'is absolute'),
    'outside': ('../../../etc/passwd', r"contains '..'"),
    'of another system': ('C:\\x.jpg', 'is absolute'),
    'longer than any': ('x' * 300 + '.jpg', 'does not exist'),
    'a link outside': ('link.jpg', 'leads outside'),
}
BROKEN = [(name, f'path {kind}', change, *PATHS[kind]) for name, change in IMAGE.items() for kind in PATHS]
ODD_TALK = {  # turns → what is said of them
    'role': (turns('a', 'b', roles=('human', 'bard')), 'bard|0 marks'),
    'order': ([*turns('a', 'b'), *turns('c')[:1], *turns('d', 'e')], 'human and gpt in turn|0 marks'),
    'no answer': (turns('a'), 'neither conversations|0 marks'),
    'no turns': (5, 'conversations is 5; expected a list'),
    'a turn of text': (['hi', 'ho'], "conversations has 'hi'; expected objects"),
    'a value of parts': (turns(['<image>', 'x'], 'b'), r"a turn has value \['<image>', 'x'\]; expected text"),
    'a value of nothing': (turns(None, 'b'), 'a turn has value None; expected text'),
    'no value': ([{'from': 'human'}, *turns('a', 'b')[1:]], 'a turn has value None; expected text'),
    'an empty answer': (turns('a', ' '), 'is empty|0 marks'),
    'a mark in an answer': (turns('a', 'a <image>'), 'contains <image>|does not'),
    'marks without pictures': (turns('a <image> <image>?', 'b', 'c <image>', 'd'), 'must be equal|3 marks'),
}
TALK = ('558k', '665k', 'sharegpt', 'm4', 'video')
BROKEN += [
    (name, kind, lambda entry, said: entry | {'conversations': said}, said, message)
    for name in TALK
    for kind, (said, message) in ODD_TALK.items()
    if (name, kind) != ('video', 'a mark in an answer')
]
BROKEN += [
    (name, 'no object', lambda entry, _: ['x'], '', 'expected an object, found|expected an object with')
    for name in (*TALK, 'mmc4')
]
BROKEN += [
    (name, kind, change, given, message)
    for name, odd in {
        '558k': {
            'no mark': ({'conversations': turns('a', 'b')}, '1 images but 0'),
            'an image of a number': ({'image': 5}, 'expected a path or bytes, found 5'),
            'an image without a name': ({'image': ''}, "image '' does not exist"),
            'an image in an object': ({'image': {'path': '/x.jpg'}}, 'is absolute'),
        },
        'm4': {
            'a picture more': ({'image': ['nlvr2/a.jpg'] * 3}, '3 images but 2'),
            'a picture of nothing': ({'image': ['nlvr2/a.jpg', None]}, 'expected a path or bytes, found None'),
        },
        'mmc4': {
            'no such text': ({'text_list': ['x']}, 'expected image_name, and one of 1 texts'),
            'infos of text': ({'image_info': 'x'}, "image_info is 'x'; expected a list"),
            'an info of text': ({'image_info': ['x']}, "image 0 is 'x'"),
            'no texts': ({'text_list': None}, 'text_list is None; expected a list'),
            'a text of a number': ({'text_list': ['a', 'b', 1.5], 'image_info': []}, 'document part 1.5'),
            'a mark in a text': ({'text_list': ['<image>', 'a', 'b']}, 'literally'),
            'a place of text': ({'image_info': [{'image_name': 'a.jpg', 'matched_text_index': '0'}]}, 'image 0 is'),
            'nothing': ({'text_list': [], 'image_info': []}, 'neither conversations nor a document'),
        },
        'obelics': {
            'lengths': ({'texts': ['a']}, 'expected one list as long as the other'),
            'both': ({'images': ['a', 'b'], 'texts': ['a', 'b']}, 'place 0 has image'),
            'neither': ({'images': [None, 'a'], 'texts': [None, None]}, 'place 0 has image None and text None'),
            'not fetched': (
                {'images': ['http://a.b/x.jpg', None], 'texts': [None, 'a']},
                "x.jpg' does not exist: no list in",
            ),
            'no text': ({'images': ['http://a.b/red.jpg'], 'texts': [None]}, 'has no text'),
            'a mark in a text': ({'images': [None], 'texts': ['an <image> tag']}, 'literally'),
        },
        'video': {
            'two marks': ({'conversations': turns('<image><video>', 'b')}, '2 marks'),
            'a video of a number': ({'video': 5}, 'video is 5; expected a path'),
            'a question of a number': ({'QA': [{'q': 5, 'a': 'x'}]}, 'QA 0 is'),
            'an answer of nothing': ({'QA': [{'q': 'x'}]}, 'QA 0 is'),
            'no path': ({'video': ''}, "video '' does not exist"),
            'no questions': ({'QA': []}, '0 marks'),
            'questions of text': ({'QA': 'x'}, "QA is 'x'; expected a list"),
        },
    }.items()
    for kind, (given, message) in odd.items()
    for change in [lambda entry, given: entry | given]
]
BROKEN += [
    (name, kind, lambda entry, text: ('000000007', text, *entry[2:]), text, message)
    for name in ('shards', 'rows')
    for kind, text, message in (('no caption', ' ', 'is empty'), ('a mark', 'an <image> tag', 'contains <image>'))
]


@pytest.mark.parametrize('name,kind,change,given,message', BROKEN, ids=[f'{b[0]}: {b[1]}' for b in BROKEN])
def test_a_broken_entry_is_found_and_the_good_ones_counted(tmp_path, name, kind, change, given, message):
    form, storage, file, pictures, own, _ = LAYOUTS[name]
    path = write(name, tmp_path, [own[0], change(own[0], given), *own[1:]])
    folder = (path.parent / pictures).resolve()
    (folder / 'link.jpg').unlink(missing_ok=True)
    (folder / 'link.jpg').symlink_to('/etc/passwd')
    found = report_on(path, folder=folder)
    assert found.bad == 1 and found.samples == len(SAMPLES[name]), found.said
    assert path.name in found.said[0]
    assert re.search(message, found.said[0]), found.said
    with pytest.raises((ValueError, NotImplementedError), match=message):
        load_source(source_of(name, tmp_path), 0, tmp_path)
    with pytest.warns(UserWarning, match='1 bad records'):
        assert len(load_source(source_of(name, tmp_path, skip=1), 0, tmp_path)) == len(SAMPLES[name])


MEMBERS = {  # of a key in a shard → what is said of it
    'no picture': ([('7.txt', b'a'), ('7.json', b'{}')], 'expected one picture'),
    'two pictures': ([('7.jpg', JPG['red']), ('7.png', JPG['red']), ('7.txt', b'a')], 'expected one picture'),
    'no text': ([('7.jpg', JPG['red'])], 'no caption'),
    'no text in json': ([('7.jpg', JPG['red']), ('7.json', b'{"caption": null}')], 'no caption'),
    'text that is none': ([('7.jpg', JPG['red']), ('7.txt', b'\xff\xfe')], 'codec'),
    'broken json': ([('7.jpg', JPG['red']), ('7.json', b'{')], 'Expecting property name'),
    'a key that comes at once again': ([('1.jpg', JPG['red']), ('1.txt', b'another')], None),
}


@pytest.mark.parametrize('kind', MEMBERS)
def test_a_broken_key_of_a_shard_is_found(tmp_path, kind):
    odd, message = MEMBERS[kind]
    good = [('1.jpg', JPG['red']), ('1.txt', b'one'), *odd, ('2.jpg', JPG['blue']), ('2.json', b'{"caption": "two"}')]
    path = shard_of(tmp_path / 'x' / '00000.tar', good)
    found = report_on(path)
    source = Source(kind='tar', name='x/00000.tar', options={'format': 'captions'})
    if message is None:  # a reader of webdataset gives both; here their names are the same
        assert (found.samples, found.repeated) == (3, 1)
        message = "'00000#1' is already used"
    else:
        assert found.samples == 2 and re.search(f'00000.tar: 7: .*{message}', found.said[0]), found.said
    with pytest.raises(ValueError, match=message):
        load_source(source, 0, tmp_path)


def test_ids_that_no_file_of_text_can_have(tmp_path):
    said = turns('hi', 'ho')
    put(
        tmp_path,
        'a/a.json',
        b'['
        + b', '.join(b'{"id": "\\ud800", "conversations": %s}' % json.dumps(said).encode() for _ in range(2))
        + b']',
    )
    found = report_on(tmp_path / 'a')
    assert (found.samples, found.repeated, found.bad) == (2, 1, 0)
    done = CliRunner().invoke(app, ['data', 'check', str(tmp_path / 'a')])
    assert done.exit_code == 0, done.output


def test_the_format_of_the_house_is_checked_too(tmp_path):
    said = turns('<image> or <image>?', 'red')
    entry = {'id': 'a', 'images': ['red.png', 'red.png'], 'conversations': said, 'left_out': 5, 'absent': 'x'}
    put(tmp_path, 'set/red.png', JPG['red'])
    lines = [entry, {'id': 'b', 'document': 'x'}, entry, entry | {'id': 'c', 'images': []}]
    put(tmp_path, 'set/train.jsonl', '\n'.join(map(json.dumps, lines)).encode() + b'\n{"id": ')
    found = report_on(tmp_path / 'set')
    assert (found.look.format, found.samples, found.shape['several images'], found.shape['documents']) == (
        'own',
        2,
        1,
        1,
    )
    said = ['already used in train.jsonl:1', '0 images but 2', 'train.jsonl:5: broken JSON line']
    assert len(found.said) == 3 and all(map(lambda part, whole: part in whole, said, found.said)), found.said
    about = json.dumps({'conversations': turns('<image>', 'red')}).encode()
    found = report_on(shard_of(tmp_path / 't.tar', [('a.json', about), ('a.png', JPG['red'])]))
    assert (found.look.format, found.samples) == ('own', 1)
    rows = [{'id': 'a', 'document': 'x', 'when': datetime.datetime.now()}]
    as_rows(tmp_path / 'p.parquet', rows)
    assert 'a further field is no JSON' in report_on(tmp_path / 'p.parquet').said[0]


def cut(content):
    return content[: len(content) // 2]


FILES = {
    'cut': cut,
    'empty': lambda content: b'',
    'packed': gzip.compress,
    'zipped': lambda content: b'PK\x03\x04' + content,
    'noise': lambda content: b'\xff\xfe\x00' + content,
}


@pytest.mark.parametrize('damage', FILES)
@pytest.mark.parametrize('name', LAYOUTS)
def test_a_broken_file_is_found_beside_a_good_one(tmp_path, name, damage):
    form, _, file, pictures, own, _ = LAYOUTS[name]
    good = write(name, tmp_path)
    bad = good.with_stem('zz' + good.stem)
    bad.write_bytes(FILES[damage](good.read_bytes()))
    found = report_on(good.parent, folder=(good.parent / pictures).resolve())
    if name == 'shards' and damage == 'packed':  # tar reads them
        assert found.bad == 0 and found.samples == 2 * len(SAMPLES[name])
        return
    assert found.bad >= 1 and found.samples >= len(SAMPLES[name])
    assert any(bad.name in said for said in found.said), found.said
    source = source_of(name, tmp_path).model_copy(update={'name': os.path.relpath(bad, tmp_path)})
    with pytest.raises(
        ValueError, match='has no samples' if bad.suffix == '.jsonl' and damage == 'empty' else bad.name
    ):
        load_source(source, 0, tmp_path)


def test_damaged_pictures_are_found_when_all_are_decoded(tmp_path):
    path = write('m4', tmp_path)
    put(tmp_path, 'm4/nlvr2/b.jpg', JPG['blue'][:300])
    assert report_on(path).bad == 0
    found = check(look_at(path), decode=True)
    assert found.bad == 1 and 'b.jpg' in found.said[0] and found.samples == 1
    put(tmp_path, 'm4/nlvr2/a.jpg', b'<html>not found</html>')
    assert report_on(path).unread == 3


def test_a_licence_is_quoted_or_its_absence_said(tmp_path):
    path = write('mmc4', tmp_path)
    assert report_on(path).licence == []
    put(tmp_path, 'mmc4/README.md', b'---\nlicense: odc-by\ntags: [x]\n---\n# mmc4')
    put(tmp_path, 'mmc4/LICENSE', b'\n  Open Data Commons Attribution License\n')
    assert report_on(path).licence == [
        'LICENSE begins: Open Data Commons Attribution License',
        'README.md says license: odc-by',
    ]
    put(tmp_path, 'mmc4/README.md', b'---\n' + b'[' * 5000 + b'\n---\n')
    assert len(report_on(path).licence) == 1


def test_the_command(tmp_path):
    path = write('665k', tmp_path)
    done = CliRunner().invoke(app, ['data', 'check', str(path)])
    assert done.exit_code == 0 and 'all well' in done.output and 'no licence found beside it' in done.output, (
        done.output
    )
    bad = [LAYOUTS['665k'][4][0] | {'image': f'{n}.jpg'} for n in range(30)]
    write('665k', tmp_path, [*LAYOUTS['665k'][4], *bad])
    done = CliRunner().invoke(app, ['data', 'check', str(path)])
    assert done.exit_code == 1 and '30 bad, 10 of them not shown' in done.output
    assert done.output.count('does not exist') == 20
    done = CliRunner().invoke(app, ['data', 'check', str(path), '--json', '--limit', '2'])
    assert done.exit_code == 0 and json.loads(done.output)['stopped_early']
    wrong = CliRunner().invoke(app, ['data', 'check', str(tmp_path / 'nothing')])
    assert wrong.exit_code == 1 and 'does not exist' in wrong.output
    put(tmp_path, 'odd/train.json', b'[{"question": "x"}]')
    wrong = CliRunner().invoke(app, ['data', 'check', str(tmp_path / 'odd')])
    assert wrong.exit_code == 1 and "['question']" in wrong.output and '--format' in wrong.output


def test_lengths_are_those_of_a_saved_processor(tmp_path):
    from mllm_replica.honeybee.model import HoneybeeProcessor

    model = model_of('honeybee')
    model.save_pretrained(tmp_path / 'saved')
    processor = HoneybeeProcessor.from_config(model.config, byte_tokenizer())
    processor.save_pretrained(tmp_path / 'saved')
    path = write('665k', tmp_path)
    lengths = sorted(len(processor.encode(sample)) for sample in load_source(source_of('665k', tmp_path), 0, tmp_path))
    done = CliRunner().invoke(app, ['data', 'check', str(path), '--paper', str(tmp_path / 'saved'), '--json'])
    found = json.loads(done.output)
    assert (found['length']['min'], found['length']['max']) == (lengths[0], lengths[-1])
    assert found['max_length'] == {'pretrain': 1024, 'instruct': 1024} and found['cut_share'] == {
        'pretrain': 0,
        'instruct': 0,
    }
    wrong = CliRunner().invoke(app, ['data', 'check', str(path), '--paper', str(path.parent)])
    assert wrong.exit_code == 1 and 'no processor' in wrong.output
    wrong = CliRunner().invoke(app, ['data', 'check', str(path), '--paper', 'owl3'])
    assert wrong.exit_code == 1 and 'Qwen/Qwen2-7B-Instruct' in wrong.output


FLAT = """
import json, re, sys
from pathlib import Path
from mllm_replica.data.checking import check
from mllm_replica.data.guessing import look_at

def own():
    return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024

path, seen = Path(sys.argv[1]), []
found = check(look_at(path), tell=lambda file, count: seen.append(own()) if count % 3_000 == 1 else None)
print('FOUND', found.samples, seen[1], max(seen))
"""


@pytest.mark.parametrize(
    'count,ending',
    [(10_000, 'json')] + [pytest.param(100_000, ending, marks=pytest.mark.nightly) for ending in ('json', 'jsonl')],
)
def test_memory_stays_flat(tmp_path, count, ending):
    said = turns('What is to be seen here, and where is it?', 'A square. ' * 20)
    lines = (json.dumps({'id': str(n), 'conversations': said}) for n in range(count))
    text = '\n'.join(lines) if ending == 'jsonl' else f'[{", ".join(lines)}]'
    (tmp_path / f'a.{ending}').write_text(text)
    done = subprocess.run([sys.executable, '-c', FLAT, tmp_path / f'a.{ending}'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    samples, first, most = map(float, done.stdout.split('FOUND')[1].split())
    assert samples == count and most - first < 12, (first, most)  # MB; the files have 3 and 33
