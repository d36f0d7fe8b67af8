"""The world of cut-outs on photographs: right by the pixels, split, keyed by the pictures that lie there."""

import json
import os
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_replica.core.recipe import Source
from mllm_replica.core.settings import settings
from mllm_replica.data.images import encode_png, open_image
from mllm_replica.data.samples import check_sample
from mllm_replica.data.sources import check_images, load_source
from mllm_replica.data.worlds import pictures as pasted
from mllm_replica.data.worlds.making import build_world, samples
from mllm_replica.data.worlds.stamps import PLACES, SAYINGS, SPOKEN, STAMPS
from mllm_replica.data.worlds.table import WORLDS, world_files
from mllm_replica.data.worlds.vocabulary import vocabulary, words_of
from mllm_replica.data.worlds.world import COLORS
from mllm_replica.running.journal import data_hash

TASKS = [task for task in STAMPS.tasks if task not in ('same', 'beside')]
NEEDS = dict(beside=dict(things=[2, 3]), many=dict(things=[1, 4]), same=dict(images=2))


@pytest.fixture(scope='module')
def letters(tmp_path_factory):
    pasted.draw_letters(place := tmp_path_factory.mktemp('letters'))
    return place


@pytest.fixture(autouse=True)
def pictures(letters, tmp_path, monkeypatch):
    "Letters in the run folder."
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path / 'runs'))
    settings.cache_clear()
    shutil.copytree(letters, tmp_path / 'runs' / 'packaged')
    yield tmp_path / 'runs' / 'packaged'
    settings.cache_clear()


def asked(sample):
    turns = [turn['value'].split('\n')[-1] for turn in sample['conversations']]
    return list(zip(turns[::2], turns[1::2]))


def scene_of(sample):
    return json.loads(sample['meta'])


def middle_of(image, color):
    "Where a picture has a colour, per mille."
    near = np.abs(np.asarray(image, dtype=int) - COLORS[color]).max(-1) < 25
    assert near.sum() > 30, color
    return np.argwhere(near).mean(0)[::-1] * 1000 / near.shape[0]


def side_of(x, y):
    far = dict(left=500 - x, right=x - 500, top=500 - y, bottom=y - 500)
    return max(far, key=far.get)


ROUND = [(np.cos(angle), np.sin(angle)) for angle in np.arange(16) * np.pi / 8]


def color_of(pixel):
    "The name of a colour of cards; empty if it is none."
    return next((name for name in COLORS if np.abs(pixel - COLORS[name]).max() < 3), '')


def expected(question, scene):
    "The answer by the scene, written anew."
    number = re.search(r' in picture (\d+)', question)
    picture = scene['pictures'][int(number.group(1)) - 1 if number else 0]
    things = picture['things']
    kinds = Counter(thing['kind'] for thing in things)
    named = {thing['kind']: thing for thing in things}
    placed = {thing['place']: thing for thing in things}
    question = question.replace(number.group(0), '') if number else question
    if found := re.fullmatch(r'what is (?:on|at) the (\w+)\?', question):
        return placed[found.group(1)]['kind']
    if found := re.fullmatch(r'where is the (\w+)\?', question):
        assert kinds[found.group(1)] == 1
        return side_of(*named[found.group(1)]['middle'])
    if found := re.fullmatch(r'is the (\w+) (left|above) or (right|below)(?: of)? the (\w+)\?', question):
        one, other = named[found.group(1)]['middle'], named[found.group(4)]['middle']
        axis = int(found.group(2) == 'above')
        assert abs(one[axis] - other[axis]) > 100 and kinds[found.group(1)] == kinds[found.group(4)] == 1
        return found.group(2 + (one[axis] > other[axis]))
    if question == 'how many things are there?':
        return str(len(things))
    if found := re.fullmatch(r'how many of the kind (\w+) are there\?', question):
        return str(kinds[found.group(1)])
    if found := re.fullmatch(r'is there an? (\w+)\?', question):
        return 'yes' if kinds[found.group(1)] else 'no'
    if found := re.fullmatch(r'what color is the card behind the (\w+)\?', question):
        assert kinds[found.group(1)] == 1
        return named[found.group(1)]['card']
    if found := re.fullmatch(r'what color is the card (?:on|at) the (\w+)\?', question):
        return placed[found.group(1)]['card']
    if question == 'what does the label say?':
        return picture['label']['word']
    found = re.fullmatch(r'do picture (\d) and picture (\d) show the same kind of thing\?', question)
    one, other = ({thing['kind'] for thing in scene['pictures'][int(i) - 1]['things']} for i in found.groups())
    return 'yes' if one & other else 'no'


