"""Distractor Resistance: what a prompt contains, that passes differ, that MMBench files are read, how answers count."""

import base64
import csv
import json
import re
from collections import Counter

import pytest
from PIL import Image

from mllm_replica.data.images import encode_png, open_image
from mllm_replica.data.samples import check_sample
from mllm_replica.data.worlds.making import samples
from mllm_replica.data.worlds.vocabulary import vocabulary, words_of
from mllm_replica.owl3.distractors import Question, album_questions, build, circular, mmbench_questions


@pytest.fixture(scope='module')
def questions():
    return album_questions(80, seed=3)


def meta(sample):
    return json.loads(sample['meta'])


@pytest.mark.parametrize('n_images', [1, 2, 8, 32])
@pytest.mark.parametrize('prompt', ['paper', 'words'])
def test_a_prompt_has_the_true_image_once_at_its_place_and_no_image_twice(questions, n_images, prompt):
    made, by_id = build(questions, n_images, 5, prompt), {question.id: question for question in questions}
    assert len(made) == 4 * len(questions) and len({sample['id'] for sample in made}) == len(made)
    for sample in made:
        check_sample(sample)
        question, images = by_id[meta(sample)['question']], [image['bytes'] for image in sample['images']]
        assert len(set(images)) == len(images) == n_images and images[meta(sample)['place']] == question.image['bytes']
        number, text = meta(sample)['place'] + 1, sample['conversations'][0]['value']
        right = question.options[question.answer]
        assert meta(sample)['options'][sample['answer']] == right if prompt == 'paper' else sample['answer'] == right
        assert re.findall(r'what color is picture (\d+)\b', text) == [str(number)]
        assert (f'. In Image {number}, ' in text) == (prompt == 'paper') == ('Options: A. ' in text)


def test_the_words_of_the_paper():
    image = dict(bytes=encode_png(Image.new('RGB', (4, 4))), path='a')
    other = Question('2', dict(bytes=encode_png(Image.new('RGB', (5, 4))), path='b'), 'is {} empty?', ('yes', 'no'), 1)
    made = build([Question('1', image, 'how many cats are there?', ('one', 'two', 'three'), 2), other], 2, 0)
    assert [len(made), made[1]['answer'], made[1]['options'], made[0]['answer']] == [5, 'B', ['A', 'B', 'C'], 'C']
    number = meta(made[1])['place'] + 1
    assert made[1]['conversations'][0]['value'] == (
        f'Image 1: <image> Image 2: <image>. In Image {number}, how many cats are there?\nOptions: A. two\nB. three\nC. one\n'
        'Answer with the option’s letter from the given choices directly.'
    )
    assert 'is {} empty?' in made[3]['conversations'][0]['value']


@pytest.mark.parametrize('prompt', ['paper', 'words'])
def test_the_number_of_the_image_is_told_wherever_a_question_wants_it(questions, prompt):
    asked = Question('x', questions[0].image, 'is {number} {} {number}?', ('yes', 'no'), 0)
    for sample in build([asked, *questions[1:]], 3, 0, prompt)[:2]:
        number = meta(sample)['place'] + 1
        assert f'is {number} {{}} {number}?' in sample['conversations'][0]['value']


@pytest.mark.parametrize('n_images', [1, 4])
def test_words_prompts_are_those_of_the_world_they_are_trained_on(questions, n_images):
    made = build(questions, n_images, 0, 'words')
    rows = list(samples('albums', 'train', 0, 100, images=[n_images, n_images], tasks=['choice']))

    def text(sample):
        return sample['conversations'][0]['value']

    def bare(sample):
        return text(sample).replace(' '.join(sample['options']), '')

    assert {*map(bare, made)} == {*map(bare, rows)} and {
        word for sample in made for word in words_of(text(sample))
    } <= {*vocabulary(), '<image>'}
    assert all(
        f'\nof {" ".join(sample["options"])} what' in text(sample) and sample['answer'] in sample['options']
        for sample in [*made, *rows]
    )
    assert {sample['answer'] for sample in made} == {row['answer'] for row in rows}


def test_passes_rotate_options_and_draw_new_distractors(questions):
    for start, made in ((i, build(questions, 8, 0)[i : i + 4]) for i in (0, 40, 200)):
        assert sorted(sample['answer'] for sample in made) == ['A', 'B', 'C', 'D']
        assert all(len({meta(sample)['options'][letter] for sample in made}) == 4 for letter in 'ABCD')
        assert len({frozenset(image['path'] for image in sample['images']) for sample in made}) == 4


def test_prompts_differ_in_text_and_answer_only(questions):
    for paper, words in zip(build(questions, 4, 0), build(questions, 4, 0, 'words'), strict=True):
        same = ('id', 'images', 'task', 'meta')
        assert [paper[key] for key in same] == [words[key] for key in same]
        assert (words['answer'], words['options']) == (
            meta(paper)['options'][paper['answer']],
            [*meta(paper)['options'].values()],
        )


