"""Files as they are shipped: what is read, what is counted, and every kind of damage said by name."""

import base64
import json
import os
import pickle
import random
import shutil
import tracemalloc

import pytest
import shipped
from shipped import HIDDEN, PUBLIC, SHIPPED, made, mmbench_rows, picture, turned, write, write_lines, write_tsv

from mllm_replica.core.settings import Trouble
from mllm_replica.data.images import open_image
from mllm_replica.scoring.official_scorers import MME_TASKS
from mllm_replica.scoring.shipped.readers import READERS

NUMBER = dict(  # of questions that are made
    mme=28,
    mmbench=11,
    mmbench_cn=11,
    seed=12,
    pope=12,
    vqav2=8,
    okvqa=8,
    textvqa=8,
    vizwiz=8,
    gqa=8,
    scienceqa=12,
    coco=8,
    flickr30k=8,
    nocaps=8,
    textcaps=8,
    mibench=20,
)
TEN = ('coco', 'flickr30k', 'nocaps', 'textcaps')  # a caption's full score
TEXTS = ('.json', '.tsv', '.txt')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Name -> a folder with that benchmark, which nobody changes."
    home = tmp_path_factory.mktemp('shipped')
    return {name: made(name, home / name) for name in SHIPPED}


@pytest.fixture
def own(whole, tmp_path):
    "A copy of a benchmark's folder that may be damaged."
    return lambda name: shutil.copytree(whole[name], tmp_path / name, symlinks=True)


def read(name, folder):
    return READERS[name].read(folder, PUBLIC[name])


def files_of(folder, split):
    "Files with text that the split needs."
    hidden = ('_test_', 'test-dev', 'test.json') if split != 'test' else ()
    paths = sorted(path for path in folder.rglob('*') if path.suffix in TEXTS)
    return [path for path in paths if not any(mark in path.name for mark in hidden)]


def test_every_reader_has_a_fixture():
    assert READERS.keys() == SHIPPED.keys() == PUBLIC.keys()


# --- what is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SHIPPED)
def test_all_is_read_and_every_picture_opens(whole, name):
    questions = read(name, whole[name])
    assert len(questions) == len({question.id for question in questions}) == NUMBER[name]
    assert all(question.answers for question in questions)
    for question in questions:
        for image in question.images:
            assert (image['path'] is None) != (image['bytes'] is None)
            assert open_image(image, whole[name]).size == (shipped.SIDE, shipped.SIDE)
    assert any(len(question.images) > 1 for question in questions) == (name == 'mibench')


@pytest.mark.parametrize('name', SHIPPED)
def test_right_answers_get_the_full_score(whole, name):
    questions = read(name, whole[name])
    scores = READERS[name].score(questions, [question.answers[0] for question in questions])
    if name == 'mme':
        assert (scores['perception'], scores['cognition'], scores['total'], scores['OCR']) == (2000, 800, 2800, 200)
    elif name in TEN:
        assert 0 < scores['cider'] <= 10 and list(scores) == ['cider']
    else:
        headline = 'circular' if 'circular' in scores else 'accuracy'
        assert scores[headline] == pytest.approx(1) and all(0 <= value <= 1 for value in scores.values())


@pytest.mark.parametrize('name, split', HIDDEN.items())
def test_a_split_without_public_answers_is_read_and_not_scored(whole, name, split):
    questions = READERS[name].read(whole[name], split)
    assert questions and not any(question.answers for question in questions)
    with pytest.raises(Trouble, match="no public answer.*the benchmark's own server"):
        READERS[name].score(questions, ['A'] * len(questions))