@pytest.mark.parametrize('task', STAMPS.tasks)
def test_answers_are_those_of_the_scene(task):
    known = {*vocabulary(), *STAMPS.words(), '<image>'}
    for images in (2,) if task == 'same' else (1, 3):
        options = dict(pixels=32, tasks=[task], turns=2, questions=2) | NEEDS.get(task, {}) | dict(images=images)
        options |= dict(turns=1, questions=1) if task in ('beside', 'label', 'same', 'count', 'caption') else {}
        options |= dict(things=[2, 3]) if task in ('which', 'where', 'color') else {}
        for sample in samples('stamps', 'train', 0, 12, **options):
            check_sample(sample)
            assert len(sample['images']) == images and sample['task'] == task
            for question, answer in asked(sample):
                assert {*words_of(question + ' ' + answer)} <= known
                if task != 'caption':
                    assert answer == expected(question, scene_of(sample))
                    assert answer in sample['options']


def test_a_caption_names_everything_once():
    for sample in samples('stamps', 'train', 0, 20, pixels=32, tasks=['caption'], things=[1, 4]):
        said = re.findall(r'an? (\w) (?:on|at) the (\w+)', sample['answer'])
        things = scene_of(sample)['pictures'][0]['things']
        assert sorted(said) == sorted((thing['kind'], thing['place']) for thing in things)
        order = [place for _, place in said]
        assert order == [place for place in ('left', 'top', 'bottom', 'right') if place in order]


@pytest.mark.parametrize('pixels', [64, 224])
def test_things_lie_where_the_answer_says(pixels):
    seen = Counter()
    for sample in samples('stamps', 'test', 1, 25, pixels=pixels, tasks=['where'], things=[1, 1]):
        image, thing = open_image(sample['images'][0]), scene_of(sample)['pictures'][0]['things'][0]
        assert image.size == (pixels, pixels)
        middle = middle_of(image, thing['name'][2:-4])
        assert side_of(*middle) == sample['answer']
        assert np.abs(middle - thing['middle']).max() < 90  # a letter's ink is not all in its middle
        seen[sample['answer']] += 1
    assert set(seen) == set(PLACES)


def test_a_card_has_its_color_around_its_thing_and_only_there():
    for sample in samples('stamps', 'train', 2, 25, pixels=112, tasks=['color'], things=[1, 4], turn=0, colors=5):
        image, (picture,) = np.asarray(open_image(sample['images'][0]), int), scene_of(sample)['pictures']
        assert any(thing['card'] for thing in picture['things'])
        for thing in picture['things']:
            around = [(np.array(thing['middle']) + 0.57 * thing['extent'] * np.array(turn)) * 0.112 for turn in ROUND]
            seen = Counter(color_of(image[min(int(y), 111), min(int(x), 111)]) for x, y in around)
            del seen[thing['name'][2:-4]]  # of the letter itself
            assert max(seen, key=seen.get) == thing['card'], (seen, thing)


def test_a_label_is_white_with_dark_signs_that_differ():
    pictures = {}
    for sample in samples('stamps', 'train', 0, 40, tasks=['label'], things=[1, 2], labels=4):
        image, label = np.asarray(open_image(sample['images'][0]), int), scene_of(sample)['pictures'][0]['label']
        x, y = (round(middle * 0.224) for middle in label['middle'])
        cut = image[y - 12 : y + 12, x - 34 : x + 34]
        assert 0.03 < (cut.max(-1) < 100).mean() < 0.5 < (cut.min(-1) > 200).mean()
        pictures.setdefault(label['word'], cut)
    assert set(pictures) == set(SPOKEN[:4])
    one, *others = pictures.values()
    assert all((one != other).mean() > 0.05 for other in others)


