"""Procedural worlds: answers are right by the pixels, splits are disjoint, files are made once."""

import json
import linecache
import os
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mllm_replica.core.recipe import Source
from mllm_replica.data.images import open_image
from mllm_replica.data.samples import check_sample
from mllm_replica.data.sources import check_images, load_source
from mllm_replica.data.worlds.world import COLORS
from mllm_replica.data.worlds import documents, mosaics, shelves, making  # noqa: F401  whose worlds are known once they are imported
from mllm_replica.data.worlds.easy_vqa import easy_vqa
from mllm_replica.data.worlds.making import build_world, samples
from mllm_replica.data.worlds.table import WORLDS
from mllm_replica.data.worlds.vocabulary import vocabulary, words_of


@pytest.fixture(autouse=True)
def run_folder(tmp_path, monkeypatch):
    from mllm_replica.core.settings import settings

    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path / 'runs'))
    settings.cache_clear()
    yield tmp_path / 'runs'
    settings.cache_clear()


def asked(sample):
    turns = [turn['value'] for turn in sample['conversations']]
    return [(question.split('\n')[-1], answer) for question, answer in zip(turns[::2], turns[1::2])]


def nearest(pixel, names):
    "The colour of a pixel, whatever the light: compared after division by the strongest channel."
    if max(pixel) < 70:
        return 'black'
    return min(
        names, key=lambda name: sum((a / max(pixel) - b / max(COLORS[name])) ** 2 for a, b in zip(pixel, COLORS[name]))
    )