@pytest.mark.parametrize('name', SHIPPED)
def test_questions_say_what_the_files_say(whole, name):
    first, *_, last = read(name, whole[name])
    expected = dict(
        mme=('existence/0001/1', 'Is it existence? Please answer yes or no.', ['Yes'], 'code_reasoning/0001/2'),
        mmbench=('0', 'Which of "2"?', ['B'], '1000003'),
        mmbench_cn=('0', 'Which of "2"?', ['B'], '3+1'),
        seed=('1_100', 'Which, 0?', ['A'], '10_111'),
        pope=('random/1', 'Is there a dog?', ['yes'], 'adversarial/4'),
        vqav2=('0', 'What, 0?', ['word 0'] * 8 + ['other', ''], '70'),
        okvqa=('0', 'What, 0?', ['word 0'] * 8 + ['other', ''], '70'),
        textvqa=('34602', 'what is written, 0?', ['word 0'] * 8 + ['other', ''], '34609'),
        vizwiz=(
            'VizWiz_val_00000000.jpg',
            'What is this, 0?',
            ['word 0'] * 8 + ['other', ''],
            'VizWiz_val_00000007.jpg',
        ),
        gqa=('20200', 'Is it 0?', ['yes'], '20207'),
        scienceqa=('0', 'Which is right, 0?', ['A'], '11'),
        coco=(
            'COCO_val2014_000000000001.jpg',
            '',
            [shipped.SAID[0], shipped.SAID[0] + ' .'],
            'COCO_val2014_000000000008.jpg',
        ),
        flickr30k=('1000.jpg', '', [shipped.SAID[0] + ' 0'] * 2, '1007.jpg'),
        nocaps=(f'{0:016x}.jpg', '', [shipped.SAID[0] + ' 0'] * 2, f'{7:016x}.jpg'),
        textcaps=(f'{0:016x}.jpg', '', [shipped.SAID[0] + ' 0'] * 2, f'{7:016x}.jpg'),
        mibench=('general_comparison_0', 'Between <image> and <image>, which? 0', ['A'], 'text_rich_images_3+2'),
    )
    assert (first.id, first.text, first.answers, last.id) == expected[name]


def test_words_that_were_read_and_hints_come_along(whole, own):
    words = [question.ocr for question in read('textvqa', whole['textvqa'])]
    assert words == [[], []] + [['STOP', 'now']] * 6
    folder = own('textvqa')
    (folder / 'TextVQA_Rosetta_OCR_v0.2_val.json').unlink()
    assert {tuple(question.ocr) for question in read('textvqa', folder)} == {()}
    assert read('mmbench', whole['mmbench'])[0].hint == 'Look at\nthe "picture".'
    assert [bool(question.hint) for question in read('scienceqa', whole['scienceqa'])][:3] == [False, True, True]


def test_a_part_of_a_split_is_noted_and_no_error(whole):
    reader = READERS['mmbench']
    assert reader.note(read('mmbench', whole['mmbench']), 'dev') == '11 of the official 4,329 questions'
    assert READERS['seed'].note(READERS['seed'].read(whole['seed'], 'image'), 'image') == '8 questions'


def moved(folder, old, new):
    (folder / new).parent.mkdir(parents=True, exist_ok=True)
    (folder / old).rename(folder / new)


@pytest.mark.parametrize(
    'name, moves',
    [
        ('mme', {'MME_Benchmark_release_version': 'MME_Benchmark'}),
        ('mmbench', {'mmbench_dev_en_20231003.tsv': 'mmbench_dev_20230712.tsv'}),
        ('mmbench', {'mmbench_dev_en_20231003.tsv': 'MMBench_DEV_EN.tsv'}),
        (
            'pope',
            {f'coco_pope_{kind}.json': f'coco/coco_pope_{kind}.json' for kind in ('random', 'popular', 'adversarial')},
        ),
        ('vqav2', {'val2014': 'images/val2014'}),
        (
            'okvqa',
            {
                'val2014': 'coco/val2014',
                'mscoco_val2014_annotations.json': 'annotations/mscoco_val2014_annotations.json',
            },
        ),
        ('textvqa', {'train_images': 'images/train_images'}),
        ('vizwiz', {'Annotations/val.json': 'val.json', 'val': 'images/val'}),
        ('gqa', {'testdev_balanced_questions.json': 'questions1.2/testdev_balanced_questions.json'}),
        ('scienceqa', {'images': 'data/scienceqa/images'}),
        ('scienceqa', {'images/test': 'test'}),
        ('coco', {'coco_karpathy_test.json': 'annotations/coco_karpathy_test.json', 'val2014': 'images/val2014'}),
        ('flickr30k', {'flickr30k-images': 'Images'}),
        ('nocaps', {'images': 'val'}),
    ],
)
def test_usual_other_places_read_the_same(whole, own, name, moves):
    folder = own(name)
    for old, new in moves.items():
        moved(folder, old, new)

    def plain(question):
        return question.model_dump(exclude={'images'})

    ours, theirs = read(name, folder), read(name, whole[name])
    assert list(map(plain, ours)) == list(map(plain, theirs))
    contents = [
        [open_image(image, root).tobytes() for q in qs for image in q.images]
        for root, qs in ((folder, ours), (whole[name], theirs))
    ]
    assert contents[0] == contents[1]