@pytest.mark.parametrize('options', [{}, dict(held_out=True), dict(images=2, tasks=['same'])], ids=str)
def test_splits_share_no_picture(options):
    found = {
        split: [
            picture
            for sample in samples('stamps', split, seed, 40, pixels=32, **options)
            for picture in scene_of(sample)['pictures']
        ]
        for seed, split in enumerate(('train', 'test'))
    }
    parts = {split: {json.dumps(picture, sort_keys=True) for picture in there} for split, there in found.items()}
    assert not parts['train'] & parts['test'] and min(map(len, parts.values())) > 30
    names = {
        split: {thing['name'] for picture in there for thing in picture['things']} for split, there in found.items()
    }
    assert bool(names['train'] & names['test']) != ('held_out' in options)


def test_name_and_seed_give_the_bytes_and_the_scenes_of_any_size():
    options = dict(pixels=64, tasks=TASKS, turns=4)
    one, again = (list(samples('stamps', 'train', 3, 6, **options)) for _ in range(2))
    assert one == again and one[:3] == list(samples('stamps', 'train', 3, 3, **options))
    assert one != list(samples('stamps', 'train', 4, 6, **options))
    large = list(samples('stamps', 'train', 3, 6, **options | dict(pixels=224)))
    assert [scene_of(sample) for sample in large] == [scene_of(sample) for sample in one]


def blind(name, task, **options):
    "What the question alone is worth on 300 test questions."
    said, right, small = defaultdict(Counter), 0, dict(pixels=32) if name == 'stamps' else {}
    for sample in samples(name, 'train', 1, 600, tasks=[task], **small, **options):
        said[asked(sample)[0][0]][sample['answer']] += 1
    everything = sum(said.values(), Counter())
    rows = list(samples(name, 'test', 1, 300, tasks=[task], **small, **options))
    for sample in rows:
        right += sample['answer'] == said.get(asked(sample)[0][0], everything).most_common(1)[0][0]
    return right / len(rows)


@pytest.mark.nightly
@pytest.mark.parametrize('task', STAMPS.tasks)
def test_the_question_alone_is_worth_little(task):
    most = dict(which=0.15, where=0.35, count=0.42, many=0.5, color=0.27, label=0.17, caption=0.05)
    assert blind('stamps', task, **NEEDS.get(task, {})) < most.get(task, 0.6)


@pytest.mark.parametrize('task', ['present', 'same'])
def test_half_of_the_answers_are_yes(task):
    rows = samples('stamps', 'train', 0, 160, pixels=32, tasks=[task], **NEEDS.get(task, {}))
    assert 55 < sum(sample['answer'] == 'yes' for sample in rows) < 105


def test_sayings():
    known, seen = {*vocabulary(), *SAYINGS.words()}, set()
    for sample in samples('sayings', 'train', 0, 60, tasks=list(SAYINGS.tasks)):
        ((question, answer),) = asked(sample)
        assert not sample['images'] and {*words_of(question + ' ' + answer)} <= known
        words = [
            word
            for word in words_of(question.partition('alphabet,' if 'alphabet' in question else ':')[2])
            if word.isalpha() and word != 'or'
        ]
        right = {'first': min(words), 'repeat': ' '.join(words), 'words': str(len(words))}
        assert answer == right[sample['task']] and set(words) <= set(SPOKEN)
        seen.add(sample['task'])
    assert seen == set(SAYINGS.tasks)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(things=[0, 2]), r'things is \[0, 2\]; expected \[low, high\], 1 to 4'),
        (dict(things=[3, 2]), 'things is'),
        (dict(things=[1]), 'things is'),
        (dict(things=[1, 2, 3]), 'things is'),
        (dict(things=[1, 4], tasks=['label']), '1 to 3 things'),
        (dict(things=[1, 2], tasks=['beside']), '2 to 4 things'),
        (dict(tasks=['same']), "from 2 if 'same'"),
        (dict(images=0), 'images is 0'),
        (dict(kinds=27), 'kinds is 27; expected 4 to 26, for 26 kinds have cut-outs'),
        (dict(kinds=3), 'kinds is 3; expected 4'),
        (dict(colors=9), 'colors is 9; expected 2 to 7'),
        (dict(labels=1), 'labels is 1'),
        (dict(extent=500), 'extent is 500'),
        (dict(turn=-1), 'turn is -1'),
        (dict(fade=100), 'fade is 100'),
        (dict(pixels=8), 'pixels is 8'),
    ],
    ids=str,
)
def test_options_that_allow_no_scene(options, message):
    with pytest.raises(ValueError, match=message):
        list(samples('stamps', 'train', 0, 1, **options))