def grid_of(sample, size, pixels=64):
    "The colours of a tiles picture, read from the middle of each tile."
    image, tile = np.asarray(open_image(sample['images'][0])), pixels // size

    def middle(i):
        return slice(i * tile + tile // 4, (i + 1) * tile - tile // 4)

    return [
        [nearest(image[middle(r), middle(c)].mean((0, 1)), list(COLORS)[:6]) for c in range(size)] for r in range(size)
    ]


def expected_tiles_answer(question, grid, border):
    "The answer by the question's words and the picture alone."
    size = len(grid)
    numbers = [int(n) for n in re.findall(r'\d+', question)]
    row, column = (numbers + [1, 1])[:2]
    flat = [name for line in grid for name in line]
    if 'bright or dark' in question:
        return 'bright' if border > 128 else 'dark'
    if question.startswith('is there a '):
        return 'yes' if question.split()[3] in flat else 'no'
    if question.startswith('how many '):
        return str(flat.count(question.split()[2]))
    if question.startswith('describe'):
        return ' '.join(f'row {i + 1} : {" ".join(line)} .' for i, line in enumerate(grid))
    if question.startswith('where'):
        return next(f'row {r + 1} column {c + 1}' for r in range(size) for c in range(size) if grid[r][c] == 'black')
    for words, (down, across) in {'left of': (0, -1), 'right of': (0, 1), 'above': (-1, 0), 'below': (1, 0)}.items():
        if words in question:
            row, column = row + down, column + across
    color = grid[row - 1][column - 1]
    if not question.startswith('name') or 'place' not in question:
        return color

    def part(at, names):
        return names[0] if at < (size + 1) / 2 else names[2] if at > (size + 1) / 2 else names[1]

    return f'{color} tile in the {part(row, ("top", "middle", "bottom"))} {part(column, ("left", "center", "right"))}'


@pytest.mark.parametrize('style', ['flat', 'textured'])
@pytest.mark.parametrize('grid, colors', [(4, 4), (8, 6)])
def test_tiles_answers_follow_from_the_pixels(style, grid, colors):
    tasks = ['cell', 'relation', 'existence', 'count', 'tint', 'describe', 'locate', 'name', 'name_place']
    checked = Counter()
    for sample in samples('tiles', 'train', 3, 60, grid=grid, colors=colors, style=style, tasks=tasks, turns=6):
        check_sample(sample)
        border = np.asarray(open_image(sample['images'][0]))[0].mean()
        found = grid_of(sample, grid)
        for question, answer in asked(sample):
            assert answer == expected_tiles_answer(question, found, border), (sample['id'], question, found)
            checked[question.split()[0]] += 1
    assert len(checked) == 6 and min(checked.values()) >= 15


def test_coarse_names_share_their_question():
    def ask(task):
        return [re.sub(r'\d', 'N', asked(s)[0][0]) for s in samples('tiles', 'train', 0, 20, tasks=[task])]

    assert set(ask('coarse_name')) == set(ask('coarse_name_place')) == {'name row N column N .'}
    assert len(set(ask('name') + ask('name_place'))) == 2


@pytest.mark.parametrize('world, task', [('tiles', 'existence'), ('shapes', 'existence'), ('shapes', 'side')])
def test_yes_and_no_come_in_halves(world, task):
    yes = np.mean([s['answer'] == 'yes' for s in samples(world, 'train', 0, 400, tasks=[task])])
    assert (
        abs(yes - 0.5) < 0.1 if world == 'shapes' else 0.6 < yes < 0.85
    )  # a colour can be absent from half of the tile scenes only


def test_tiles_existence_is_balanced_where_a_colour_is_missing():
    answers = [s['answer'] for s in samples('tiles', 'train', 0, 300, tasks=['existence'], missing=1.0)]
    assert abs(np.mean([a == 'yes' for a in answers]) - 0.5) < 0.1


def test_cell_answers_are_uniform():
    counts = Counter(s['answer'] for s in samples('tiles', 'test', 0, 800))
    assert set(counts) == {'red', 'blue', 'green', 'yellow'} and max(counts.values()) < 260


def centre_of(image, ground=205):
    "Middle of everything that is not ground."
    rows, columns = np.nonzero(np.abs(np.asarray(image, int) - ground).max(-1) > 40)
    return np.array([columns.mean(), rows.mean()])


def test_clips_move_as_the_answer_says():
    ways = set()
    for sample in samples('clips', 'train', 0, 40, tasks=['direction', 'speed'], turns=2, frames=6):
        frames = [open_image(i) for i in sample['images']]
        step = centre_of(frames[-1]) - centre_of(frames[0])
        way = ('left', 'right', 'up', 'down')[int(np.argmax([-step[0], step[0], -step[1], step[1]]))]
        speed = 'fast' if np.abs(step).max() > 0.4 * 64 else 'slow'
        assert {answer for _, answer in asked(sample)} == {way, speed} and len(frames) == 6
        assert sample['conversations'][0]['value'].count('<image>') == 6
        ways.add((way, speed))
    assert len(ways) == 8


def test_shape_colors_and_places_follow_from_the_pixels():
    for sample in samples('shapes', 'train', 0, 60, tasks=['color', 'place'], turns=2):
        image = np.asarray(open_image(sample['images'][0]))
        for question, answer in asked(sample):
            place, color = (
                (question.split()[4:6], answer)
                if question.startswith('what')
                else (answer.split(), question.split()[3])
            )
            y, x = (('top', 'middle', 'bottom').index(place[0]), ('left', 'center', 'right').index(place[1]))
            middle = image[int((y + 0.5) * 64 / 3), int((x + 0.5) * 64 / 3)]
            assert nearest(middle, ('red', 'blue', 'green', 'yellow', 'purple', 'orange')) == color


def test_pairs_compare_the_pictures():
    for sample in samples('pairs', 'train', 0, 40, tasks=['most', 'more', 'same'], turns=3, images=3):
        pictures = json.loads(sample['meta'])['pictures']
        amounts = [(np.abs(np.asarray(open_image(i), int) - 205).max(-1) > 20).sum() for i in sample['images']]
        for question, answer in asked(sample):
            numbers = [int(n) - 1 for n in re.findall(r'\d', question)]
            if 'most' in question and len({p['kind'] for p in pictures}) == 1:
                assert int(answer) == int(np.argmax(amounts)) + 1
            if 'color' in question:
                assert (answer == 'yes') == (len({pictures[n]['color'] for n in numbers}) == 1)
            if 'more' in question:
                assert (answer == 'yes') == (len(pictures[numbers[0]]['cells']) > len(pictures[numbers[1]]['cells']))


def test_text_tasks_are_right_and_have_no_image():
    for sample in samples('text', 'test', 0, 60, tasks=['copy', 'reverse', 'plus', 'minus'], turns=4):
        assert sample['images'] == [] and '<image>' not in str(sample['conversations'])
        for question, answer in asked(sample):
            words = question.split()
            if words[0] == 'copy':
                assert answer.split() == words[2:]
            elif words[0] == 'reverse':
                assert answer.split() == words[:1:-1]
            else:
                assert int(answer) == int(words[2]) + int(words[4]) * (1 if words[3] == 'plus' else -1) >= 0


def test_glyphs_stay_inside_and_differ():
    pictures = {}
    for sample in samples('glyphs', 'train', 0, 80, tasks=['read']):
        ink = np.abs(np.asarray(open_image(sample['images'][0]), int) - 205).max(-1) > 60
        assert 20 < ink.sum() < 2000
        rows, columns = np.nonzero(ink)
        assert min(*rows, *columns) > 0 and max(*rows, *columns) < 63
        shape = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        if len(sample['answer']) == 1:
            assert pictures.setdefault(shape.tobytes(), sample['answer']) == sample['answer']
    assert len(pictures) > 10


# the texts of pages are documents, not turns; stamps need pictures and have tests of their own
@pytest.mark.parametrize('name', sorted(WORLDS.keys() - {'pages', 'stamps'}))
def test_every_task_of_every_world_is_valid_and_speakable(name):
    world = WORLDS[name]
    known = {*vocabulary(), *world.words()}
    options = {'images': [2, 4]} if name == 'albums' else {}  # a comparison needs two pictures
    for task in world.tasks:
        rows = list(samples(name, 'train', 0, 25, tasks=[task], **options))
        assert {row['task'] for row in rows} == {task}
        for row in rows:
            check_sample(row)
            assert {w for t in row['conversations'] for w in words_of(t['value'])} <= known | {'<image>'}
        closed = all(len(row['options']) > 1 for row in rows)
        if closed and not (name in ('mosaics', 'lists') and task in ('most', 'next')):  # see the next test
            lettered = list(samples(name, 'train', 0, 25, tasks=[f'choice:{task}'], **options))
            assert all(row['answer'] in row['options'] and set(row['options']) <= set('abcd') for row in lettered)


@pytest.mark.xfail(
    strict=True,
    raises=ValueError,
    reason='draws do not see that the question behind choice: needs a leader or a neighbour',
)
@pytest.mark.parametrize('task', ['most', 'next'])
@pytest.mark.parametrize('name', ['mosaics', 'lists'])
def test_cells_that_answer_a_lettered_question(name, task):
    assert all(
        sample['answer'] in sample['options'] for sample in samples(name, 'train', 0, 60, tasks=[f'choice:{task}'])
    )


def test_the_letter_stands_for_the_right_answer():
    letters = Counter()
    for sample in samples('tiles', 'train', 0, 80, tasks=['choice:cell']):
        question, letter = asked(sample)[0]
        listed = dict(re.findall(r'\b(\w) : (\w+)', question))
        assert (
            listed[letter] == expected_tiles_answer(question, grid_of(sample, 4), 0) and len(set(listed.values())) == 4
        )
        letters[letter] += 1
    assert set(letters) == set('abcd') and max(letters.values()) < 40


# facts are known by heart, so there is nothing to be split; stamps have tests of their own
@pytest.mark.parametrize('name', sorted(WORLDS.keys() - {'facts', 'stamps'}))
def test_splits_never_share_a_scene(name):
    small = dict(tiles=dict(grid=2, pixels=16)).get(name, {})
    drawn = {
        (split, seed): [json.loads(s['meta']) for s in samples(name, split, seed, 150, **small)]
        for split in ('train', 'test')
        for seed in (0, 1)
    }
    parts = {'train': set(), 'test': set()}
    for (split, _), scenes in drawn.items():
        parts[split] |= {json.dumps(part, sort_keys=True) for scene in scenes for part in WORLDS[name].parts(scene)}
    assert not parts['train'] & parts['test'] and min(map(len, parts.values())) > 20
    assert drawn['train', 0] != drawn['train', 1]


def test_small_sets_are_the_beginning_of_large_ones_and_tasks_do_not_change_pictures():
    few, many = list(samples('tiles', 'train', 4, 10)), list(samples('tiles', 'train', 4, 30))
    assert few == many[:10]
    other = list(samples('tiles', 'train', 4, 10, tasks=['tint']))
    assert [s['images'] for s in other] == [s['images'] for s in few]


def test_questions_and_turns_share_pictures():
    split = list(samples('tiles', 'train', 0, 20, questions=8, turns=2))
    assert all(len(s['conversations']) == 4 for s in split) and len({s['images'][0]['path'] for s in split}) == 5
    assert len({s['id'] for s in split}) == 20
    joint = list(samples('tiles', 'train', 0, 5, turns=8))
    assert [q for s in split for q in asked(s)] == [q for s in joint for q in asked(s)]
    assert all(len(set(q for q, _ in asked(s))) == 8 for s in joint)


def test_dedup_keeps_the_first_question_of_each_answer():
    plain, deduped = (list(samples('tiles', 'train', 0, 20, turns=8, dedup=flag)) for flag in (False, True))
    for a, b in zip(plain, deduped):
        seen = set()
        assert asked(b) == [(q, x) for q, x in asked(a) if not (x in seen or seen.add(x))]


def test_task_weights():
    counts = Counter(s['task'] for s in samples('tiles', 'train', 0, 500, tasks={'cell': 0.8, 'tint': 0.2}))
    assert 360 < counts['cell'] < 440


def test_a_world_is_written_once_and_atomically(run_folder, monkeypatch):
    path = build_world('tiles', 'train', 0, 20)
    stamp = path.stat().st_mtime_ns
    assert build_world('tiles', 'train', 0, 20) == path and path.stat().st_mtime_ns == stamp
    content = path.read_bytes()
    os.remove(path)
    assert build_world('tiles', 'train', 0, 20).read_bytes() == content
    others = [
        build_world('tiles', 'train', 0, 20, pixels=32),
        build_world('tiles', 'train', 1, 20),
        build_world('tiles', 'test', 0, 20),
    ]
    assert len({path, *others}) == 4

    def fails(*args):
        raise RuntimeError('killed')

    monkeypatch.setattr(making, 'conversation', fails)
    with pytest.raises(RuntimeError):
        build_world('tiles', 'train', 0, 21)
    assert len(list((run_folder / 'data').iterdir())) == 4


def test_other_code_makes_another_file(monkeypatch):
    path = build_world('tiles', 'train', 0, 5)
    monkeypatch.setattr(making, '_code', lambda world: 'edited')
    assert build_world('tiles', 'train', 0, 5) != path


def test_load_source_reads_worlds_and_easy_vqa():
    world = load_source(Source(kind='world', name='pairs', split='test', size=12, options={'images': 3}), seed=2)
    assert len(world) == 12 and all(len(images) == 3 for images in world['images'])
    assert check_images(world)[1] == []
    real = load_source(Source(kind='easy_vqa', name='easy_vqa', split='test', size=50, options={'turns': 4}), seed=2)
    assert len(real) == 50 and check_images(real)[1] == [] and real.column_names == world.column_names
    typo = Source(kind='world', name='tiles', size=3, options={'gird': 4})
    with pytest.raises(ValueError, match="unknown options \\['gird'\\]"):
        load_source(typo, 0)
    with pytest.raises(ValueError, match='needs the number of samples'):
        load_source(Source(kind='world', name='tiles'), 0)


def test_easy_vqa_is_complete_and_grouped():
    test = easy_vqa('test')
    assert len(test) == 9673 and len(easy_vqa('train', turns=100)) == 4000
    assert all(answer in options for answer, options in zip(test['answer'], test['options']))
    one = easy_vqa('test', turns=100, dedup=True)
    assert len(one) == 1000
    for sample in one.select(range(50)):
        answers = [answer for _, answer in asked(sample)]
        assert len(answers) == len(set(answers))
    assert (
        easy_vqa('test', 20, seed=1)['id'][:]
        == easy_vqa('test', 20, seed=1)['id'][:]
        != easy_vqa('test', 20, seed=2)['id'][:]
    )


def test_missing_easy_vqa_says_what_to_install(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ModuleNotFoundError, match='pip install easy-vqa'):
        easy_vqa('test')


def test_vocabulary_is_sorted_unique_lower_case():
    words = vocabulary()
    assert words == sorted(set(words)) and all(words_of(word) == [word] for word in words)
    assert {'human', 'ai', ':', '?', 'yes', '16', 'assistant'} <= set(words) and len(words) < 400


def test_the_cells_of_a_notebook_decide_the_key_of_its_world():
    def written(source):
        "A world whose functions stand in a cell, as IPython keeps it."
        linecache.cache['<cell>'] = len(source), None, source.splitlines(True), '<cell>'
        cell = {}
        exec(compile(source, '<cell>', 'exec'), cell)
        return making._code(replace(WORLDS['boards'], draw=cell['draw']))

    try:
        assert (
            written('def draw(rng, options): return {}\n')
            != written('def draw(rng, options): return {1: 1}\n')
            != making._code(WORLDS['boards'])
        )
    finally:
        del linecache.cache['<cell>']