def test_forms_of_captions_agree(whole, own):
    "One benchmark in the list, in COCO's form and in Karpathy's."
    folder = own('coco')
    (folder / 'coco_karpathy_test.json').unlink()
    records = json.loads((whole['coco'] / 'coco_karpathy_test.json').read_text())
    images = [
        dict(
            filepath='val2014',
            filename=row['image'].split('/')[1],
            split='test',
            sentences=[dict(raw=c) for c in row['caption']],
        )
        for row in records
    ]
    write(folder / 'dataset_coco.json', dict(images=[*images, images[0] | dict(split='restval')], dataset='coco'))
    assert read('coco', folder) == read('coco', whole['coco'])
    folder = own('flickr30k')
    (folder / 'dataset_flickr30k.json').unlink()
    rows = [(q.images[0]['path'], q.answers) for q in read('flickr30k', whole['flickr30k'])]
    listed = dict(images=[dict(id=n, image=path) for n, (path, _) in enumerate(rows)])
    listed['annotations'] = [dict(image_id=n, caption=text) for n, (_, texts) in enumerate(rows) for text in texts]
    write(folder / 'flickr30k_test_karpathy.json', listed)
    assert read('flickr30k', folder) == read('flickr30k', whole['flickr30k'])


# --- what is counted ------------------------------------------------------------------------------------------------------


def scored(whole, name, answer_of):
    "The score when a function answers."
    questions = read(name, whole[name])
    return READERS[name].score(questions, [answer_of(question) for question in questions])


def right(question):
    return question.answers[0]


def test_one_wrong_rotation_costs_the_whole_question(whole):
    wrong = scored(whole, 'mmbench', lambda q: 'A' if q.id == '2000002' and right(q) != 'A' else right(q))
    assert wrong == {
        'circular': 3 / 4,
        'circular.attribute': 1 / 2,
        'circular.color': 1 / 2,
        'circular.number': 1,
        'circular.count': 1,
    }
    explained = scored(whole, 'mmbench', lambda q: f'{right(q)}. {q.options["ABCD".index(right(q))]}')
    assert explained['circular'] == 1
    assert scored(whole, 'mmbench', lambda q: 'A')['circular'] == 0


@pytest.mark.parametrize('name', ['mmbench_cn', 'mibench'])
def test_rotations_that_are_made_are_those_of_a_file_that_has_them(whole, name):
    questions = read(name, whole[name])
    for question in questions:
        first = next(q for q in questions if q.id == question.id.partition('+')[0])
        assert question.options['ABCD'.index(right(question))] == first.options['ABCD'.index(right(first))]
        turn = question.about['index'] // 10**6
        assert question.options == first.options[turn:] + first.options[:turn] and question.images == first.images
    if name == 'mmbench_cn':
        shipped_ones = read('mmbench', whole['mmbench'])
        assert [(q.about, q.options, q.answers) for q in questions] == [
            (q.about, q.options, q.answers) for q in shipped_ones
        ]


def test_mibench_counts_by_task(whole):
    scores = scored(whole, 'mibench', lambda q: 'Z' if q.id == 'text_rich_images_1' else right(q))
    assert (scores['circular'], scores['circular.general_comparison']) == (7 / 8, 1)
    assert scores['circular.text_rich_images'] == scores['circular.multimodal_knowledge_seeking'] == 3 / 4


def test_mme_adds_accuracy_and_accuracy_plus(whole):
    scores = scored(whole, 'mme', lambda q: 'No' if q.id == 'count/0001/1' else f'{right(q)}, it is.\tReally.\nYes.')
    assert (scores['count'], scores['color'], scores['perception'], scores['cognition']) == (50, 200, 1850, 800)
    assert scores['total'] == 2650
    always = scored(whole, 'mme', lambda q: 'yes')
    assert always['total'] == 14 * 50 and set(always) == {'perception', 'cognition', 'total'} | {
        task for tasks in MME_TASKS.values() for task in tasks
    }


def test_pope_means_its_three_files(whole):
    scores = scored(whole, 'pope', lambda q: 'Yes.' if q.about['category'] == 'adversarial' else right(q))
    assert [scores[f'{kind}.accuracy'] for kind in ('random', 'popular', 'adversarial')] == pytest.approx([1, 1, 0.5])
    assert scores['accuracy'] == pytest.approx(2.5 / 3) and scores['yes_ratio'] == pytest.approx(2 / 3)
    assert scores['f1'] == pytest.approx((1 + 1 + 2 / 3) / 3) and scores['adversarial.f1'] == pytest.approx(2 / 3)
    assert len(scores) == 20