def test_no_pictures_says_both_ways(pictures):
    pictures.rename(pictures.with_name('elsewhere'))
    for use in (lambda: build_world('stamps', 'train', 0, 2), STAMPS.words, lambda: world_files('stamps')):
        with pytest.raises(
            FileNotFoundError, match=r'run mllm-replica fetch cutouts.*put your own into .*cutouts \(KIND/NAME'
        ):
            use()


def test_own_pictures_win(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(pasted, 'data_folder', lambda: tmp_path / 'own')
    shutil.copytree(pictures / 'cutouts', tmp_path / 'own' / 'cutouts')
    (tmp_path / 'own' / 'cutouts' / 'a').rename(tmp_path / 'own' / 'cutouts' / 'dog')
    assert 'dog' in pasted.kinds() and 'a' not in pasted.kinds()


def test_the_package_s_pictures_are_called_by_the_table(pictures):
    shutil.rmtree(pictures / 'cutouts')
    for names in pasted.KINDS.values():
        for name in names:
            path = pictures / 'cutouts' / f'{name}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGBA', (4, 2), 'red').save(path)
    (pictures / 'cutouts' / 'fruit' / 'quince.png').write_bytes(path.read_bytes())
    (pictures / 'cutouts' / 'source.json').write_text(json.dumps(dict(package='tuxpaint-stamps-default')))
    assert set(pasted.kinds()) == set(pasted.KINDS) and not any(
        'quince' in str(names) for names in pasted.kinds().values()
    )
    counts = [len(names) for names in pasted.kinds().values()]
    assert counts == sorted(counts, reverse=True)
    rows = list(samples('stamps', 'train', 0, 10, pixels=32, tasks=['which']))
    assert all(
        thing['name'][:-4] in pasted.KINDS[thing['kind']]
        for row in rows
        for thing in scene_of(row)['pictures'][0]['things']
    )
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path.relative_to(pictures / 'cutouts'))[:-4])):
        pasted.kinds()


def test_a_ground_called_like_a_kind_is_left_out(pictures):
    shutil.copyfile(pictures / 'backgrounds' / 'grey110.png', pictures / 'backgrounds' / 'a.png')
    assert pasted.grounds() == ['grey110.png', 'grey160.png']
    for name in pasted.grounds():
        (pictures / 'backgrounds' / name).unlink()
    with pytest.raises(ValueError, match='not called like a kind'):
        list(samples('stamps', 'train', 0, 1))


def damaged(kind):
    "What goes wrong with one picture, given its path."
    return {
        'text': lambda path: path.write_text('no picture'),
        'cut': lambda path: path.write_bytes(path.read_bytes()[:-40]),
        'empty': lambda path: path.write_bytes(b''),
        'invisible': lambda path: Image.new('RGBA', (9, 9)).save(path),
        'vector': lambda path: path.write_text('<svg/>'),
    }[kind]


@pytest.mark.parametrize('kind', ['text', 'cut', 'empty', 'invisible', 'vector'])
def test_a_damaged_cutout_is_named(pictures, kind):
    for path in (pictures / 'cutouts').rglob('*.png'):
        damaged(kind)(path)
    with pytest.raises(ValueError, match=r'cutouts/\w/\w+\.png.*replace or remove it'):
        list(samples('stamps', 'train', 0, 3, pixels=32))


@pytest.mark.parametrize('mode', ['P', 'LA', 'L', 'RGB', '1', 'I;16', 'CMYK'])
def test_cutouts_of_any_mode(pictures, mode):
    ending = 'jpg' if mode == 'CMYK' else 'png'
    Image.new('L' if mode == 'I;16' else mode, (30, 60), (1, 255) if mode == 'LA' else 1).save(
        pictures / 'cutouts' / 'a' / f'own.{ending}'
    )
    cut = pasted.open_cutout(f'a/own.{ending}', 20)
    assert cut.mode == 'RGBA' and cut.size == (10, 20) and cut.getchannel('A').getextrema() == (255, 255)