def test_draws_depend_on_seed_question_and_pass_only(questions):
    made = build(questions, 4, 0)
    assert made == build(questions, 4, 0) != build(questions, 4, 1)
    part = {sample['id']: sample for sample in build([*questions[40:], *questions[:40]], 1, 0)}
    assert all(part[sample['id']] == sample for sample in build(questions, 1, 0))

    def paths(sample):
        return {image['path'] for image in sample['images']}

    assert all(paths(few) < paths(many) for few, many in zip(made, build(questions, 16, 0)))


def test_places_and_distractors_are_uniform(questions):
    made = build(questions, 4, 0)
    places = Counter(meta(sample)['place'] for sample in made)
    assert all(50 < places[place] < 110 for place in range(4))
    shown = Counter(image['path'] for sample in made for image in sample['images'])
    assert len(shown) == len(questions) and max(shown.values()) < 40 and min(shown.values()) > 5


def test_equal_images_are_never_shown_together():
    images = [
        dict(bytes=encode_png(Image.new('RGB', (4, 4), color)), path=f'{color}{i}')
        for color in ('red', 'blue', 'green')
        for i in range(4)
    ]
    asked = [Question(str(i), image, 'what?', ('x', 'y'), 0) for i, image in enumerate(images)]
    assert all(len({image['bytes'] for image in sample['images']}) == 3 for sample in build(asked, 3, 0))
    with pytest.raises(ValueError, match='4 images per prompt, but the questions have only 3 different ones'):
        build(asked, 4, 0)


@pytest.fixture
def mmbench(tmp_path):
    def picture(i):
        return base64.b64encode(encode_png(Image.new('RGB', (600, 400), (i, 2 * i, 0)))).decode()

    def write(**change):
        rows = [
            dict(
                index=i,
                question=f'What "is" it,\nnumber {i}?',
                hint='A\tmap.' * (i == 7),
                A='cat',
                B='dog',
                C='' if i == 8 else 'cow',
                D='',
                answer='B',
                category='x',
                image=picture(i),
                split='dev',
            )
            for i in (7, 8, 9)
        ]
        rows += [dict(rows[0], index=1_000_007, A='dog', B='cow', C='cat', answer='A', image='7')]
        rows[1] |= change
        with open(tmp_path / 'dev.tsv', 'w', encoding='utf-8', newline='') as file:
            table = csv.DictWriter(file, rows[0].keys(), delimiter='\t')
            table.writeheader()
            table.writerows(rows)
        return tmp_path

    return write


def test_mmbench_file(mmbench):
    limit = csv.field_size_limit()
    read = mmbench_questions('dev.tsv', mmbench())
    assert [q.id for q in read] == ['7', '8', '9'] and [q.options for q in read] == [
        ('cat', 'dog', 'cow'),
        ('cat', 'dog'),
        ('cat', 'dog', 'cow'),
    ]
    assert [q.answer for q in read] == [1, 1, 1] and open_image(read[2].image).getpixel((0, 0)) == (9, 18, 0)
    assert (
        read[0].question == 'What "is" it,\nnumber 7?\nContext: A\tmap.'
        and read[1].question == 'What "is" it,\nnumber 8?'
    )
    assert len(build(read, 3, 0)) == 8 and csv.field_size_limit() == limit


def test_a_large_image_is_read(mmbench):
    noise = Image.effect_noise((500, 500), 90).convert('RGB')
    text = base64.b64encode(encode_png(noise)).decode()
    assert len(text) > 131072 and open_image(mmbench_questions('dev.tsv', mmbench(image=text))[1].image).size == (
        500,
        500,
    )


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(image=''), r'row 2 \(index 8\): the image cannot be read'),
        (dict(image='no base64!'), r'row 2 \(index 8\): the image cannot be read'),
        (dict(image=base64.b64encode(b'text').decode()), 'not a readable'),
        (dict(A='', B=''), r'row 2 .*given options \[\]'),
        (dict(A='', C=''), r"question '8' has the options \['dog'\]"),
        (dict(answer='C'), r"the answer is 'C'"),
        (dict(answer=''), r"the answer is ''"),
        (dict(index='x'), 'index is not a number'),
    ],
)
def test_bad_rows_are_named(mmbench, change, message):
    with pytest.raises(ValueError, match=message):
        mmbench_questions('dev.tsv', mmbench(**change))


def test_bad_files_are_named(mmbench, tmp_path):
    (tmp_path / 'test.tsv').write_text('index\tquestion\tA\tB\timage\n')
    with pytest.raises(ValueError, match=r"test.tsv: the columns \['answer'\] are missing"):
        mmbench_questions('test.tsv', tmp_path)
    with pytest.raises(ValueError, match='outside the data root'):
        mmbench_questions('../dev.tsv', tmp_path)
    with pytest.raises(FileNotFoundError):
        mmbench_questions('none.tsv', tmp_path)