def test_seed_counts_by_media_and_type(whole):
    scores = scored(whole, 'seed', lambda q: f'{right(q)}.' if q.id in ('1_100', '10_108') else f' {right(q).lower()}')
    assert scores == {
        'accuracy': pytest.approx(10 / 12),
        'image': pytest.approx(7 / 8),
        'video': pytest.approx(3 / 4),
        'accuracy.Scene Understanding': pytest.approx(3 / 4),
        'accuracy.Instance Counting': 1,
        'accuracy.Action Recognition': pytest.approx(3 / 4),
    }
    questions = READERS['seed'].read(whole['seed'], 'image')
    assert set(READERS['seed'].score(questions, ['A'] * 8)) >= {'accuracy', 'image'}
    assert 'video' not in READERS['seed'].score(questions, ['A'] * 8)


def test_scienceqa_counts_in_every_group(whole):
    "Wrong is every question with an image: the odd ones."
    scores = scored(whole, 'scienceqa', lambda q: {'A': 'B', 'B': 'A'}[right(q)] if q.images else f'({right(q)}).')
    assert (scores['accuracy'], scores['image'], scores['text'], scores['accuracy.IMG']) == (0.5, 0, 1, 0)
    assert [scores[f'accuracy.{name}'] for name in ('NAT', 'SOC', 'LAN', 'TXT', 'NO', 'G1-6', 'G7-12')] == [
        0.5, 0.5, 0.5, 0.5, 1, 0.5, 0.5,
    ]  # fmt: skip
    unread = scored(whole, 'scienceqa', lambda q: 'who knows?')
    parts = [unread[f'accuracy.{name}'] for name in ('NAT', 'SOC', 'LAN')]
    assert unread['accuracy'] == pytest.approx(sum(parts) / 3), 'a draw is one draw in all groups'


@pytest.mark.parametrize('name', ['vqav2', 'okvqa', 'textvqa', 'vizwiz'])
def test_vqa_counts_what_people_say(whole, name):
    assert scored(whole, name, lambda q: 'The ' + right(q).upper() + '.')['accuracy'] == 1
    assert scored(whole, name, lambda q: 'other')['accuracy'] == pytest.approx(0.3)  # one of ten says so
    assert scored(whole, name, lambda q: 'nothing')['accuracy'] == 0


def test_gqa_counts_equal_answers(whole):
    assert scored(whole, 'gqa', lambda q: 'Yes.')['accuracy'] == 0.5
    assert scored(whole, 'gqa', lambda q: 'on the ' + right(q))['accuracy'] == 0


def test_captions_count_words(whole):
    for name in TEN:
        best, worse = scored(whole, name, right), scored(whole, name, lambda q: right(q).split()[0])
        assert best['cider'] > 5 * worse['cider'] >= 0
        assert scored(whole, name, lambda q: right(q).title() + '.') == pytest.approx(best)


@pytest.mark.parametrize('name', SHIPPED)
def test_answers_must_be_as_many_as_questions(whole, name):
    questions = read(name, whole[name])
    with pytest.raises(Trouble, match=f'{name}: {len(questions) - 1} answers to {len(questions)} questions'):
        READERS[name].score(questions, ['A'] * (len(questions) - 1))
    with pytest.raises(Trouble, match='one each is needed'):
        READERS[name].score([], [])


@pytest.mark.parametrize('name', ['mme', 'mmbench', 'pope', 'mibench'])
def test_a_part_of_what_belongs_together_is_not_scored(whole, name):
    questions = read(name, whole[name])[1:9]
    with pytest.raises(Trouble, match=f'^{name}: '):
        READERS[name].score(questions, ['A'] * len(questions))


# --- what is wrong --------------------------------------------------------------------------------------------------------