@pytest.mark.parametrize(
    'name, message', [('Ice Cream', 'rename the folder'), ('dog2', 'rename'), ('empty', 'holds no picture')]
)
def test_a_folder_that_is_no_kind(pictures, name, message):
    (pictures / 'cutouts' / name).mkdir()
    with pytest.raises(ValueError, match=message):
        list(samples('stamps', 'train', 0, 1))


def test_what_does_not_count(pictures):
    before = pasted.identity(), pasted.kinds()
    (pictures / 'cutouts' / 'source.json').write_text('{}')
    (pictures / 'cutouts' / '.hidden').mkdir()
    (pictures / 'cutouts' / 'a' / '.one.png').write_bytes(b'')
    (pictures / 'cutouts' / 'a' / 'white.txt').write_text('a white letter')
    (pictures / 'backgrounds' / 'index.json').write_text('{}')
    assert (pasted.identity(), pasted.kinds()) == before


def recipe():
    "One that shows stamps, and one that does not."
    from mllm_replica.core.registry import recipes_of

    plain = recipes_of('honeybee')
    table = plain.tables('smoke')[0]
    row = next(row for row, reason in plain.rows(table, 'smoke').items() if reason is None)
    made = plain.recipe(table, row, 'smoke', 0)
    world = Source(kind='world', name='stamps', split='train', size=4)
    return made.model_copy(update=dict(sources=made.sources | {'more': world})), made


@pytest.mark.parametrize('change', ['content', 'another', 'fewer', 'name', 'ground'])
def test_other_pictures_are_other_data(pictures, change):
    shown, plain = recipe()

    def keys():
        return build_world('stamps', 'train', 0, 2, pixels=32).name, data_hash(shown), data_hash(plain)

    before = keys()
    assert keys() == before and world_files('stamps') and not world_files('tiles')
    path = pictures / 'cutouts' / 'a' / 'white.png'
    if change == 'content':
        stamp = path.stat()
        path.write_bytes(encode_png(Image.new('RGB', (9, 9), 'red')))
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    elif change == 'another':
        Image.new('RGB', (9, 9)).save(path.with_name('pink.png'))
    elif change == 'fewer':
        path.unlink()
    elif change == 'name':
        path.rename(path.with_name('pink.png'))
    else:
        Image.new('RGB', (90, 90)).save(pictures / 'backgrounds' / 'more.jpg')
    after = keys()
    assert after[0] != before[0] and after[1] != before[1] and after[2] == before[2]


def test_the_same_pictures_elsewhere_are_the_same_data(pictures, tmp_path, monkeypatch):
    before = pasted.identity(), [sample['images'][0]['bytes'] for sample in samples('stamps', 'train', 0, 3)]
    (tmp_path / 'moved').mkdir()
    pictures.rename(tmp_path / 'moved' / 'packaged')
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path / 'moved'))
    settings.cache_clear()
    assert (pasted.identity(), [sample['images'][0]['bytes'] for sample in samples('stamps', 'train', 0, 3)]) == before


def test_load_source_reads_stamps():
    rows = load_source(
        Source(kind='world', name='stamps', split='test', size=8, options=dict(images=2, pixels=64)), seed=2
    )
    assert len(rows) == 8 and all(len(images) == 2 for images in rows['images']) and check_images(rows)[1] == []


@pytest.mark.nightly
def test_the_packages_pictures(monkeypatch):
    "Only where they were fetched: each of the table is there and can be shown."
    place = Path(__file__).parents[1] / 'runs'
    if not (place / 'packaged' / 'cutouts').is_dir():
        pytest.skip('run mllm-replica fetch cutouts first')
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(place))
    settings.cache_clear()
    for names in pasted.kinds().values():
        for name in names:
            cut = np.asarray(pasted.open_cutout(name, 60))
            assert 0.05 < (cut[..., 3] > 128).mean() < 0.99, name
    rows = list(samples('stamps', 'test', 0, 30, kinds=len(pasted.kinds()), tasks=TASKS))
    assert len(rows) == 30


def test_worlds_are_in_the_table():
    assert WORLDS['stamps'] is STAMPS and WORLDS['sayings'] is SAYINGS
