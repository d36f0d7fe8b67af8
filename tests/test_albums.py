"""Albums and clips told as albums: answers are right by the pixels, chance levels are known, splits share no picture."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from mllm_replica.core.recipe import Source
from mllm_replica.core.settings import settings
from mllm_replica.data.images import open_image
from mllm_replica.data.samples import check_sample
from mllm_replica.data.sources import check_images, load_source
from mllm_replica.data.worlds.albums import ALBUMS, FRAMES
from mllm_replica.data.worlds.making import samples
from mllm_replica.data.worlds.table import WORLDS
from mllm_replica.data.worlds.world import COLORS, TONES


def album(split='train', seed=0, size=200, **options):
    return list(samples('albums', split, seed, size, **options))


def asked(sample):
    question, answer = (turn['value'] for turn in sample['conversations'])
    return question.split('\n')[-1], answer


@pytest.fixture
def empty_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


def cells(image):
    "Colour names by place, read from the middle of each cell of a flat picture; empty cells are left out."
    pixels, names = np.asarray(open_image(image)), {value: name for name, value in COLORS.items()}
    middle = {
        (row, column): tuple(pixels[row * 8 + 4, column * 8 + 4].tolist()) for row in range(4) for column in range(4)
    }
    assert all(value in names or value in TONES.values() for value in middle.values())
    return {place: names[value] for place, value in middle.items() if value in names}


def expected(question, pictures, options):
    "The answer by the question's words and the cells of the pictures."
    numbers = [int(n) for n in re.findall(r'\d+', question)]
    if question.startswith('in picture'):
        return pictures[numbers[0] - 1][numbers[1] - 1, numbers[2] - 1]
    colors = [next(iter(picture.values())) for picture in pictures]
    if question.startswith('which'):
        return str(colors.index(question.split()[-1]) + 1)
    if question.startswith('does'):
        return 'yes' if colors[numbers[0] - 1] == colors[numbers[1] - 1] else 'no'
    return colors[(numbers or [1])[0] - 1]


@pytest.mark.parametrize(
    'tasks, options',
    [
        (['color', 'which', 'same'], dict(images=[2, 6])),
        (['color', 'shape', 'cell'], {}),
        (['cell'], dict(fill=True, images=[1, 3])),
        (['color'], dict(images=[8, 32])),
    ],
)
def test_answers_follow_from_the_pixels(tasks, options):
    for sample in album(tasks=tasks, **options):
        check_sample(sample)
        pictures, (question, answer) = [cells(image) for image in sample['images']], asked(sample)
        assert answer == expected(question, pictures, sample['options']) and answer in sample['options']
        assert all(len(picture) == (16 if 'fill' in options else 1) for picture in pictures)
        if question.startswith('which'):
            assert [c for p in pictures for c in p.values()].count(question.split()[-1]) == 1


def test_several_shapes_are_told_apart_by_number_and_kind():
    for sample in album(tasks=['shape'], shapes=3, images=[2, 4]):
        pictures, (question, answer) = json.loads(sample['meta'])['pictures'], asked(sample)
        kind, number = re.fullmatch(r'what color is the (\w+) in picture (\d)', question).groups()
        (shape,) = [shape for shape in pictures[int(number) - 1]['shapes'] if shape['kind'] == kind]
        assert cells(sample['images'][int(number) - 1])[shape['row'], shape['column']] == shape['color'] == answer


def test_kinds_look_different():
    looks = {}
    for sample in album(tasks=['kind'], images=[1, 1], size=300):
        image, ground = np.asarray(open_image(sample['images'][0])), json.loads(sample['meta'])['pictures'][0]['tint']
        looks.setdefault(sample['answer'], set()).add(int((image != TONES[ground]).any(-1).sum()))
    assert len(looks) == 3 and all(len(sizes) == 1 for sizes in looks.values()) and len(set.union(*looks.values())) == 3


@pytest.mark.parametrize(
    'task, images, answers',
    [('color', [4, 4], 8), ('kind', [4, 4], 3), ('which', [4, 4], 4), ('same', [2, 2], 2), ('same', [6, 6], 2)],
)
def test_no_answer_is_favoured(task, images, answers):
    counts = Counter(sample['answer'] for sample in album(tasks=[task], images=images, size=600))
    assert len(counts) == answers and all(0.75 < count * answers / 600 < 1.3 for count in counts.values()), counts


def test_every_picture_is_asked_about_and_every_length_occurs():
    numbers = Counter((len(s['images']), int(asked(s)[0].split()[-1])) for s in album(size=800, tasks=['color']))
    assert sorted(numbers) == [(n, k) for n in (1, 2, 3, 4) for k in range(1, n + 1)]
    assert all(140 < sum(count for (n, _), count in numbers.items() if n == length) < 260 for length in (1, 2, 3, 4))


@pytest.mark.parametrize(
    'options', [dict(images=[1, 4]), dict(images=[16, 16]), dict(images=[1, 2], shapes=3, tasks=['shape'])]
)
def test_splits_share_no_picture_whatever_the_seed(options):
    pictures = {
        split: {
            bytes(image['bytes']) for seed in seeds for s in album(split, seed, 60, **options) for image in s['images']
        }
        for split, seeds in dict(train=(0, 1), test=(0, 7)).items()
    }
    assert len(pictures['train']) > 100 and len(pictures['test']) > 100 and not pictures['train'] & pictures['test']


def test_texture_leaves_scene_and_question_alone():
    flat, textured = album(size=20), album(size=20, style='textured')
    assert [(s['meta'], asked(s)) for s in flat] == [(s['meta'], asked(s)) for s in textured]
    assert all(a['images'][0]['bytes'] != b['images'][0]['bytes'] for a, b in zip(flat, textured))
    assert album(size=20) == flat != album(size=20, seed=1)


@pytest.mark.parametrize(
    'task, question',
    [
        ('color', r'what color is picture \d'),
        ('kind', r'what shape is in picture \d'),
        ('shape', r'what color is the (circle|square|triangle) in picture \d'),
        ('cell', r'in picture \d what color is row \d column \d'),
        ('which', r'which picture is [a-z]+'),
        ('same', r'does picture \d have the same color as picture \d'),
        ('choice:color', r'what color is picture \d there are several options :( [a-d] : [a-z]+){4} \.'),
    ],
)
def test_a_question_ends_in_the_word_that_decides_it(task, question):
    for sample in album(tasks=[task], images=[3, 3], size=20):
        assert re.fullmatch(
            'picture 1 <image> picture 2 <image> picture 3 <image>\n' + question, sample['conversations'][0]['value']
        )


def test_a_lone_picture_has_no_number_in_front():
    for sample in album(images=[1, 1], size=10):
        assert sample['conversations'][0]['value'] == '<image>\nwhat color is picture 1'


def test_a_recipe_can_name_the_world(empty_runs):
    assert WORLDS['albums'] is ALBUMS
    source = Source(
        kind='world',
        name='albums',
        split='test',
        size=40,
        options=dict(images=[2, 8], tasks={'color': 0.7, 'choice:color': 0.3}),
    )
    data = load_source(source, seed=3)
    assert len(data) == 40 and set(data['task']) == {'color', 'choice:color'} and not check_images(data)[1]
    assert all(turns[0]['value'].startswith('picture 1 <image> picture 2 <image>') for turns in data['conversations'])
    assert [path.parent for path in empty_runs.rglob('albums-*.parquet')] == [empty_runs / 'data']


def clips(split='train', seed=0, size=200, **options):
    return list(samples('frames', split, seed, size, **options))


@pytest.mark.parametrize('frames', [4, 8])
def test_a_clip_has_one_color_and_the_answer_names_it(frames):
    names = {value: name for name, value in COLORS.items()}
    for sample in clips(size=60, frames=frames):
        check_sample(sample)
        pixels = np.stack([open_image(image) for image in sample['images']])
        assert pixels.shape == (frames, 32, 32, 3)
        shape = (pixels != TONES['bright']).any(-1)
        assert (
            {names[tuple(color)] for color in np.unique(pixels[shape], axis=0).tolist()}
            == {sample['answer']}
            <= set(sample['options'])
        )
        assert (
            shape.any((1, 2)).all() and len({frame.tobytes() for frame in pixels}) == frames
        )  # seen in every frame, and it moves
        assert asked(sample) == (f'what color is the {json.loads(sample["meta"])["kind"]}', sample['answer'])


@pytest.mark.parametrize('frames', [4, 8])
def test_a_clip_is_told_as_an_album_is(frames):
    def head(sample):
        return sample['conversations'][0]['value'].split('\n')[0]

    made, albums = clips(frames=frames, size=100), album(images=[frames, frames], size=1)
    assert {head(sample) for sample in made} == {head(albums[0])}
    assert {asked(s)[0] for s in made} == {asked(s)[0] for s in album(images=[1, 1], tasks=['shape'], size=100)}
    assert {answer for _, answer in map(asked, made)} < set(albums[0]['options'])


def test_no_color_of_a_clip_is_favoured():
    questions, answers = zip(*map(asked, clips(size=600)))
    kinds, counts = Counter(questions), Counter(answers)
    assert set(counts) == set(clips(size=1)[0]['options']) and all(75 < count < 130 for count in counts.values()), (
        counts
    )
    assert len(kinds) == 3 and all(150 < count < 260 for count in kinds.values()), kinds


def test_splits_share_no_clip_whatever_the_seed():
    scenes = {
        split: {sample['meta'] for seed in seeds for sample in clips(split, seed)}
        for split, seeds in dict(train=(0, 1), test=(0, 7)).items()
    }
    assert min(map(len, scenes.values())) > 300 and not scenes['train'] & scenes['test']


def test_a_recipe_can_name_the_clips(empty_runs):
    assert WORLDS['frames'] is FRAMES
    data = load_source(Source(kind='world', name='frames', split='test', size=30, options=dict(frames=5)), seed=3)
    assert len(data) == 30 and set(data['task']) == {'color'} and not check_images(data)[1]
    assert {len(images) for images in data['images']} == {5}
    head = ' '.join(f'picture {i} <image>' for i in range(1, 6))
    assert all(turns[0]['value'].startswith(f'{head}\nwhat color is the ') for turns in data['conversations'])


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(tasks=['direction']), r"unknown task 'direction'; known: \['color'\]"),
        (dict(frames=3), 'frames is 3; a clip has 4 to 8'),
        (dict(images=[2, 2]), r"unknown options \['images'\]"),
    ],
)
def test_wrong_options_of_clips_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        clips(size=1, **options)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(images=[0, 2]), 'expected \\[low, high\\]'),
        (dict(images=[1, 101]), 'expected'),
        (dict(images=3), 'expected list'),
        (dict(colors=9), 'colors is 9'),
        (dict(grid=1), 'grid is 1'),
        (dict(pixels=40, grid=3), '40 pixels cannot hold 3 cells'),
        (dict(fill=True, tasks=['kind']), '16 shapes has no one color'),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        album(size=1, **options)