def damaged(path, how):
    "Damage a file."
    content = path.read_bytes()
    if how == 'gone':
        path.unlink()
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'blank':
        path.write_bytes(b'\n \n')
    elif how == 'cut':
        path.write_bytes(content[: len(content) * 2 // 3].rstrip(b'\n')[:-1])
    elif how == 'binary':
        path.write_bytes(b'\xff\xfe\x00\x81' * 9)
    elif how == 'page':
        path.write_bytes(b'<!DOCTYPE html>\n<html>404</html>\n')
    elif how == 'pointer':
        path.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')


@pytest.mark.parametrize('how', ['gone', 'empty', 'blank', 'cut', 'binary', 'page', 'pointer'])
@pytest.mark.parametrize('name', SHIPPED)
def test_a_file_that_is_gone_or_damaged_is_named(whole, own, name, how):
    folder = own(name)
    for path in files_of(folder, PUBLIC[name]):
        if how == 'gone' and 'OCR_v0.2' in path.name:
            continue
        before = path.read_bytes()
        damaged(path, how)
        with pytest.raises(Trouble) as error:
            read(name, folder)
        mark = path.name if how != 'gone' else dict(mme='0001').get(name, path.name.partition('20231003')[0])
        assert mark in str(error.value) and str(error.value).startswith(f'{name}: '), error.value
        assert READERS[name].files in str(error.value), 'what is expected where'
        path.write_bytes(before)
    assert read(name, folder)


def pictures_of(folder, name):
    questions = read(name, folder)
    return list(dict.fromkeys(image['path'] for q in questions for image in q.images if image['path']))


WITH_FILES = [name for name in SHIPPED if not name.startswith('mmbench')]


@pytest.mark.parametrize('how', ['gone', 'empty', 'a folder'])
@pytest.mark.parametrize('name', WITH_FILES)
def test_pictures_that_are_missing_are_counted_and_named(own, name, how):
    folder = own(name)
    paths = pictures_of(folder, name)
    for path in paths[:2]:
        (folder / path).unlink()
        if how == 'empty':
            (folder / path).write_bytes(b'')
        if how == 'a folder':
            (folder / path).mkdir()
    with pytest.raises(Trouble) as error:
        read(name, folder)
    mark = '0001' if name == 'mme' and how == 'gone' else paths[0]
    assert mark in str(error.value)
    if name != 'mme' or how != 'gone':
        assert f'2 of {len(paths)} images are missing or empty' in str(error.value) and paths[1] in str(error.value)


@pytest.mark.parametrize('name', WITH_FILES)
def test_a_picture_that_is_a_link_to_outside_is_refused(own, tmp_path, name):
    folder = own(name)
    path = pictures_of(folder, name)[0]
    (tmp_path / 'elsewhere.png').write_bytes(picture(1))
    (folder / path).unlink()
    (folder / path).symlink_to(tmp_path / 'elsewhere.png')
    with pytest.raises(Trouble, match='leads outside'):
        read(name, folder)
    (folder / path).unlink()
    (folder / path).symlink_to(os.path.basename(path))  # to itself
    with pytest.raises(Trouble, match='nowhere|missing|links'):
        read(name, folder)


def places(value, path=()):
    "Every place in plain data: the keys that lead there."
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*path, key))


def changed(value, path, make):
    "The data with another value at one place."
    if not path:
        return make(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], make)
    return copy


def without(value, path):
    "The data without one place."
    return changed(
        value,
        path[:-1],
        lambda part: (
            {k: v for k, v in part.items() if k != path[-1]}
            if isinstance(part, dict)
            else part[: path[-1]] + part[path[-1] + 1 :]
        ),
    )


def said(path):
    return (
        [json.loads(line) for line in path.read_text().splitlines()]
        if 'pope' in path.name
        else json.loads(path.read_text())
    )


def say(path, content):
    write_lines(path, content) if 'pope' in path.name else write(path, content)


def json_files(folder, split):
    return [path for path in files_of(folder, split) if path.suffix == '.json']


WITH_JSON = [name for name in SHIPPED if name not in ('mme', 'mmbench', 'mmbench_cn')]
OTHERS = [
    None,
    True,
    -1,
    10**30,
    0.5,
    '',
    ' ',
    'zz',
    [],
    ['zz'],
    {},
    dict(a=1),
    [None],
    '../up.jpg',
    '\ud800',
    'a\0b',
    'x' * 300,
]