def test_circular_counts_a_question_only_if_every_pass_is_right(questions):
    made = build(questions[:10], 2, 0)
    right = {sample['id']: sample['answer'] for sample in made}
    wrong = dict(right, **{sample['id']: 'E' for sample in made[:4] + made[8:9]})
    assert circular(right, made) == dict(plain=1, circular=1)
    assert circular(wrong, made) == dict(plain=35 / 40, circular=0.8)
    assert (
        circular(
            {sample['id']: f' ({sample["answer"]}) {meta(sample)["options"][sample["answer"]]}' for sample in made},
            made,
        )['plain']
        == 1
    )
    assert circular({sample['id']: meta(sample)['options'][sample['answer']] for sample in made}, made)['circular'] == 1
    assert circular(dict.fromkeys(right, 'red blue'), made)['circular'] == 0
    assert circular(dict.fromkeys(right, 'A'), made) == dict(plain=0.25, circular=0)


def test_circular_counts_the_text_of_the_right_option_of_words_prompts(questions):
    made = build(questions[:40], 2, 0, 'words')
    right = {sample['id']: sample['answer'] for sample in made}
    assert (
        circular(right, made)
        == circular({name: f' {text}\n' for name, text in right.items()}, made)
        == dict(plain=1, circular=1)
    )
    assert circular(right | {made[0]['id']: 'no', made[9]['id']: made[9]['answer'] + ' red'}, made) == dict(
        plain=158 / 160, circular=38 / 40
    )
    other = {
        sample['id']: next(option for option in sample['options'] if option != sample['answer']) for sample in made
    }
    assert circular(other, made) == dict(plain=0, circular=0)
    letters = {
        sample['id']: next(k for k, text in meta(sample)['options'].items() if text == sample['answer'])
        for sample in made
    }
    assert circular(letters, made) == dict(plain=0, circular=0)  # no letters were listed
    share = sum(question.options[question.answer] == 'red' for question in questions[:40]) / 40
    assert 0 < share < 0.3
    assert circular(dict.fromkeys(right, 'red'), made) == dict(
        plain=share, circular=share
    )  # the passes of a question share their answer


@pytest.mark.parametrize('prompt', ['paper', 'words'])
def test_incomplete_predictions_and_builds_are_refused(questions, prompt):
    made = build(questions[:10], 2, 0, prompt)
    right = {sample['id']: sample['answer'] for sample in made}
    with pytest.raises(ValueError, match='no prediction for sample'):
        circular({k: v for k, v in right.items() if k != made[5]['id']}, made)
    with pytest.raises(ValueError, match='has 3 samples; expected one per pass'):
        circular(right, made[1:])
    both = made + build(questions[:10], 3, 0, prompt)
    with pytest.raises(ValueError, match='has 8 samples'):
        circular(right | {s['id']: s['answer'] for s in both}, both)
    with pytest.raises(ValueError, match='no samples'):
        circular({}, [])


def test_album_questions_have_different_pictures_and_all_options_are_used_alike():
    asked = album_questions(300, seed=0)
    assert len({question.image['bytes'] for question in asked}) == len({question.id for question in asked}) == 300
    assert all(len(set(question.options)) == 4 for question in asked)
    assert all(50 < count < 100 for count in Counter(question.answer for question in asked).values())
    assert all(
        100 < count < 200 for count in Counter(option for question in asked for option in question.options).values()
    )


def test_wrong_calls_are_named(questions):
    with pytest.raises(ValueError, match='count is 150, but only'):
        album_questions(150, 0, grid=2, colors=3)
    with pytest.raises(ValueError, match='n_images is 0'):
        build(questions, 0, 0)
    with pytest.raises(ValueError, match="unknown prompt 'chat'"):
        build(questions, 2, 0, 'chat')
    with pytest.raises(ValueError, match='81 images per prompt'):
        build(questions, 81, 0)
    with pytest.raises(ValueError, match='two questions have the same id'):
        build([*questions, questions[0]], 2, 0)
    with pytest.raises(ValueError, match='no option has the index 4'):
        Question('1', {}, 'what?', ('a', 'b', 'c', 'd'), 4)


def test_the_same_pass_four_times_is_not_a_whole_question(questions):
    made = build(questions[:2], 2, 0)
    right = {sample['id']: sample['answer'] for sample in made}
    for wrong in ([made[0]] * 4, [*made, made[0]], [*made[:3], made[2], *made[4:]]):
        with pytest.raises(ValueError, match='comes twice; every pass of a question is asked once'):
            circular(right, wrong)