@pytest.mark.parametrize('each', [4, pytest.param(60, marks=pytest.mark.nightly)])
@pytest.mark.parametrize('name', WITH_JSON)
def test_any_value_anywhere_is_read_or_said(own, name, each):
    "A wrong value at any place of a file is Trouble that names the file or a question, or does not matter; never another error."
    folder, rng, troubles = own(name), random.Random(0), 0
    for path in json_files(folder, PUBLIC[name]):
        content = said(path)
        every = [place for place in places(content) if place]
        chosen = rng.sample(every, min(each, len(every)))
        for place in chosen:
            for other in rng.sample(OTHERS, each // 4 + 2):
                say(path, changed(content, place, lambda _: other))
                try:
                    assert all(question.id for question in read(name, folder))
                except Trouble as error:
                    troubles += 1
                    assert str(error).startswith(f'{name}: ')
            if isinstance(content, dict) or len(place) > 1:
                say(path, without(content, place))
                try:
                    read(name, folder)
                except Trouble:
                    troubles += 1
        say(path, content)
    assert troubles


def scratched(content, rng):
    "Bytes of which a stretch is lost, said twice or overwritten."
    start, size = rng.randrange(len(content)), rng.choice([1, 2, 9, 80])
    piece = content[start : start + size]
    other = rng.choice([b'', piece * 2, rng.randbytes(size), b'\t', b'\n', b'"', b'\r', b'\0'])
    return content[:start] + other + content[start + size :]


@pytest.mark.parametrize('times', [20, pytest.param(400, marks=pytest.mark.nightly)])
@pytest.mark.parametrize('name', ['mme', 'mmbench', 'mmbench_cn', 'pope'])
def test_scratched_lines_are_read_or_said(own, name, times):
    "Lost, doubled and foreign bytes in files of lines: Trouble, or a reading; never another error."
    folder, rng, troubles = own(name), random.Random(1), 0
    paths = files_of(folder, PUBLIC[name])
    for _ in range(times):
        path = rng.choice(paths)
        content = path.read_bytes()
        path.write_bytes(scratched(content, rng))
        try:
            for question in read(name, folder):
                assert all(image['bytes'] or image['path'] for image in question.images)
        except Trouble as error:
            troubles += 1
            assert str(error).startswith(f'{name}: ')
        path.write_bytes(content)
    assert troubles


def outer(value):
    "A place in plain data that names a picture."
    return next(place for place in places(value) if str(at(value, place)).endswith(('.jpg', '.png')))


def at(value, place):
    for key in place:
        value = value[key]
    return value


@pytest.mark.parametrize('name', ['pope', 'vizwiz', 'coco', 'flickr30k', 'nocaps', 'mibench', 'scienceqa'])
@pytest.mark.parametrize('path', ['../up.png', '/etc/up.png', 'a/../../up.png', 'C:\\up.png', '..\\up.png'])
def test_a_path_never_leaves_the_folder(own, name, path):
    folder = own(name)
    (folder.parent / 'up.png').write_bytes(picture(1))
    file = next(f for f in json_files(folder, PUBLIC[name]) if 'pid' not in f.name)
    content = said(file)
    say(file, changed(content, outer(content), lambda _: path))
    with pytest.raises(Trouble, match='outside|absolute|missing'):
        read(name, folder)


@pytest.mark.parametrize('name', ['seed', 'gqa', 'textvqa', 'scienceqa'])
def test_a_path_of_a_key_never_leaves_the_folder(own, name):
    "Where a picture is named by an id, too."
    folder = own(name)
    (folder.parent / 'up').write_bytes(picture(1))
    (folder.parent / 'up.jpg').write_bytes(picture(1))
    field = dict(seed='data_id', gqa='imageId', textvqa='image_id', scienceqa='split')[name]
    for file in json_files(folder, PUBLIC[name]):
        content = said(file)
        for place in [place for place in places(content) if place[-1:] == (field,)]:
            content = changed(content, place, lambda _: '../../up')
        say(file, content)
    with pytest.raises(Trouble, match='outside|comes twice'):
        read(name, folder)


@pytest.mark.parametrize('name', WITH_JSON)
def test_a_record_that_comes_twice_or_is_lost_is_refused(own, name):
    folder = own(name)
    for path in json_files(folder, PUBLIC[name]):
        content = said(path)
        lists = [
            p
            for p in places(content)
            if isinstance(at(content, p), list) and at(content, p) and isinstance(at(content, p)[0], dict)
        ]
        for place in [p for p in lists if len(p) < 2]:
            if (name, place) == ('nocaps', ('annotations',)):
                continue  # two people may say the same
            say(path, changed(content, place, lambda rows: [*rows, rows[0]]))
            with pytest.raises(Trouble, match='comes twice|different sizes'):
                read(name, folder)
        say(path, content)


@pytest.mark.parametrize('name', ['gqa', 'scienceqa', 'seed'])
def test_a_key_that_comes_twice_is_refused(own, name):
    folder = own(name)
    for path in json_files(folder, PUBLIC[name]):
        text = path.read_text()
        key = text.split('"')[1]
        path.write_text('{' + f'"{key}": 1,' + text.lstrip()[1:])
        with pytest.raises(Trouble, match=f"{path.name} is damaged.*the key '{key}' comes twice"):
            read(name, folder)
        path.write_text(text)


@pytest.mark.parametrize('name', ['vqav2', 'okvqa', 'nocaps'])
def test_both_files_must_agree(own, name):
    folder = own(name)
    for path in json_files(folder, PUBLIC[name]):
        content = said(path)
        for place in [(key,) for key in content if isinstance(content[key], list)]:
            fewer = changed(
                content, place, lambda rows: [row for row in rows if row != rows[-1] and row.get('image_id') != 7]
            )
            say(path, fewer)
            with pytest.raises(Trouble, match='have none|have no question|has no question'):
                read(name, folder)
        say(path, content)


def test_answers_of_another_picture_are_refused(own):
    folder = own('okvqa')
    path = folder / 'mscoco_val2014_annotations.json'
    say(path, changed(said(path), ('annotations', 3, 'image_id'), lambda _: 99))
    with pytest.raises(Trouble, match='question 30 has another image'):
        read('okvqa', folder)


def test_two_releases_in_one_folder_are_refused(own):
    for name, old, new in (
        ('mmbench', 'mmbench_dev_en_20231003.tsv', 'mmbench_dev_20230712.tsv'),
        ('coco', 'coco_karpathy_test.json', 'annotations/dataset_coco.json'),
        ('vizwiz', 'Annotations/val.json', 'val.json'),
    ):
        folder = own(name)
        (folder / new).parent.mkdir(exist_ok=True)
        shutil.copy(folder / old, folder / new)
        with pytest.raises(Trouble, match='two releases'):
            read(name, folder)


@pytest.mark.parametrize('name', SHIPPED)
def test_unknown_splits_and_folders_are_said(whole, tmp_path, name):
    with pytest.raises(Trouble, match=f"{name} has no split 'nope'; its splits: "):
        READERS[name].read(whole[name], 'nope')
    with pytest.raises(Trouble, match='is no folder; expected'):
        READERS[name].read(tmp_path / 'gone', PUBLIC[name])
    (tmp_path / 'bare').mkdir()
    with pytest.raises(Trouble) as error:
        READERS[name].read(tmp_path / 'bare', PUBLIC[name])
    assert READERS[name].files in str(error.value)


# MME's folders


@pytest.mark.parametrize('task', ['color', 'artwork'])
@pytest.mark.parametrize(
    'text, message',
    [
        ('One?\tYes\n', '1 questions; every image of MME has two'),
        ('One?\tYes\nTwo?\tNo\nThree?\tNo\n', '3 questions; every image of MME has two'),
        ('One?\tYes\nTwo?\n', "found 'Two\\?'; expected a question, a tab, and Yes or No"),
        ('One?\tYes\nTwo?\tPerhaps\n', 'Perhaps'),
        ('One?\tYes\n\tNo\n', 'expected a question'),
        ('One?\tYes\tNo\nTwo?\tNo\n', 'expected a question'),
    ],
)
def test_lines_of_mme_are_two_questions(own, task, text, message):
    folder = own('mme')
    (path,) = (folder / 'MME_Benchmark_release_version' / task).rglob('*.txt')
    path.write_text(text)
    with pytest.raises(Trouble, match=f'{task}.*0001.txt: .*{message}'):
        read('mme', folder)


@pytest.mark.parametrize('task', [task for tasks in MME_TASKS.values() for task in tasks])
def test_all_subtasks_of_mme_are_needed(own, task):
    folder = own('mme')
    shutil.rmtree(folder / 'MME_Benchmark_release_version' / task)
    with pytest.raises(Trouble, match=f'has no subtask {task}; the score needs all fourteen'):
        read('mme', folder)


def test_files_of_a_finder_are_no_pictures(own):
    folder = own('mme')
    for task in ('color', 'artwork/images'):
        (folder / 'MME_Benchmark_release_version' / task / '._0001.jpg').write_bytes(b'x')
        (folder / 'MME_Benchmark_release_version' / task / '.DS_Store').write_bytes(b'x')
    assert len(read('mme', folder)) == 28


# POPE's three files


@pytest.mark.parametrize('kind', ['random', 'popular', 'adversarial'])
def test_a_shorter_file_of_pope_is_refused(own, kind):
    folder = own('pope')
    path = folder / f'coco_pope_{kind}.json'
    write_lines(path, said(path)[:3])
    with pytest.raises(Trouble, match=f'different sizes: .*{kind} 3.* questions'):
        read('pope', folder)


def test_the_first_release_of_pope_is_known(own):
    folder = own('pope')
    for kind, size in (('random', 2910), ('popular', 3000), ('adversarial', 3000)):
        (first, *_) = said(folder / f'coco_pope_{kind}.json')
        write_lines(folder / f'coco_pope_{kind}.json', [first | dict(question_id=n) for n in range(size)])
    assert READERS['pope'].note(read('pope', folder), 'test') == '8,910 of the official 9,000 questions'


# MMBench's table


def table(folder, change=lambda rows: rows, heading=shipped.COLUMNS, rotations=True):
    "Write the table anew, changed."
    rows = turned(mmbench_rows()) if rotations else mmbench_rows()
    write_tsv(folder / 'mmbench_dev_en_20231003.tsv', heading, change(rows))
    return folder


def replaced(number, **cells):
    return lambda rows: [row | cells if i == number else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda rows: rows[:-1], 'rotations are missing: 1000003'),
        (
            lambda rows: [row for row in rows if row['index'] != 1],
            'no row holds the image|without their question: 1000001',
        ),
        (lambda rows: [*rows, rows[0]], 'index comes twice: 0'),
        (replaced(0, image='!' * 100), 'row 1: the image is no base64 text'),
        (replaced(0, image=base64.b64encode(picture(0)).decode()[:-3]), 'row 1: the image is no base64 text'),
        (replaced(1, image='77'), "no row holds the image of 1 questions: .* row 2 names '77'"),
        (replaced(0, image=''), 'no row holds the image'),
        (replaced(2, answer='E'), "row 3: answer is 'E'; expected one of A, B, C"),
        (replaced(2, answer=''), "row 3: answer is ''; expected one of A, B, C"),
        (replaced(0, answer='C'), "row 1: answer is 'C'; expected one of A, B;"),
        (replaced(2, A=''), 'row 3: option A is empty'),
        (replaced(0, B=''), 'row 1.* has 1 options; expected 2 to 5'),
        (replaced(3, index='x'), "row 4: index 'x'"),
        (replaced(1, answer='B'), 'the right letter does not move in the rotations of the questions .0.'),
        (replaced(0, A='N/A'), 'MMBench rotations: '),
        (replaced(3, question=' '), "row 4: .*question ' '"),
    ],
)
def test_rows_of_mmbench_are_checked(own, change, message):
    with pytest.raises(Trouble, match=message):
        read('mmbench', table(own('mmbench'), change))


@pytest.mark.parametrize('column', ['index', 'question', 'A', 'B', 'answer', 'category', 'image', 'l2-category'])
def test_columns_of_mmbench_are_needed(own, column):
    folder, fewer = own('mmbench'), [name for name in shipped.COLUMNS if name != column]
    for heading in (fewer, [*shipped.COLUMNS, column]):
        with pytest.raises(Trouble, match=f'20231003.tsv has the columns .*expected {column} once'):
            read('mmbench', table(folder, heading=heading))


def big_picture(number):
    return base64.b64encode(bytes([number]) * 200_000).decode()


def test_pictures_stay_in_the_table_until_they_are_looked_at(tmp_path):
    "Eleven megabytes of pictures: what is kept is their places; one row at a time is in memory."
    first = mmbench_rows()[0]
    table(tmp_path, lambda _: [first | dict(index=n, image=big_picture(n)) for n in range(40)])
    tracemalloc.start()
    questions = read('mmbench', tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    contents = [question.images[0]['bytes'][:1] for question in questions[::2]]
    _, later = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert contents == [bytes([n]) for n in range(40)] and len(questions) == 80
    assert kept < 400_000 and max(peak, later) < 5_000_000
    sent = pickle.dumps(questions)
    assert len(sent) < 60_000 and pickle.loads(sent)[5].images[0]['bytes'][:1] == bytes([2])
    assert questions[0].images == questions[1].images != questions[2].images
    (tmp_path / 'mmbench_dev_en_20231003.tsv').write_text('other')
    with pytest.raises(Trouble, match='was changed or moved since it was read'):
        questions[0].images[0]['bytes']


def test_a_broken_picture_in_the_table_is_named_when_it_is_opened(own):
    folder = table(own('mmbench'), replaced(0, image=base64.b64encode(b'no picture' * 20).decode()))
    with pytest.raises(ValueError, match='not a readable'):
        open_image(read('mmbench', folder)[0].images[0], folder)
